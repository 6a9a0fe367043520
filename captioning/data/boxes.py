"""Bounding boxes of the objects in images: COCO's instances_*.json and COCOvalEntities.json."""
from pathlib import Path

from captioning.data.annotations import CORRECT, checked_items
from captioning.data.vocabulary import tokenise
from captioning.files import expect, read_json, reading

MAX_SIDE = 1_000_000    # pixels; larger sizes and coordinates are errors
COCO_KEYS = ("images", "annotations", "categories")


def read_boxes(annotation_folder, records):
    """The `coco_boxes` of the records' images, from all instances_*.json of a folder."""
    names = {record.name for record in records}
    boxes = {}
    for path in sorted(Path(annotation_folder).glob("instances_*.json")):
        boxes |= coco_boxes(path, read_json(path), names)
    return boxes


def load_boxes(path):
    """`coco_boxes` of a file in the layout of COCOvalEntities.json or of instances_*.json.

    Names of categories become lower-case, as object words are."""
    boxes = read_json(path)
    with reading(path, "give boxes in pixels as docs/data.md describes them"):
        expect(isinstance(boxes, dict), "it is no object {file name: boxes}")
        is_coco = boxes.keys() >= set(COCO_KEYS)
        expect(boxes["images"] if is_coco else boxes, "it contains no boxes")
        if is_coco:
            return coco_boxes(path, boxes)
        for name, entry in boxes.items():
            expect(_is_valid(entry), f"it has no valid 'categories', 'bbox' and 'shape' of "
                                     f"{name!r}")
            names = {category.lower(): i for category, i in entry["categories"].items()}
            expect(len(names) == len(entry["categories"]), f"{name!r} names a category twice")
            entry["categories"] = names
        _remove_empty(path, boxes)
    return boxes


def coco_boxes(path, content, wanted=None):
    """Converts the `content` of COCO's instances_*.json to the layout of COCOvalEntities.json
    (docs/method.md, section 8), without crowds and without boxes that have no area.

    {file name: {"categories": {name: id}, "bbox": {id: [[x0, y0, x1, y1], …]}, "shape": [w, h],
    "resize_ratio": [224/w, 224/h]}}, in pixels, of the images `wanted` (default: all)."""
    boxes, entries = {}, {}
    with reading(path, CORRECT):
        keys = {"id": int, "file_name": str, "width": int, "height": int}
        for image in checked_items(content["images"], keys, "images"):
            size = [image["width"], image["height"]]
            name = image["file_name"]
            expect(0 < min(size) <= max(size) <= MAX_SIDE, f"{name!r} has {size[0]}×{size[1]} "
                                                           "pixels")
            if wanted is None or name in wanted:
                entry = {"categories": {}, "bbox": {}, "shape": size}
                entry["resize_ratio"] = [224 / side for side in size]
                entries[image["id"]] = boxes[name] = entry

        names = {category["id"]: category["name"].lower() for category in
                 checked_items(content["categories"], {"id": int, "name": str}, "categories")}
        keys = {"image_id": int, "category_id": int, "bbox": list}
        for annotation in checked_items(content["annotations"], keys, "annotations"):
            entry = entries.get(annotation["image_id"])
            if entry is None or annotation.get("iscrowd"):
                continue
            category = annotation["category_id"]
            x, y, w, h = annotation["bbox"]
            if category not in names or not _is_box([x, y, x + w, y + h]):
                raise ValueError(f"image id {annotation['image_id']} has a box without a known "
                                 "category or x, y, width, height in pixels")
            entry["categories"][names[category]] = category
            corners = [x, y, round(x + w, 2), round(y + h, 2)]
            entry["bbox"].setdefault(str(category), []).append(corners)
        _remove_empty(path, boxes)
    return boxes


def named_boxes(entry, width, height):
    """The objects of an entry of `load_boxes` as ([name, …], [[x0, y0, x1, y1], …]), in pixels of
    the image of width × height, which need not have the entry's size."""
    scale = [width / entry["shape"][0], height / entry["shape"][1]] * 2
    names, boxes = [], []
    for name, category in entry["categories"].items():
        for corners in entry["bbox"].get(str(category), []):
            names.append(name)
            boxes.append([factor * value for factor, value in zip(scale, corners, strict=True)])
    return names, boxes


def _is_valid(entry):
    """Whether an entry has the layout of `coco_boxes`, and each category a word and boxes."""
    width, height = entry["shape"]
    boxes = [entry["bbox"][str(category)] for category in entry["categories"].values()]
    return (0 < min(width, height) <= max(width, height) <= MAX_SIDE
            and all(map(tokenise, entry["categories"])) and all(boxes)
            and all(_is_box(corners) for group in boxes for corners in group))


def _is_box(corners):
    x0, y0, x1, y1 = corners
    are_numbers = all(type(value) in (int, float) and abs(value) <= MAX_SIDE for value in corners)
    return are_numbers and x0 <= x1 and y0 <= y1


def _remove_empty(path, boxes):
    """Removes boxes without area, which outline no object, and prints their number."""
    count = 0
    for entry in boxes.values():
        for name, category in list(entry["categories"].items()):
            corners = entry["bbox"].pop(str(category), [])
            kept = [box for box in corners if box[0] < box[2] and box[1] < box[3]]
            count += len(corners) - len(kept)
            if kept:
                entry["bbox"][str(category)] = kept
            else:
                del entry["categories"][name]
    if count:
        print(f"{path}: {count} {'box' if count == 1 else 'boxes'} without area left out",
              flush=True)
