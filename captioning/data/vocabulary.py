"""The vocabulary, {word: id}: <pad> = 0, then the words, <unk>, <start>, <end> (docs/method.md,
section 8)."""
import re
import unicodedata
from collections import Counter

from captioning.errors import InputError
from captioning.files import read_json

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"


# combining marks, such as most vowels of Hindi, which \w does not match
MARKS = "".join(mark for mark in map(chr, range(0x300, 0x1F000))
                if unicodedata.category(mark).startswith("M"))
TOKEN = re.compile(rf"\w[\w{MARKS}]*")


def tokenise(text):
    """Splits `text` into lower-case tokens of word characters and their combining marks."""
    return TOKEN.findall(text.lower())


class Vocabulary:
    """A word map {word: id}, the list `words` by id, and pad, unk, start, end, together `special`,
    the ids of its special tokens. source: names the word map in the message of an InputError."""

    def __init__(self, wordmap, source="the word map"):
        is_valid = isinstance(wordmap, dict) and all(
            isinstance(word, str) and word.isprintable() and type(i) is int
            for word, i in wordmap.items())
        if (not is_valid or sorted(wordmap.values()) != list(range(len(wordmap)))
                or not {UNK, START, END} <= wordmap.keys() or wordmap.get(PAD) != 0):
            raise InputError(f"{source} must number its words 0, 1, 2, … with {PAD} = 0, and "
                             f"contain {UNK}, {START} and {END}: create it with preparedataset.py")
        self.wordmap = wordmap
        self.words = sorted(wordmap, key=wordmap.get)
        self.special = list(map(wordmap.get, (PAD, UNK, START, END)))
        self.pad, self.unk, self.start, self.end = self.special

    def __len__(self):
        return len(self.wordmap)

    def encode(self, words, max_len):
        """Ids [<start>, at most max_len words, <end>]; unknown words become <unk>."""
        ids = [self.wordmap.get(word, self.unk) for word in words[:max_len]]
        return [self.start, *ids, self.end]

    def unknown(self, text):
        """The words of a text that are not in the vocabulary."""
        return [word for word in tokenise(text) if word not in self.wordmap]

    def ids_of(self, text):
        """Ids [<start>, the words of a text, <end>]; unknown words become <unk>."""
        words = tokenise(text)
        return self.encode(words, len(words))

    def within(self, word):
        """The id of a word in a caption."""
        return self.ids_of(word)[1]

    def decode(self, ids):
        """The words of a sequence of ids up to <end>, without <pad> and <start>."""
        words = []
        for i in map(int, ids):
            if i == self.end:
                break
            if i not in (self.pad, self.start):
                words.append(self.words[i])
        return words


def build(tokenised, min_word_freq):
    """The Vocabulary of the words that occur at least `min_word_freq` times in lists of tokens."""
    counts = Counter(word for words in tokenised for word in words)
    words = sorted(word for word, count in counts.items() if count >= min_word_freq)
    return Vocabulary({word: i for i, word in enumerate([PAD, *words, UNK, START, END])})


def read(path):
    """The Vocabulary of a word map in JSON."""
    return Vocabulary(read_json(path), source=str(path))
