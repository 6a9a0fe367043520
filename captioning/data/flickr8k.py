"""Reads Flickr8k's annotations: its own text files, or the captions.txt distributed on Kaggle."""
import csv
import random
import re
from collections import defaultdict
from pathlib import Path

from captioning.data.annotations import SPLITS, checked_records, interned_tokens, make_record, read_karpathy
from captioning.errors import InputError
from captioning.files import check_file

TOKENS, KAGGLE = "Flickr8k.token.txt", "captions.txt"
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}


def read_flickr8k(annotation_folder, karpathy_json=None, seed=1):
    """Returns the Records of Flickr8k (Hodosh, Young and Hockenmaier 2013).

    Captions are read from Flickr8k.token.txt or, if that is missing, from Kaggle's captions.txt. Splits are those of
    karpathy_json, if given, otherwise those of the three lists of images; if the folder has none of them, an eighth of
    the images each, chosen with `seed`, forms the validation and the test split. Captions of images that belong to no
    split are omitted; the number of their images is printed. InputError if a file is missing or malformed, an image
    belongs to two splits, or an image of a split has no captions.
    """
    folder = Path(annotation_folder)
    source = next((folder / name for name in (TOKENS, KAGGLE) if (folder / name).is_file()), None)
    if source is None:
        raise InputError(f"{folder} contains neither {TOKENS} nor {KAGGLE}: give the folder of Flickr8k's captions")
    captions = _read_tokens(source) if source.name == TOKENS else _read_kaggle(source)
    splits, origin = _read_splits(folder, karpathy_json, captions, seed)
    without_captions = [name for name in splits if name not in captions]
    if without_captions:
        raise InputError(f"{len(without_captions)} images of {origin} have no captions in {source}, the first being "
                         f"{without_captions[0]!r}: add their captions or remove them from the list")
    print(f"splits: {origin}; {len(captions) - len(splits)} captioned images of {source.name} belong to no split")
    return checked_records([
        make_record(name, name, split, [interned_tokens(text) for text in captions[name]], captions[name], source)
        for name, split in splits.items()], source)


def _read_tokens(path):
    """Captions {image: [caption]} of lines "<image>#<number><tab><caption>"."""
    captions = defaultdict(list)
    for number, line in enumerate(_lines(path), 1):
        match = re.fullmatch(r"([^\t]+)#\d+\t(.*)", line)
        if not match:
            raise InputError(f"line {number} of {path} must consist of <image>#<number>, a tab and a caption: correct "
                             "the line")
        captions[match[1]].append(match[2])
    return captions


def _read_kaggle(path):
    """Captions {image: [caption]} of comma-separated values with the header "image,caption"."""
    captions = defaultdict(list)
    try:
        rows = list(csv.reader(_lines(path), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as comma-separated values ({error}): put captions that contain quotes "
                         "or commas in double quotes") from error
    if not rows or rows[0] != ["image", "caption"]:
        raise InputError(f"the first line of {path} must be 'image,caption': is it the right file?")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2:
            raise InputError(f"row {number} of {path} has {len(row)} fields in place of an image and a caption: put "
                             "captions that contain commas in double quotes")
        captions[row[0]].append(row[1])
    return captions


def _read_splits(folder, karpathy_json, captions, seed):
    """Returns {image: split}, and where the splits come from."""
    if karpathy_json:
        return {record.name: record.split for record in read_karpathy(karpathy_json)}, karpathy_json
    if any((folder / name).exists() for name in LISTS.values()):
        splits = {}
        for split, file_name in LISTS.items():
            for name in filter(None, map(str.strip, _lines(folder / file_name))):
                if name in splits:
                    raise InputError(f"the image {name!r} of {folder / file_name} is already listed in "
                                     f"{LISTS[splits[name]]}: remove it from one of the lists")
                splits[name] = split
        return splits, "Flickr_8k.{train,dev,test}Images.txt"
    names = sorted(captions)
    random.Random(seed).shuffle(names)
    part = len(names) // 8      # the proportions of the official splits
    chosen = dict.fromkeys(names[:part], "val") | dict.fromkeys(names[part:2 * part], "test")
    return ({name: chosen.get(name, "train") for name in sorted(captions)},
            f"random ({'/'.join(SPLITS)} 6:1:1, --seed {seed}), as {folder} contains no list of images")


def _lines(path):
    check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} cannot be read ({reason}): check the path, or download the file again") from error
