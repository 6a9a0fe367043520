"""Reads captions computed by other software, and references without a prepared data set."""
import re
from collections import defaultdict
from pathlib import PurePosixPath

from captioning.data.annotations import coco_captions, plain_id, trailing_number
from captioning.errors import InputError
from captioning.files import read_json

FORMATS = ('a list of {"image": file name, "caption": text} or {"image_id": number, "caption": '
           'text}, or {file name or number: text}')
KEYS = ("image", "file_name", "image_id")
COCO_NAME = re.compile(r"COCO_(train|val|test)20\d\d_\d{12}")


class ImageNames:
    """Finds images by what files of other systems call them.

    names: their file names. ids: {`plain_id`: file name}, by default the number at the end of the
    stem. A file is found by its name, with or without folders and ending, and 42.jpg also by COCO's
    name for it, COCO_val2014_000000000042.jpg. A key that fits several files finds none."""

    def __init__(self, names, ids=None):
        self.names = set(names)
        found = defaultdict(set)
        for name in names:
            path = PurePosixPath(name)
            number = trailing_number(name)
            keys = [path.name, plain_id(path.stem)]
            if path.stem.isdigit():
                keys.append(("COCO", number))
            if ids is None:
                keys += [("stem", path.stem)] + [str(number)] * (number is not None)
            for key in keys:
                found[key].add(name)
        for image_id, name in (ids or {}).items():
            found[image_id].add(name)
        self.others = {key: min(same) for key, same in found.items() if len(same) == 1}

    def find(self, key):
        """The file name of an image, or None. key: a file name or number, as text or number."""
        if key in self.names:
            return key
        path = PurePosixPath(str(key).replace("\\", "/"))
        for form in (("stem", path.stem), plain_id(key), path.name, plain_id(path.stem)):
            if form in self.others:
                return self.others[form]
        number = trailing_number(path.name)
        if str(number) in self.names:       # of references without file names
            return str(number)
        return self.others.get(("COCO", number)) if COCO_NAME.fullmatch(path.stem) else None


def read_references(path):
    """{file name: captions} of the images with captions in a COCO captions file or one of its
    relatives, and the ImageNames of all its images."""
    names, captions = coco_captions(path)
    if len(set(names.values())) < len(names):
        raise InputError(
            f"{path} contains two images with the same file name: correct the file")
    references = {name: captions[image_id] for image_id, name in names.items()
                  if captions[image_id]}
    if not references:
        raise InputError(f"{path} has no captions: give COCO's captions_*.json")
    return references, ImageNames(names.values(), names)


def read_predictions(path, names, images=None, partial=False, others=False):
    """{file name: caption} in the order of `names`, from a file in one of FORMATS.

    names: of the images to score, all of which need a caption unless `partial` is set; images:
    ImageNames of these, and perhaps of others, whose captions are left out; others: leave out
    captions of unknown images, too.
    """
    images = images or ImageNames(names)
    captions = {}
    for number, (keys, caption) in enumerate(_captions(path)):
        found = {images.find(key) for key in keys} - {None}
        shown = " and ".join(map(str, keys))
        if len(found) > 1:
            raise InputError(f"{path} has a caption, number {number}, for {shown}, which are "
                             "different images: correct it")
        if not found and not others:
            raise InputError(f"{path} has a caption for {shown}, which is not among the "
                             f"{len(names)} images to score: remove it, or check --dataset, "
                             "--split and --references")
        for name in found:
            if name in captions:
                raise InputError(f"{path} has more than one caption for {name}: keep one")
            captions[name] = caption
    missing = [name for name in names if name not in captions]
    if missing and not partial:
        raise InputError(f"{path} lacks captions for {len(missing)} of {len(names)} images: "
                         f"{missing[0]} has no caption; add them, or "
                         + ("explain the other images only" if others
                            else "score the other images with --partial"))
    return {name: captions[name] for name in names if name in captions}


def _captions(path):
    """Yields (what names the image, caption) of each item of a file in one of FORMATS, also as
    JSON Lines."""
    content = read_json(path, lines=True)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    elif isinstance(content, dict) and "caption" in content:
        content = [content]
    elif isinstance(content, dict):
        content = [{"image": key, "caption": caption} for key, caption in content.items()]
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} must contain {FORMATS}")
    for number, item in enumerate(content):
        item = item if isinstance(item, dict) else {}
        keys = [item[key] for key in KEYS if plain_id(item.get(key))]
        caption = item.get("caption")
        if isinstance(caption, list) and len(caption) == 1:
            caption = caption[0]
        if not keys or not isinstance(caption, str):
            raise InputError(f"{path} must contain {FORMATS}, but number {number} is not of this "
                             "form")
        yield keys, caption
