"""Object words: the object categories that a caption names and those present in an image."""
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import expect, read_json, reading

COCO_OBJECTS = Path(__file__).with_name("coco_objects.txt")
VISIBLE_OBJECTS = Path(__file__).with_name("visible_objects.txt")     # no categories of COCO
STOP_WORDS = Path(__file__).with_name("stop_words.txt")
# category of phrases that contain an object word but name no object, such as "train tracks"
NO_OBJECT = "none"


class Objects:
    """The object categories of a data set and the words that name them.

    words: {word, or several separated by spaces: category}. pairs: {category: its companion, which
    a biased model names out of habit}. exact: whether the boxes cover all objects of an image;
    otherwise references count as well.
    """

    def __init__(self, words, pairs=(), exact=False):
        self.words = {tuple(tokenise(phrase)): category for phrase, category in words.items()}
        self.longest = max(map(len, self.words), default=1)
        self.pairs = dict(pairs)
        self.exact = exact
        self.biased = set(self.pairs.values())

    def named(self, words):
        """[(step, category)] of the phrases in a list of words, each at its last word; of several
        phrases that begin at a word, the longest."""
        named = []
        step = 0
        while step < len(words):
            starts = (tuple(words[step:step + n]) for n in range(self.longest, 0, -1))
            phrase = next((start for start in starts if start in self.words), (words[step],))
            step += len(phrase)
            category = self.words.get(phrase, NO_OBJECT)
            if category != NO_OBJECT:
                named.append((step - 1, category))
        return named

    def category_ids(self, vocabulary):
        """(V,) the number of the category that each word of the vocabulary names by itself, or −1.
        """
        categories = sorted(set(self.words.values()) - {NO_OBJECT})
        numbers = {name: number for number, name in enumerate(categories)}
        named = [self.words.get((word,)) for word in vocabulary.words]
        return torch.tensor([numbers.get(category, -1) for category in named])

    def present(self, entry, references):
        """The set of categories in an image: those with boxes, and unless boxes are exact those
        named by references."""
        categories = set(entry["categories"]) if entry else set()
        if not self.exact:
            for text in references:
                categories |= {category for _, category in self.named(tokenise(text))}
        return categories


def load_objects(data_folder, dataset, boxes, synonyms=None, visible=False):
    """The Objects of a data set, from its objects_<dataset>.json if that exists and `synonyms` is
    not given.

    Otherwise they are the categories in `boxes` with the words listed for them in the file
    `synonyms`, by default coco_objects.txt; visible: also those of visible_objects.txt. If the file
    lists all these categories, its other categories are included, because captions may name objects
    that no image shows.
    """
    path = Path(data_folder) / dataset / f"objects_{dataset}.json"
    if path.exists() and not synonyms:
        with reading(path, 'give {"words": {word: category}, "pairs": [[category, companion], …]}'):
            content = read_json(path)
            words = content["words"]
            pairs = content["pairs"]
            expect(all(map(tokenise, words)) and set(map(type, words.values())) <= {str},
                   "a word or category is no text")
            expect(all(type(pair) is list and list(map(type, pair)) == [str, str]
                       for pair in pairs), "a pair is not of two categories")
            return Objects(words, pairs, exact=True)

    lists = read_synonyms(synonyms or COCO_OBJECTS)
    if visible:
        lists |= read_synonyms(VISIBLE_OBJECTS)
    categories = {name for entry in boxes.values() for name in entry["categories"]}
    if not categories <= lists.keys():
        lists = {name: lists.get(name, []) for name in [*sorted(categories), NO_OBJECT]}
    words = {}
    for category, others in lists.items():
        for phrase in others if category == NO_OBJECT else [category, *others]:
            for form in (phrase, phrase.replace(" ", "")):      # "wine glass" and "wineglass"
                words.setdefault(form, category)
                words.setdefault(plural(form), category)
    return Objects(words)


def read_synonyms(path):
    """{category: [synonym, …]} of a text file with one line per category: its name and synonyms,
    separated by commas. Lines of the same category count as one."""
    synonyms = {}
    with reading(path, "give one line per category: its name and synonyms, separated by commas"):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            phrases = [phrase.strip() for phrase in line.split(",") if phrase.strip()]
            expect(all(map(tokenise, phrases)), f"{line!r} has a phrase without words")
            if phrases:
                synonyms.setdefault(phrases[0], []).extend(phrases[1:])
        expect(synonyms, "it names no category")
    return synonyms


def _read_text(path):
    with reading(path, "give a text file"):
        return Path(path).read_text(encoding="utf-8")


@cache
def _inflect_engine():
    try:
        # the checks of inflect's types at run time would take seconds to compile
        with mock.patch("typeguard.typechecked", lambda target: target):
            import inflect  # which only object words need
    except ImportError as error:
        raise InputError(f"object words require inflect ({error}): pip install inflect") from error
    return inflect.engine()


@cache
def plural(phrase):
    """The plural of a noun phrase: 'wine glass' -> 'wine glasses'; 'persons' stays as it is."""
    form = _inflect_engine().plural_noun(phrase)
    return phrase if form.endswith("ss") else form


def frequent_words(dataset, objects, path=None):
    """The words of `frequent_word_scores`: those in the file `path`, by default the paper's for
    Flickr30K (also for Flickr8k) and COCO, and for other data sets all single object words."""
    if path:
        words = tokenise(_read_text(path))
        if not words:
            raise InputError(f"the object words {path} contain no word: give a text file of words")
        return words
    lists = read_json(Path(__file__).with_name("object_words.json"))
    name = "coco" if dataset.startswith("coco") else dataset.replace("flickr8k", "flickr30k")
    single = {phrase[0] for phrase, category in objects.words.items()
              if len(phrase) == 1 and category != NO_OBJECT}
    return lists.get(name) or sorted(single)


def stop_words(path=None):
    """The set of words in the text file `path`, by default stop_words.txt."""
    return set(tokenise(_read_text(path or STOP_WORDS)))
