"""Reads caption annotations: Karpathy's JSON files and COCO's caption files."""
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import expect, read_json, reading, safe_name

SPLITS = ("train", "val", "test")
CORRECT = "correct the file, or download it again"
OTHER_SPLITS = {"restval": "train", "validation": "val", "dev": "val"}


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
    """The Records of a file in the format of Karpathy's dataset_*.json; restval becomes train.

    Images of equal names in several folders are named with their folder. Without a validation
    split, every 20th training image forms it."""
    content = read_json(path)
    records = []
    with reading(path, CORRECT):
        images = content if isinstance(content, list) else content["images"]
        keys = {"filename": str, "split": str, "sentences": list}
        images = checked_items(images, keys, "images", {"filepath": str})
        counts = Counter(image["filename"] for image in images)
        for image in images:
            name = image["filename"]
            split = OTHER_SPLITS.get(image["split"], image["split"])
            expect(split in SPLITS, f"the split {split!r} of {name!r} is not train, restval, val "
                                    "or test")

            # "tokens" may replace the caption, or say how it is split
            raw, texts = [], []
            sentences = [{"raw": sentence} if isinstance(sentence, str) else sentence
                         for sentence in image["sentences"]]
            sentences = checked_items(sentences, {}, f"sentences of {name!r}",
                                      {"raw": str, "tokens": list})
            for sentence in sentences:
                text = " ".join(sentence.get("tokens") or [])
                raw.append(sentence.get("raw") or text)
                texts.append(text or raw[-1])
            relative = str(PurePosixPath(image.get("filepath") or "", name))
            records.append(make_record(relative if counts[name] > 1 else name, relative, split,
                                       raw, texts))

    training = [record for record in records if record.split == "train"]
    if len(training) > 1 and not any(record.split == "val" for record in records):
        chosen = training[19::20] or training[-1:]
        for record in chosen:
            record.split = "val"
        print(f"{path} has no validation split: {len(chosen)} of its {len(training)} training "
              "images form it", flush=True)
    return checked_records(records, path)


def read_coco(annotation_folder, year):
    """The Records of COCO's captions_train<year>.json, whose images form the training and the
    validation split, and captions_val<year>.json, which is the test split."""
    records = []
    for part in ("train", "val"):
        path = Path(annotation_folder) / f"captions_{part}{year}.json"
        names, captions = coco_captions(path)
        splits = splits_of(len(names)) if part == "train" else ["test"] * len(names)
        with reading(path, CORRECT):
            for (image_id, name), split in zip(names.items(), splits, strict=False):
                relative = f"{part}{year}/{name}"
                records.append(make_record(name, relative, split, captions[image_id]))
    return checked_records(records, annotation_folder)


def splits_of(count):
    """The splits of COCO's `count` training images, sorted by id (docs/method.md, section 8): the
    first 110,000 for training and the next 5,000 for validation; if there are fewer, the first
    110/115 of them and the rest."""
    size = 110_000 if count >= 115_000 else round(count * 110 / 115)
    return ["train"] * size + ["val"] * min(count - size, 5_000)


def coco_captions(path):
    """{image id: file name} of COCO's captions_*.json, sorted by id, and {image id: captions}; ids
    as `plain_id`.

    Also of files in its format with text as ids, without file names (then ids are names), with
    folders in them, with captions that VizWiz calls precanned or rejected, which do not count, and
    of TextCaps' files."""
    content = read_json(path)
    names, captions = {}, defaultdict(list)
    with reading(path, CORRECT):
        expect(isinstance(content, dict), "it has no images and annotations")
        if "data" in content:       # TextCaps
            items = checked_items(content["data"], {"caption_str": str}, "data")
            images = {item["image_id"]: {"id": item["image_id"], "file_name": item["image_path"]}
                      for item in items}
            content = {"images": list(images.values()), "annotations": [
                {"image_id": item["image_id"], "caption": item["caption_str"]} for item in items]}
        images = checked_items(content["images"], {}, "images", {"file_name": str})
        for number, image in enumerate(images):
            image_id = plain_id(image.get("id"))
            expect(image_id, f"number {number} of its images has no valid 'id'")
            expect(image_id not in names, "two images have the same id")
            names[image_id] = image.get("file_name") or image_id
        annotations = checked_items(content["annotations"], {"caption": str}, "annotations")
        for number, annotation in enumerate(annotations):
            image_id = plain_id(annotation.get("image_id"))
            expect(image_id, f"number {number} of its annotations has no valid 'image_id'")
            expect(image_id in names, f"image id {image_id} has a caption, but is not among the "
                                      "images")
            if not annotation.get("is_precanned") and not annotation.get("is_rejected"):
                captions[image_id].append(annotation["caption"])

    # names without folders, unless they differ in these alone
    plain = {image_id: PurePosixPath(name).name for image_id, name in names.items()}
    names = plain if len(set(plain.values())) == len(plain) else names
    in_order = sorted(names, key=lambda image_id: (len(image_id), image_id))
    return {image_id: names[image_id] for image_id in in_order}, captions


def plain_id(value):
    """An image id as text: that of 42, 42.0, "42" and "00042" is "42"; None for other types."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value:
        return None
    return str(int(value)) if value.isascii() and value.isdigit() else value


def checked_items(values, required, what, optional=None):
    """`values`, a list of objects; ValueError, for `reading`, unless all have the keys of
    `required` {key: type}, and no other type for those of `optional`."""
    expect(isinstance(values, list), f"it has no list of {what}")
    for number, value in enumerate(values):
        expect(isinstance(value, dict), f"number {number} of its {what} is not an object")
        for key, kind in (required | (optional or {})).items():
            is_absent = value.get(key) is None and key not in required
            expect(is_absent or type(value.get(key)) is kind,
                   f"number {number} of its {what} has no valid '{key}'")
    return values


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
