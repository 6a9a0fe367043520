"""Reads captions computed by other software, and references without a prepared data set."""
from collections import defaultdict

from captioning.data.annotations import coco_captions, has_type, trailing_number
from captioning.errors import InputError
from captioning.files import read_json

FORMATS = ('{"image": file name, "caption": text} or '
           '{"image_id": number, "caption": text}')


def read_references(path):
    """{file name: captions} and {image id: file name} of the images with captions in a COCO
    captions file."""
    images, captions = coco_captions(path)
    ids = {image["id"]: image["file_name"] for image in images if captions[image["id"]]}
    references = {name: captions[image_id] for image_id, name in ids.items()}
    if len(references) < len(ids):
        raise InputError(
            f"{path} contains two images with the same file name: correct the file")
    if not references:
        raise InputError(f"{path} has no captions: give COCO's captions_*.json")
    return references, ids


def image_ids(names):
    """{image id: file name}, the id being the number at the end of the stem, without ambiguous ids.
    """
    names_of = defaultdict(list)
    for name in names:
        names_of[trailing_number(name)].append(name)
    return {number: same[0] for number, same in names_of.items() if len(same) == 1}


def read_predictions(path, names, ids, partial=False):
    """{file name: caption} in the order of `names`, from a JSON list of captions in one of FORMATS.

    names: of the images to score, all of which need a caption unless `partial` is set; ids: {image
    id: file name}.
    """
    known = set(names)
    captions = {}
    for key, caption in _captions(path):
        name = key if isinstance(key, str) else ids.get(key)
        if name not in known:
            raise InputError(f"{path} has a caption for {key}, which is not among the {len(names)} "
                             "images to score: remove it, or check --dataset, --split and "
                             "--references")
        if name in captions:
            raise InputError(f"{path} has more than one caption for {key}: keep one")
        captions[name] = caption
    missing = [name for name in names if name not in captions]
    if missing and not partial:
        raise InputError(f"{path} lacks captions for {len(missing)} of {len(names)} images: "
                         f"{missing[0]} has no caption; add them, or score the other images with "
                         "--partial")
    return {name: captions[name] for name in names if name in captions}


def read_captions_of(path, names):
    """{file name: caption} of the images `names`, from a JSON list of captions in one of FORMATS,
    which may have captions of other images as well."""
    ids = image_ids(names)
    captions = {key if isinstance(key, str) else ids.get(key): caption
                for key, caption in _captions(path)}
    missing = [name for name in names if name not in captions]
    if missing:
        raise InputError(f"{path} lacks captions for {len(missing)} of {len(names)} images, "
                         f"{missing[0]} first: add them, or explain the other images only")
    return {name: captions[name] for name in names}


def _captions(path):
    """Yields (file name or image id, caption) of each item of a JSON list in one of FORMATS."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} must contain a list of {FORMATS}")
    for number, item in enumerate(content):
        item = item if isinstance(item, dict) else {}
        key = "image" if "image" in item else "image_id"
        is_valid = has_type(item.get(key), str if key == "image" else int)
        if not is_valid or not has_type(item.get("caption"), str):
            raise InputError(f"{path} must contain a list of {FORMATS}, but number {number} is not "
                             "of this form")
        yield item[key], item["caption"]
