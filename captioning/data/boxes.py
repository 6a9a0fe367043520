"""Boxes of the objects in images: COCO instances and the layout of COCOvalEntities.json."""
from pathlib import Path

from captioning.data.annotations import checked_items
from captioning.errors import InputError
from captioning.files import read_json

MAX_SIDE = 1_000_000    # pixels; what is beyond is no picture's


def read_boxes(annotation_folder, records):
    """Boxes of the records' images from all instances_*.json of the folder, as coco_boxes gives them."""
    wanted, boxes = {record.name for record in records}, {}
    for path in sorted(Path(annotation_folder).glob("instances_*.json")):
        boxes |= coco_boxes(path, read_json(path, ["images", "annotations", "categories"]), wanted)
    return boxes


def coco_boxes(path, content, wanted=None):
    """Boxes of COCO's instances_*.json, of the images named in `wanted` or all, in the layout of COCOvalEntities.json.

    {file name: {"categories": {name: id}, "bbox": {id: [[x0, y0, x1, y1], …]}, "shape": [w, h],
    "resize_ratio": [224/w, 224/h]}}, in pixels; crowds are left out.
    """
    names = {category["id"]: category["name"] for category in
             checked_items(content["categories"], {"id": int, "name": str}, path, "categories")}
    boxes, entries = {}, {}
    keys = {"id": int, "file_name": str, "width": int, "height": int}
    for image in checked_items(content["images"], keys, path, "images"):
        size = [image["width"], image["height"]]
        if not 0 < min(size) <= max(size) <= MAX_SIDE:
            raise InputError(f"{path} says that {image['file_name']!r} measures {size[0]}×{size[1]} pixels")
        if wanted is None or image["file_name"] in wanted:
            entries[image["id"]] = boxes[image["file_name"]] = {
                "categories": {}, "bbox": {}, "shape": size, "resize_ratio": [224 / side for side in size]}
    keys = {"image_id": int, "category_id": int, "bbox": list}
    for annotation in checked_items(content["annotations"], keys, path, "annotations"):
        entry = entries.get(annotation["image_id"])
        if entry is None or annotation.get("iscrowd"):
            continue
        category, corners = annotation["category_id"], annotation["bbox"]
        if category not in names or len(corners) != 4 or not all(map(_is_coordinate, corners)) or (
                min(corners[2:]) < 0):
            raise InputError(f"{path} has a box of image id {annotation['image_id']} without a known category or "
                             "four numbers: its 'bbox' must be x, y, width, height in pixels")
        x, y, w, h = corners
        entry["categories"][names[category]] = category
        entry["bbox"].setdefault(str(category), []).append([x, y, round(x + w, 2), round(y + h, 2)])
    return boxes


def _is_coordinate(value):
    return isinstance(value, int | float) and abs(value) <= MAX_SIDE


def load_boxes(path):
    """Boxes {file name: {"categories", "bbox", "shape"}} of a file in the layout of COCOvalEntities.json, or of COCO's
    instances_*.json."""
    boxes = read_json(path)
    if isinstance(boxes, dict) and {"images", "annotations", "categories"} <= boxes.keys():
        return coco_boxes(path, boxes)
    if not isinstance(boxes, dict):
        raise InputError(f"{path} must hold an object {{file name: boxes}}")
    for name, entry in boxes.items():
        try:
            sound = min(entry["shape"]) > 0 and all(len(corners) == 4 for number in entry["categories"].values()
                                                    for corners in entry["bbox"][str(number)])
        except (KeyError, TypeError, AttributeError, ValueError):
            sound = False
        if not sound:
            raise InputError(f"{path} has no proper boxes for {name}: it needs categories, bbox and shape")
    return boxes
