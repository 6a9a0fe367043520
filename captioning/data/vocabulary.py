"""The vocabulary, {word: id}: <pad> = 0, then the words, <unk>, <start>, <end> (docs/method.md, section 8)."""
import re
from collections import Counter

from captioning.errors import InputError
from captioning.files import read_json

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"


def tokenise(text):
    r"""Splits `text` into lower-case tokens of word characters (\w+)."""
    return re.findall(r"\w+", text.lower())


class Vocabulary:
    """A word map {word: id} and the ids of its special tokens.

    Attributes: wordmap; words, the list of words by id; pad, unk, start, end, ids of the special tokens. Raises
    InputError if a special token is missing or the ids are not 0, …, V−1; `source` names the word map in the message.
    """

    def __init__(self, wordmap, source="the word map"):
        if not isinstance(wordmap, dict) or not all(
                isinstance(word, str) and word.isprintable() and type(i) is int for word, i in wordmap.items()):
            raise InputError(f"{source} must contain an object {{word: id}}: create it with preparedataset.py")
        missing = [word for word in (PAD, UNK, START, END) if word not in wordmap]
        if missing or wordmap[PAD] != 0 or sorted(wordmap.values()) != list(range(len(wordmap))):
            reason = f"lacks {missing[0]}" if missing else "must number its words 0, 1, 2, … with <pad> = 0"
            raise InputError(f"{source} {reason}: create it with preparedataset.py")
        self.wordmap = wordmap
        self.words = sorted(wordmap, key=wordmap.get)
        self.pad, self.unk, self.start, self.end = (wordmap[word] for word in (PAD, UNK, START, END))

    def __len__(self):
        return len(self.wordmap)

    def encode(self, words, max_len):
        """Ids [<start>, at most max_len words, <end>]; words outside the vocabulary become <unk>."""
        return [self.start, *(self.wordmap.get(word, self.unk) for word in words[:max_len]), self.end]

    def decode(self, ids):
        """The words of a sequence of ids up to <end>, without <pad> and <start>."""
        words = []
        for i in ids:
            if int(i) == self.end:
                break
            if int(i) not in (self.pad, self.start):
                words.append(self.words[int(i)])
        return words


def build(tokenised, min_word_freq):
    """The Vocabulary of the words that occur at least `min_word_freq` times in `tokenised`, an iterable of token
    lists."""
    counts = Counter(word for words in tokenised for word in words)
    words = sorted(word for word, count in counts.items() if count >= min_word_freq)
    return Vocabulary({word: i for i, word in enumerate([PAD, *words, UNK, START, END])})


def read(path):
    """Reads the Vocabulary from a word map in JSON."""
    return Vocabulary(read_json(path), source=str(path))
