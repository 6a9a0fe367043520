"""Reads caption annotations: Karpathy's JSON files and COCO's caption files."""
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import expect, read_json, reading, safe_name

SPLITS = ("train", "val", "test")
CORRECT = "correct the file, or download it again"


@dataclass
class Record:
    """One image and its captions."""
    name: str                  # file name; key of boxes and predictions
    path: str                  # relative to the image folder
    split: str                 # train, val or test
    tokens: list[list[str]]    # words of the captions
    raw: list[str]             # captions as annotated


def make_record(name, path, split, raw, texts=None):
    """The Record of an image, without captions that have no words. texts: what is split into
    words, if not the captions themselves."""
    tokens, captions = [], []
    for text, caption in zip(texts or raw, raw, strict=True):
        # one copy of each word saves a third of the memory
        words = [sys.intern(word) for word in tokenise(text)]
        if words:
            tokens.append(words)
            captions.append(caption)
    expect(captions, f"it has no caption with words for {name!r}")
    return Record(safe_name(name), safe_name(path), split, tokens, captions)


def read_karpathy(path):
    """The Records of a file in the format of Karpathy's dataset_*.json; restval becomes train."""
    content = read_json(path, ["images"])
    records = []
    with reading(path, CORRECT):
        keys = {"filename": str, "split": str, "sentences": list}
        for image in checked_items(content["images"], keys, "images", {"filepath": str}):
            name = image["filename"]
            split = "train" if image["split"] == "restval" else image["split"]
            expect(split in SPLITS, f"the split {split!r} of {name!r} is not train, restval, val "
                                    "or test")

            # "tokens" may replace the caption, or say how it is split
            raw, texts = [], []
            sentences = checked_items(image["sentences"], {}, f"sentences of {name!r}",
                                      {"raw": str, "tokens": list})
            for sentence in sentences:
                text = " ".join(sentence.get("tokens") or [])
                raw.append(sentence.get("raw") or text)
                texts.append(text or raw[-1])
            relative = str(PurePosixPath(image.get("filepath") or "", name))
            records.append(make_record(name, relative, split, raw, texts))
    return checked_records(records, path)


def read_coco(annotation_folder, year):
    """The Records of COCO's captions_train<year>.json, whose images form the training and the
    validation split, and captions_val<year>.json, which is the test split."""
    records = []
    for part in ("train", "val"):
        path = Path(annotation_folder) / f"captions_{part}{year}.json"
        images, captions = coco_captions(path)
        splits = splits_of(len(images)) if part == "train" else ["test"] * len(images)
        with reading(path, CORRECT):
            for image, split in zip(images, splits, strict=False):
                name = image["file_name"]
                relative = f"{part}{year}/{name}"
                records.append(make_record(name, relative, split, captions[image["id"]]))
    return checked_records(records, annotation_folder)


def splits_of(count):
    """The splits of COCO's `count` training images, sorted by id (docs/method.md, section 8): the
    first 110,000 for training and the next 5,000 for validation; if there are fewer, the first
    110/115 of them and the rest."""
    size = 110_000 if count >= 115_000 else round(count * 110 / 115)
    return ["train"] * size + ["val"] * min(count - size, 5_000)


def coco_captions(path):
    """The images of COCO's captions_*.json, sorted by id, and {image id: captions}."""
    content = read_json(path, ["images", "annotations"])
    captions = defaultdict(list)
    with reading(path, CORRECT):
        images = checked_items(content["images"], {"id": int, "file_name": str}, "images")
        keys = {"image_id": int, "caption": str}
        for annotation in checked_items(content["annotations"], keys, "annotations"):
            captions[annotation["image_id"]].append(annotation["caption"])
        ids = {image["id"] for image in images}
        expect(len(ids) == len(images), "two images have the same id")
        for image_id in captions.keys() - ids:
            raise ValueError(f"image id {image_id} has a caption, but is not among the images")
    return sorted(images, key=lambda image: image["id"]), captions


def checked_items(values, required, what, optional=None):
    """`values`, a list of objects; ValueError, for `reading`, unless all have the keys of
    `required` {key: type}, and no other type for those of `optional`."""
    expect(isinstance(values, list), f"it has no list of {what}")
    for number, value in enumerate(values):
        expect(isinstance(value, dict), f"number {number} of its {what} is not an object")
        for key, kind in (required | (optional or {})).items():
            if not has_type(value.get(key), kind) and (key in value or key in required):
                raise ValueError(f"number {number} of its {what} has no valid '{key}'")
    return values


def has_type(value, kind):
    """isinstance, except that booleans are not numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def checked_records(records, source):
    """`records`; InputError if an image occurs twice or a split is empty. source: their file."""
    names = set()
    for record in records:
        if record.name in names:
            raise InputError(f"{source} lists the image {record.name!r} twice: remove one")
        names.add(record.name)
    for split in SPLITS:
        if not any(record.split == split for record in records):
            raise InputError(f"the {split} split of {source} is empty: every split needs at "
                             "least one image")
    return records


def trailing_number(name):
    """The number that ends a file name's stem, or None: 'COCO_val2014_000000000042.jpg' -> 42."""
    match = re.search(r"(?<!\d)(\d{1,18})$", Path(name).stem)
    return int(match[1]) if match else None
