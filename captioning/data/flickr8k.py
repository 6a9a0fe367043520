"""Reads Flickr8k's annotations: its own text files, or the captions.txt distributed on Kaggle."""
import csv
import random
from collections import defaultdict
from pathlib import Path

from captioning.data import annotations
from captioning.data.annotations import CORRECT, SPLITS, make_record, read_karpathy
from captioning.errors import InputError
from captioning.files import expect, reading

TOKENS = "Flickr8k.token.txt"
KAGGLE = "captions.txt"
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt",
         "test": "Flickr_8k.testImages.txt"}


def read_flickr8k(annotation_folder, karpathy_json=None, seed=1):
    """The Records of Flickr8k (Hodosh, Young and Hockenmaier 2013).

    Captions are those of Flickr8k.token.txt, else of Kaggle's captions.txt. Splits are those of
    karpathy_json, else of the folder's three lists of images, else random: an eighth of the images
    each for validation and test. Images of no split are omitted and their number is printed."""
    folder = Path(annotation_folder)
    source = folder / TOKENS if (folder / TOKENS).is_file() else folder / KAGGLE
    if not source.is_file():
        raise InputError(f"{folder} contains neither {TOKENS} nor {KAGGLE}: give the folder of "
                         "Flickr8k's captions")
    captions = _read_captions(source)

    # where the splits come from
    if karpathy_json:
        origin = karpathy_json
        splits = {record.name: record.split for record in read_karpathy(karpathy_json)}
    elif any((folder / name).exists() for name in LISTS.values()):
        origin = "Flickr_8k.{train,dev,test}Images.txt"
        splits = _read_lists(folder)
    else:
        origin = f"random ({'/'.join(SPLITS)} 6:1:1, --seed {seed}), as {folder} has no lists"
        shuffled = sorted(captions)
        random.Random(seed).shuffle(shuffled)
        eighth = len(shuffled) // 8
        splits = dict.fromkeys(sorted(captions), "train")
        splits |= dict.fromkeys(shuffled[:eighth], "val")
        splits |= dict.fromkeys(shuffled[eighth:2 * eighth], "test")

    missing = [name for name in splits if name not in captions]
    if missing:
        raise InputError(f"{len(missing)} images of {origin} have no captions in {source}, the "
                         f"first being {missing[0]!r}: add their captions or remove them from the "
                         "list")
    unused = len(captions) - len(splits)
    print(f"splits: {origin}; {unused} captioned images of {source.name} belong to no split")
    with reading(source, CORRECT):
        records = [make_record(name, name, split, captions[name])
                   for name, split in splits.items()]
    return annotations.checked_records(records, source)


def _read_captions(path):
    """{image: captions} of lines "<image>#<number><tab><caption>", or of Kaggle's
    comma-separated values with the header "image,caption"."""
    captions = defaultdict(list)
    with reading(path, "correct the line, with captions that contain commas in double quotes"):
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        is_kaggle = path.name == KAGGLE
        if is_kaggle:
            rows = csv.reader(lines, strict=True)
            expect(next(rows) == ["image", "caption"], "its first line is not 'image,caption'")
        else:
            rows = (line.split("\t", 1) for line in lines)
        for number, row in enumerate(rows, 1 + is_kaggle):
            expect(len(row) == 2, f"row {number} has {len(row)} fields in place of an image and "
                                  "a caption")
            name, caption = row
            if not is_kaggle:
                name, _, index = name.rpartition("#")
                expect(name and index.isdigit(), f"row {number} does not begin <image>#<number>")
            captions[name].append(caption)
    return captions


def _read_lists(folder):
    """{image: split} of the three lists of images."""
    splits = {}
    for split, name in LISTS.items():
        path = folder / name
        with reading(path, CORRECT):
            for line in path.read_text(encoding="utf-8-sig").split("\n"):
                image = line.strip()
                expect(image not in splits, f"the image {image!r} is already listed in "
                                            f"{LISTS.get(splits.get(image))}")
                if image:
                    splits[image] = split
    return splits
