"""The words of captions, of a tokenizer that splits them into pieces."""
from functools import cached_property

from captioning.errors import InputError


class Words:
    """The words of captions, a vocabulary that grows: a word is a tuple of the tokenizer's pieces.

    It is used like captioning.data.vocabulary.Vocabulary, by ids of words. ends: ids of the pieces
    that end a caption."""

    pad, start, end, unk = range(4)

    def __init__(self, tokenizer, ends):
        self.tokenizer = tokenizer
        self.ends = ends
        self.size = 0           # number of the model's logits
        self.limit = None       # of pieces, or None
        self.words = ["<pad>", "<start>", "<end>", "<unk>"]
        self.pieces = [(), (), (ends[0],), ()]
        self.ids = {(ends[0],): self.end}
        self.known = {}         # {words of a caption, as text: ids}

    def __len__(self):
        return len(self.words)

    def split(self, pieces):
        """The ids of the words that pieces form. A word ends before a space, and where letters and
        digits meet other characters."""
        groups = []             # [text, its pieces]
        before = ""
        for n in range(len(pieces)):
            text = self.tokenizer.decode(pieces[:n + 1], clean_up_tokenization_spaces=False)
            added = text[len(before):]
            is_same = added[:1].isalnum() == before[-1:].isalnum() and not added[:1].isspace()
            if groups and (not added or is_same or not groups[-1][0].strip()):
                groups[-1][0] += added
                groups[-1][1] += (pieces[n],)
            else:
                groups.append([added, (pieces[n],)])
            before = text
        ids = []
        for text, own in groups:
            if own not in self.ids:
                self.ids[own] = len(self.words)
                self.words.append(text.strip())
                self.pieces.append(own)
            ids.append(self.ids[own])
        self.known[" ".join(self.decode(ids))] = ids
        return ids

    def _tokens(self, text):
        text = text.encode(errors="replace").decode()       # without halves of surrogate pairs
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def unknown(self, text):
        """The words of a text, up to spaces, for which the tokenizer has no pieces, or special
        ones."""
        special = set(self.tokenizer.all_special_ids)
        return [word for word in text.split() if special & set(self._tokens(word))]

    def ids_of(self, text):
        """Ids [<start>, the words of a text, <end>]; InputError for more pieces than the model
        reads."""
        pieces = self._tokens(text)
        if self.limit and len(pieces) >= self.limit:
            raise InputError(f"a caption of {len(pieces)} pieces of words is longer than the model "
                             f"reads, {self.limit}: shorten it")
        return [self.start, *self.split(pieces), self.end]

    def within(self, word):
        """The id of a word as it stands after another one, where its first piece may differ."""
        return self.ids_of(f"a {word}")[-2]

    def encode(self, words, max_len):
        """Ids [<start>, those of words that `decode` returned, <end>]."""
        text = " ".join(words[:max_len])
        known = self.known.get(text)
        return [self.start, *known, self.end] if known else self.ids_of(text)

    def decode(self, ids):
        """The words of ids up to <end>, in lower case, without <pad> and <start>."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        return [self.words[i].lower() for i in ids if i not in (self.pad, self.start)]

    @cached_property
    def outputs(self):
        """The texts of the pieces, one for each logit."""
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        pieces = [piece.strip("▁Ġ ") for piece in pieces]
        return pieces + [""] * (self.size - len(pieces))        # some models have unused ones
