"""Reads captions made elsewhere, and references that are no prepared data set."""
from collections import defaultdict

from captioning.data.annotations import coco_captions, is_a, trailing_number
from captioning.errors import InputError
from captioning.files import read_json

FORMS = "{\"image\": file name, \"caption\": text} or {\"image_id\": number, \"caption\": text}"


def read_references(path):
    """Of a COCO captions file: {file name: its sentences} and {image id: file name}, of the images that have any."""
    images, sentences = coco_captions(path)
    ids = {image["id"]: image["file_name"] for image in images if sentences[image["id"]]}
    references = {name: sentences[number] for number, name in ids.items()}
    if len(references) < len(ids):
        raise InputError(f"{path} gives two of its images the same file name")
    if not references:
        raise InputError(f"{path} has no captions: is it COCO's captions_*.json?")
    return references, ids


def image_ids(names):
    """{COCO's image id: file name}, the id being the number that the name ends with, unless two end with it."""
    found = defaultdict(list)
    for name in names:
        found[trailing_number(name)].append(name)
    return {number: there[0] for number, there in found.items() if len(there) == 1}


def read_predictions(path, names, ids, partial=False):
    """{file name: caption} in the order of `names`: one for each, or for some if `partial`; else an InputError.

    The file has a list of {"image": file name, "caption"} or, as COCO's results have it, {"image_id", "caption"}; ids:
    {image id: file name}.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} must hold a list of {FORMS}")
    known, captions = set(names), {}
    for number, item in enumerate(content):
        named = isinstance(item, dict) and "image" in item
        key = item.get("image" if named else "image_id") if isinstance(item, dict) else None
        if not is_a(str if named else int, key) or not is_a(str, item.get("caption")):
            raise InputError(f"{path} must hold a list of {FORMS}: number {number} is something else")
        name = key if named else ids.get(key)
        if name not in known:
            raise InputError(f"{path} has a caption for {key}, which is not among the {len(names)} pictures to score: "
                             "remove it, or check --dataset, --split and --references")
        if name in captions:
            raise InputError(f"{path} has more than one caption for {key}: leave one")
        captions[name] = item["caption"]
    missing = [name for name in names if name not in captions]
    if missing and not partial:
        raise InputError(f"{path} lacks {len(missing)} of {len(names)} pictures: {missing[0]} has no caption; add "
                         "them, or score the others alone with --partial")
    return {name: captions[name] for name in names if name in captions}
