"""Bounding boxes of the objects in images: COCO's instances_*.json and the layout of COCOvalEntities.json."""
from pathlib import Path

from captioning.data.annotations import checked_items
from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import read_json

MAX_SIDE = 1_000_000    # pixels; larger sizes and coordinates are treated as errors


def read_boxes(annotation_folder, records):
    """Returns the boxes of the records' images from all instances_*.json of the folder, laid out as by `coco_boxes`."""
    names, boxes = {record.name for record in records}, {}
    for path in sorted(Path(annotation_folder).glob("instances_*.json")):
        boxes |= coco_boxes(path, read_json(path, ["images", "annotations", "categories"]), names)
    return boxes


def coco_boxes(path, content, wanted=None):
    """Converts COCO's instances_*.json to the layout of COCOvalEntities.json (docs/method.md, section 8).

    Returns {file name: {"categories": {name: id}, "bbox": {id: [[x0, y0, x1, y1], …]}, "shape": [w, h],
    "resize_ratio": [224/w, 224/h]}}, in pixels, for the images named in `wanted` (default: all), without crowds and
    without boxes that have no area, which are counted in one printed sentence.

    content: the parsed JSON of `path`; invalid content raises InputError.
    """
    category_names = {category["id"]: category["name"] for category in
                      checked_items(content["categories"], {"id": int, "name": str}, path, "categories")}
    boxes, entries, empty = {}, {}, 0
    keys = {"id": int, "file_name": str, "width": int, "height": int}
    for image in checked_items(content["images"], keys, path, "images"):
        size = [image["width"], image["height"]]
        if not 0 < min(size) <= max(size) <= MAX_SIDE:
            raise InputError(f"{path} gives {image['file_name']!r} a size of {size[0]}×{size[1]} pixels: correct the "
                             "file")
        if wanted is None or image["file_name"] in wanted:
            entries[image["id"]] = boxes[image["file_name"]] = {
                "categories": {}, "bbox": {}, "shape": size, "resize_ratio": [224 / side for side in size]}
    keys = {"image_id": int, "category_id": int, "bbox": list}
    for annotation in checked_items(content["annotations"], keys, path, "annotations"):
        entry = entries.get(annotation["image_id"])
        if entry is None or annotation.get("iscrowd"):
            continue
        category, bbox = annotation["category_id"], annotation["bbox"]
        if category not in category_names or len(bbox) != 4 or not all(map(_is_coordinate, bbox)) or min(bbox[2:]) < 0:
            raise InputError(f"{path} contains a box of image id {annotation['image_id']} without a known category or "
                             "four numbers: its 'bbox' must be x, y, width, height in pixels")
        x, y, w, h = bbox
        corners = [x, y, round(x + w, 2), round(y + h, 2)]
        if not _has_area(corners):
            empty += 1
            continue
        entry["categories"][category_names[category]] = category
        entry["bbox"].setdefault(str(category), []).append(corners)
    _report_empty(path, empty)
    return boxes


def load_boxes(path):
    """Loads boxes {file name: {"categories", "bbox", "shape"}} from a file in the layout of COCOvalEntities.json, or
    from COCO's instances_*.json; raises InputError for anything else. Boxes without area are left out as by
    `coco_boxes`."""
    boxes = read_json(path)
    if not isinstance(boxes, dict):
        raise InputError(f"{path} must contain an object {{file name: boxes}}")
    is_coco = {"images", "annotations", "categories"} <= boxes.keys()
    if not boxes or is_coco and not boxes["images"]:
        raise InputError(f"{path} contains no boxes: give another file")
    if is_coco:
        return coco_boxes(path, boxes)
    for name, entry in boxes.items():
        if not _is_valid_entry(entry):
            raise InputError(f"{path} has no valid boxes for {name!r}: it needs 'categories', {{name: id}}, 'bbox', "
                             "{id: [[x0, y0, x1, y1], …]} with x0 ≤ x1 and y0 ≤ y1, and 'shape', [width, height], in "
                             "pixels")
    _report_empty(path, sum(map(_remove_empty, boxes.values())))
    return boxes


def named_boxes(entry, width, height):
    """The objects of an entry of `load_boxes` as ([name, …], [[x0, y0, x1, y1], …]), in pixels of the image of
    width × height, which need not have the entry's size."""
    scale = [width / entry["shape"][0], height / entry["shape"][1]] * 2
    objects = [(name, [factor * value for factor, value in zip(scale, corners, strict=True)])
               for name, category in entry["categories"].items() for corners in entry["bbox"].get(str(category), [])]
    return [name for name, _ in objects], [corners for _, corners in objects]


def _has_area(corners):
    return corners[0] < corners[2] and corners[1] < corners[3]


def _remove_empty(entry):
    """Removes boxes without area, and categories that have no other box, from an entry; returns the number of boxes."""
    count = 0
    for name, category in list(entry["categories"].items()):
        corners = entry["bbox"][str(category)]
        entry["bbox"][str(category)] = kept = [box for box in corners if _has_area(box)]
        count += len(corners) - len(kept)
        if not kept:
            del entry["categories"][name]
    return count


def _report_empty(path, count):
    if count:
        print(f"{path}: {count} {'box' if count == 1 else 'boxes'} without area left out, as they outline no object",
              flush=True)


def _is_coordinate(value):
    return type(value) in (int, float) and abs(value) <= MAX_SIDE


def _is_valid_entry(entry):
    """Whether an entry has the layout of `coco_boxes`: names with words, and at least one box for each category."""
    kinds = {"categories": dict, "bbox": dict, "shape": list}
    if not (isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())):
        return False
    lists = [entry["bbox"].get(str(category)) for category in entry["categories"].values()]
    return (len(entry["shape"]) == 2 and all(_is_coordinate(side) and side > 0 for side in entry["shape"])
            and all(map(tokenise, entry["categories"]))
            and all(isinstance(boxes, list) and boxes and all(map(_is_box, boxes)) for boxes in lists))


def _is_box(corners):
    return (isinstance(corners, list) and len(corners) == 4 and all(map(_is_coordinate, corners))
            and corners[0] <= corners[2] and corners[1] <= corners[3])
