"""Object words: which objects a caption names, and which of them are in the picture."""
from functools import cache
from pathlib import Path

from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import read_json

COCO_OBJECTS = Path(__file__).with_name("coco_objects.txt")
NOTHING = "none"        # the category of phrases that hold an object word and name no object: train tracks


class Objects:
    """words: {object word, or several separated by spaces: category}; pairs: {category: its companion, which habit
    invents}; exact: whether boxes tell all that is in a picture, else its references count too."""

    def __init__(self, words, pairs=(), exact=False):
        self.words = {tuple(tokenise(phrase)): category for phrase, category in words.items()}
        self.pairs, self.exact = dict(pairs), exact
        self.biased = set(self.pairs.values())
        self.longest = max(map(len, self.words), default=0)

    def named(self, words):
        """[(step, category)] of the object words in a list of words; the longest phrase counts, at its last word."""
        found, t = [], 0
        while t < len(words):
            for length in range(min(self.longest, len(words) - t), 0, -1):
                category = self.words.get(tuple(words[t:t + length]))
                if category is not None:
                    found += [(t + length - 1, category)] if category != NOTHING else []
                    t += length - 1
                    break
            t += 1
        return found

    def present(self, entry, references):
        """Categories in a picture: those with a box, and unless boxes are exact those that its references name."""
        categories = set(entry["categories"]) if entry else set()
        if not self.exact:
            categories |= {category for text in references for _, category in self.named(tokenise(text))}
        return categories


def load_objects(data_folder, dataset, boxes, synonyms=None):
    """The data set's objects_<dataset>.json, unless there is none or `synonyms` are given; else the categories in
    `boxes` with the words that the file `synonyms`, by default coco_objects.txt, has for them. Where that knows all of
    them, its other categories count too: captions may name what no picture shows."""
    path = Path(data_folder) / dataset / f"objects_{dataset}.json"
    if path.exists() and not synonyms:
        content = read_json(path, ["words", "pairs"])
        words, pairs = content["words"], content["pairs"]
        if not (isinstance(words, dict) and all(isinstance(name, str) for name in words.values())
                and isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
            raise InputError(f"{path} must hold \"words\", {{word: category}}, and \"pairs\", a list of [category, "
                             "companion]")
        return Objects(words, pairs, exact=True)
    lists = read_synonyms(synonyms or COCO_OBJECTS)
    categories = {name for entry in boxes.values() for name in entry["categories"]}
    if not categories <= lists.keys():
        lists = {name: lists.get(name, []) for name in [*sorted(categories), NOTHING]}
    words = {}
    for category, others in lists.items():
        for phrase in [category, *others] if category != NOTHING else others:
            for form in (phrase, phrase.replace(" ", "")):      # wine glass, wineglass
                words.setdefault(form, category)
                words.setdefault(plural(form), category)
    return Objects(words)


def read_synonyms(path):
    """{category: other words} of a text file with a line for each category: its name, then the words, after commas."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"the synonyms {path} cannot be read ({error}): give a text file") from error
    rows = [[phrase.strip() for phrase in line.split(",") if phrase.strip()] for line in lines if line.strip(" ,")]
    if not rows or any(not tokenise(phrase) for row in rows for phrase in row):
        raise InputError(f"the synonyms {path} must have a line for each category: its name, then other words for it, "
                         "with commas between them")
    return {category: words for category, *words in rows}


@cache
def _inflect():
    try:
        import inflect
    except ImportError as error:
        raise InputError(f"plurals of object words need inflect ({error}): pip install inflect") from error
    return inflect.engine()


@cache
def plural(phrase):
    return _inflect().plural_noun(phrase)


def frequent_words(dataset, objects, path=None):
    """Words of `frequent_word_scores`: those of a file, the paper's for Flickr30K and COCO, else all objects'."""
    if path:
        try:
            words = tokenise(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"the object words {path} cannot be read ({error}): give a text file of words") from error
        if not words:
            raise InputError(f"the object words {path} hold no word: give a text file of words")
        return words
    lists = read_json(Path(__file__).with_name("object_words.json"))
    own = "coco" if dataset.startswith("coco") else dataset
    return lists.get(own) or sorted({phrase[0] for phrase, category in objects.words.items()
                                    if len(phrase) == 1 and category != NOTHING})


def stop_words():
    """The words of stop_words.txt."""
    return set(tokenise(Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8")))
