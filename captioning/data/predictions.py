"""Reads captions computed by other software, and references that are not part of a prepared data set."""
from collections import defaultdict

from captioning.data.annotations import coco_captions, has_type, trailing_number
from captioning.errors import InputError
from captioning.files import read_json

FORMATS = "{\"image\": file name, \"caption\": text} or {\"image_id\": number, \"caption\": text}"


def read_references(path):
    """Returns {file name: captions} and {image id: file name} of a COCO captions file, for images with captions."""
    images, captions = coco_captions(path)
    ids = {image["id"]: image["file_name"] for image in images if captions[image["id"]]}
    references = {name: captions[image_id] for image_id, name in ids.items()}
    if len(references) < len(ids):
        raise InputError(f"{path} contains two images with the same file name: correct the file")
    if not references:
        raise InputError(f"{path} has no captions: give COCO's captions_*.json")
    return references, ids


def image_ids(names):
    """Returns {image id: file name}, where the id is the number at the end of the stem, without ambiguous ids."""
    names_by_id = defaultdict(list)
    for name in names:
        names_by_id[trailing_number(name)].append(name)
    return {image_id: candidates[0] for image_id, candidates in names_by_id.items() if len(candidates) == 1}


def read_predictions(path, names, ids, partial=False):
    """Returns {file name: caption} in the order of `names`, from a JSON list of captions.

    Args:
        path: a list of {"image": file name, "caption": text} or, as in COCO's results format, {"image_id": number,
            "caption": text}.
        names: file names of the images to score.
        ids: {image id: file name}.
        partial: accepts captions for only some of the images.

    Raises InputError for a malformed file, unknown images, more than one caption per image, and missing captions.
    """
    known_names, captions = set(names), {}
    for key, caption in _captions(path):
        name = key if isinstance(key, str) else ids.get(key)
        if name not in known_names:
            raise InputError(f"{path} has a caption for {key}, which is not among the {len(names)} images to score: "
                             "remove it, or check --dataset, --split and --references")
        if name in captions:
            raise InputError(f"{path} has more than one caption for {key}: keep one")
        captions[name] = caption
    missing = [name for name in names if name not in captions]
    if missing and not partial:
        raise InputError(f"{path} lacks captions for {len(missing)} of {len(names)} images: {missing[0]} has no "
                         "caption; add them, or score the other images with --partial")
    return {name: captions[name] for name in names if name in captions}


def read_captions_of(path, names):
    """Returns {file name: caption} for the images `names`, from a JSON list as in `read_predictions`; captions of other
    images are ignored. InputError for a malformed file and for images without a caption."""
    ids, captions = image_ids(names), {}
    for key, caption in _captions(path):
        captions[key if isinstance(key, str) else ids.get(key)] = caption
    missing = [name for name in names if name not in captions]
    if missing:
        raise InputError(f"{path} lacks captions for {len(missing)} of {len(names)} images, {missing[0]} first: add "
                         "them, or explain the other images only")
    return {name: captions[name] for name in names}


def _captions(path):
    """Yields (file name or image id, caption) of each item of a JSON list in one of the FORMATS."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} must contain a list of {FORMATS}")
    for number, item in enumerate(content):
        by_name = isinstance(item, dict) and "image" in item
        key = item.get("image" if by_name else "image_id") if isinstance(item, dict) else None
        if not has_type(key, str if by_name else int) or not has_type(item.get("caption"), str):
            raise InputError(f"{path} must contain a list of {FORMATS}, but number {number} is not of this form")
        yield key, item["caption"]
