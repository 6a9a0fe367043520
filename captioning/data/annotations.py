"""Reads caption and box annotations: Karpathy's JSON and COCO's own files. What is wrong in them is an InputError."""
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import read_json, safe_name

SPLITS = ("train", "val", "test")
@dataclass
class Record:
    """One image and its captions."""
    name: str                  # file name, the key of boxes and predictions
    path: str                  # relative to the image folder
    split: str                 # train, val or test
    tokens: list[list[str]]    # tokenised sentences
    raw: list[str]             # the sentences as written


def read_karpathy(path):
    """Records of a file in the form of Karpathy's dataset_*.json; its split 'restval' trains."""
    keys = {"filename": str, "split": str, "sentences": list}
    images = checked_items(read_json(path, ["images"])["images"], keys, path, "images", optional={"filepath": str})
    records = []
    for image in images:
        split = "train" if image["split"] == "restval" else image["split"]
        if split not in SPLITS:
            raise InputError(f"{path} puts {image['filename']!r} into the split {split!r}: it must be train, restval, "
                             "val or test")
        raw, tokens = [], []
        for sentence in checked_items(image["sentences"], {}, path, f"sentences of {image['filename']!r}",
                               optional={"raw": str, "tokens": list}):
            words = " ".join(_checked_words(sentence.get("tokens") or [], path, image["filename"]))
            text = sentence.get("raw") or words
            raw.append(text)
            tokens.append(_tokenised(words or text))
        relative = str(PurePosixPath(image.get("filepath") or "", image["filename"]))
        records.append(_record(image["filename"], relative, split, tokens, raw, path))
    return _checked(records, path)


def read_coco(annotation_folder, year):
    """Records of COCO's captions_train<year>.json and captions_val<year>.json.

    The training images sorted by id: the first 110,000 train and the next 5,000 validate, or, of fewer than 115,000,
    110 in 115 train and the rest validate. The validation images test (method.md, section 8).
    """
    records = []
    for part in ("train", "val"):
        path = Path(annotation_folder) / f"captions_{part}{year}.json"
        images, sentences = coco_captions(path)
        if part == "train":
            size = 110_000 if len(images) >= 115_000 else round(len(images) * 110 / 115)
            splits = ["train"] * size + ["val"] * min(len(images) - size, 5_000)
        else:
            splits = ["test"] * len(images)
        for image, split in zip(images, splits, strict=False):
            raw = sentences[image["id"]]
            relative = f"{part}{year}/{image['file_name']}"
            records.append(_record(image["file_name"], relative, split, [_tokenised(s) for s in raw], raw, path))
    return _checked(records, annotation_folder)


def coco_captions(path):
    """The images of COCO's captions_*.json, sorted by id, and {id: sentences}."""
    content = read_json(path, ["images", "annotations"])
    images = checked_items(content["images"], {"id": int, "file_name": str}, path, "images")
    sentences = defaultdict(list)
    for annotation in checked_items(content["annotations"], {"image_id": int, "caption": str}, path, "annotations"):
        sentences[annotation["image_id"]].append(annotation["caption"])
    ids = {image["id"] for image in images}
    if len(ids) < len(images):
        raise InputError(f"{path} gives two of its images the same id")
    if sentences.keys() - ids:
        raise InputError(f"{path} has captions for image id {min(sentences.keys() - ids)}, which its images lack")
    return sorted(images, key=lambda image: image["id"]), sentences


def checked_items(values, keys, path, what, optional=()):
    """`values`, checked to be a list of objects that hold `keys`, {name: type}, and `optional` ones, if at all, so."""
    if not isinstance(values, list):
        raise InputError(f"{path} must hold a list of {what}")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(f"{path}: number {number} of its {what} is not an object")
        for key, kind in keys.items():
            if not is_a(kind, value.get(key)):
                raise InputError(f"{path}: number {number} of its {what} has no proper '{key}'")
        for key in optional:
            if key in value and not is_a(optional[key], value[key]):
                raise InputError(f"{path}: number {number} of its {what} has no proper '{key}'")
    return values


def is_a(kind, value):
    """isinstance, but true and false are no numbers, and text must be Unicode that a file can hold."""
    if kind is str and isinstance(value, str) and not value.isascii():
        return not re.search(r"[\ud800-\udfff]", value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _tokenised(text):
    return [sys.intern(word) for word in tokenise(text)]    # one copy of each word: a third of all memory less


def _checked_words(words, path, name):
    if not all(is_a(str, word) for word in words):
        raise InputError(f"{path} has 'tokens' of {name!r} that are no words")
    return words


def _record(name, relative, split, tokens, raw, source):
    if not relative.isprintable():
        raise InputError(f"{source} holds the file name {relative!r}, which is not printable: correct the file")
    return Record(safe_name(name, source), safe_name(relative, source), split, tokens, raw)


def _checked(records, source):
    """Records with at least one word each, of different names, in splits none of which is empty."""
    seen = set()
    for record in records:
        if record.name in seen:
            raise InputError(f"{source} lists the image {record.name!r} twice")
        seen.add(record.name)
        there = [bool(words) for words in record.tokens]
        record.tokens = [words for words, ok in zip(record.tokens, there, strict=True) if ok]
        record.raw = [text for text, ok in zip(record.raw, there, strict=True) if ok]
        if not record.tokens:
            raise InputError(f"{source} has no caption with words for {record.name!r}: remove it or caption it")
    check_splits(records, source)
    return records


def check_splits(records, source):
    for split in SPLITS:
        if not any(record.split == split for record in records):
            raise InputError(f"the {split} split of {source} is empty: every split needs pictures")


def trailing_number(name):
    """The number at the end of a file name's stem, as an int, or None: 'COCO_val2014_000000000042.jpg' -> 42."""
    found = re.search(r"(\d+)$", Path(name).stem)
    return int(found[1]) if found else None
