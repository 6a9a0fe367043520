"""Object words: which objects a caption names, and which of them are in the picture."""
from functools import cache
from pathlib import Path

from captioning.annotations import coco_boxes
from captioning.errors import InputError
from captioning.files import read_json
from captioning.vocabulary import tokenise

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


def load_boxes(path):
    """Boxes {file name: {"categories", "bbox", "shape"}} of a file in the layout of COCOvalEntities.json, or of COCO's
    instances_*.json."""
    boxes = read_json(path)
    if isinstance(boxes, dict) and {"images", "annotations", "categories"} <= boxes.keys():
        return coco_boxes(path, boxes)
    if not isinstance(boxes, dict):
        raise InputError(f"{path} must hold an object {{file name: boxes}}")
    for name, entry in boxes.items():
        try:
            sound = min(entry["shape"]) > 0 and all(len(corners) == 4 for number in entry["categories"].values()
                                                    for corners in entry["bbox"][str(number)])
        except (KeyError, TypeError, AttributeError, ValueError):
            sound = False
        if not sound:
            raise InputError(f"{path} has no proper boxes for {name}: it needs categories, bbox and shape")
    return boxes


def hallucination(captions, references, entries, objects):
    """CHAIR of captions, with their pictures' references and box entries (or None), a list item an image.

    {"chair_i": share of object words whose object is not there, "chair_s": share of captions with such a word,
    "object_precision": 1 − chair_i} and, if some objects are biased, object_precision of those and of all others, as
    far as captions name any, and "companions_invented", the share of pictures with the first of a pair and without its
    companion whose caption names the companion.
    """
    right, biased, per_caption, invented = [], [], [], []
    for there, categories in named_and_present(captions, references, entries, objects):
        right += [category in there for category in categories]
        biased += [category in objects.biased for category in categories]
        per_caption.append(all(category in there for category in categories))
        invented += [companion in categories for category, companion in objects.pairs.items()
                     if category in there and companion not in there]
    found = {"chair_i": 1 - _share(right), "chair_s": 1 - _share(per_caption), "object_precision": _share(right)}
    if objects.biased:
        for name, wanted in (("biased", True), ("unbiased", False)):
            chosen = [ok for ok, b in zip(right, biased, strict=True) if b == wanted]
            found |= {f"object_precision_{name}": _share(chosen)} if chosen else {}
    return found | ({"companions_invented": _share(invented)} if invented else {})


def named_and_present(captions, references, entries, objects):
    """For each caption the categories in its picture and those that it names, as often as it does."""
    for caption, sentences, entry in zip(captions, references, entries, strict=True):
        named = [category for _, category in objects.named(tokenise(caption))]
        yield objects.present(entry, sentences), named


def frequent_words(dataset, objects, path=None):
    """The words that mean_precision is of: those of a file, the paper's for Flickr30K and COCO, else all objects'."""
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


def mean_precision(captions, references, words):
    """{"map", "map_recall", "map_f1"}: means over `words` of precision, recall and F1 of "the caption has the word"
    against "a reference has it" (method.md, section 9). Precision is of words that are predicted at all, recall of
    words that references have, F1 of both."""
    predicted = [set(tokenise(caption)) for caption in captions]
    true = [set().union(*(tokenise(text) for text in sentences)) for sentences in references]
    precision, recall, f1 = [], [], []
    for word in dict.fromkeys(words):
        both = sum(word in said and word in there for said, there in zip(predicted, true, strict=True))
        said, there = sum(word in some for some in predicted), sum(word in some for some in true)
        precision += [both / said] if said else []
        recall += [both / there] if there else []
        f1 += [2 * both / (said + there)] if said + there else []
    means = zip(("map", "map_recall", "map_f1"), (precision, recall, f1), strict=True)
    return {name: sum(values) / len(values) for name, values in means if values}


def _share(values):
    return sum(values) / len(values) if values else 1.0
