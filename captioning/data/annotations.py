"""Reads caption annotations: Karpathy's JSON files and COCO's caption files. Invalid content raises InputError."""
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
    name: str                  # file name; key of boxes and predictions
    path: str                  # relative to the image folder
    split: str                 # train, val or test
    tokens: list[list[str]]    # tokenised captions
    raw: list[str]             # captions as annotated


def read_karpathy(path):
    """Returns the Records of a file in the format of Karpathy's dataset_*.json; split "restval" becomes "train".

    Raises InputError if the file is malformed, lists an image twice, or lacks one of the splits.
    """
    keys = {"filename": str, "split": str, "sentences": list}
    images = checked_items(read_json(path, ["images"])["images"], keys, path, "images", optional={"filepath": str})
    records = []
    for image in images:
        split = "train" if image["split"] == "restval" else image["split"]
        if split not in SPLITS:
            raise InputError(f"{path} assigns {image['filename']!r} to the split {split!r}: it must be train, restval, "
                             "val or test")
        raw, tokens = [], []
        for sentence in checked_items(image["sentences"], {}, path, f"sentences of {image['filename']!r}",
                                      optional={"raw": str, "tokens": list}):
            words = " ".join(_checked_words(sentence.get("tokens") or [], path, image["filename"]))
            text = sentence.get("raw") or words
            raw.append(text)
            tokens.append(interned_tokens(words or text))
        relative = str(PurePosixPath(image.get("filepath") or "", image["filename"]))
        records.append(make_record(image["filename"], relative, split, tokens, raw, path))
    return checked_records(records, path)


def read_coco(annotation_folder, year):
    """Returns the Records of COCO's captions_train<year>.json and captions_val<year>.json.

    The training images form the training and the validation split (see `splits_of`), the validation images the test
    split.
    """
    records = []
    for part in ("train", "val"):
        path = Path(annotation_folder) / f"captions_{part}{year}.json"
        images, captions = coco_captions(path)
        splits = splits_of(len(images)) if part == "train" else ["test"] * len(images)
        for image, split in zip(images, splits, strict=False):
            raw = captions[image["id"]]
            tokens = [interned_tokens(text) for text in raw]
            relative = f"{part}{year}/{image['file_name']}"
            records.append(make_record(image["file_name"], relative, split, tokens, raw, path))
    return checked_records(records, annotation_folder)


def splits_of(count):
    """The splits of COCO's `count` training images, sorted by id (docs/method.md, section 8): the first 110,000 form
    the training split, the next 5,000 the validation split; if there are fewer, the first 110/115 of them and the rest.
    """
    size = 110_000 if count >= 115_000 else round(count * 110 / 115)
    return ["train"] * size + ["val"] * min(count - size, 5_000)


def coco_captions(path):
    """Returns the images of COCO's captions_*.json, sorted by id, and {image id: captions}."""
    content = read_json(path, ["images", "annotations"])
    images = checked_items(content["images"], {"id": int, "file_name": str}, path, "images")
    captions = defaultdict(list)
    for annotation in checked_items(content["annotations"], {"image_id": int, "caption": str}, path, "annotations"):
        captions[annotation["image_id"]].append(annotation["caption"])
    ids = {image["id"] for image in images}
    if len(ids) < len(images):
        raise InputError(f"{path} contains two images with the same id: correct the file")
    unknown_ids = captions.keys() - ids
    if unknown_ids:
        raise InputError(f"{path} contains captions for image id {min(unknown_ids)}, which is not among its images")
    return sorted(images, key=lambda image: image["id"]), captions


def checked_items(values, keys, path, what, optional=()):
    """Returns `values` if it is a list of objects whose `keys`, {name: type}, are present and of that type, and whose
    `optional` keys are of that type where present; otherwise raises InputError. `what` names the items in messages."""
    if not isinstance(values, list):
        raise InputError(f"{path} must contain a list of {what}")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(f"{path}: number {number} of its {what} is not an object")
        for key, kind in keys.items():
            if not has_type(value.get(key), kind):
                raise InputError(f"{path}: number {number} of its {what} has no valid '{key}'")
        for key in optional:
            if key in value and not has_type(value[key], optional[key]):
                raise InputError(f"{path}: number {number} of its {what} has no valid '{key}'")
    return values


def has_type(value, kind):
    """isinstance, except that booleans are not numbers and that strings with lone surrogates are rejected, since they
    cannot be written to a file."""
    if kind is str and isinstance(value, str) and not value.isascii():
        return not re.search(r"[\ud800-\udfff]", value)
    return isinstance(value, kind) and not isinstance(value, bool)


def interned_tokens(text):
    """The tokens of a caption (see vocabulary.tokenise)."""
    return [sys.intern(word) for word in tokenise(text)]    # one copy of each word saves a third of the memory


def _checked_words(words, path, name):
    if not all(has_type(word, str) for word in words):
        raise InputError(f"{path} has 'tokens' of {name!r} that are not strings")
    return words


def make_record(name, relative, split, tokens, raw, source):
    """The Record of one image; InputError, which names the data file `source`, if a file name is invalid."""
    return Record(safe_name(name, source), safe_name(relative, source), split, tokens, raw)


def checked_records(records, source):
    """Removes captions without words; raises InputError for duplicate names, images without captions, empty splits."""
    names = set()
    for record in records:
        if record.name in names:
            raise InputError(f"{source} lists the image {record.name!r} twice")
        names.add(record.name)
        has_words = [bool(words) for words in record.tokens]
        record.tokens = [words for words, keep in zip(record.tokens, has_words, strict=True) if keep]
        record.raw = [text for text, keep in zip(record.raw, has_words, strict=True) if keep]
        if not record.tokens:
            raise InputError(f"{source} has no caption with words for {record.name!r}: remove the image or add a "
                             "caption")
    check_splits(records, source)
    return records


def check_splits(records, source):
    """Raises InputError if one of the three splits contains no record."""
    for split in SPLITS:
        if not any(record.split == split for record in records):
            raise InputError(f"the {split} split of {source} is empty: every split needs at least one image")


def trailing_number(name):
    """The number at the end of a file name's stem, or None: 'COCO_val2014_000000000042.jpg' -> 42."""
    match = re.search(r"(?<!\d)(\d{1,18})$", Path(name).stem)
    return int(match[1]) if match else None
