"""Writes the demo data set: images, masks, boxes and object words.

An image depends only on (seed, split, number), not on the number of images or workers."""
import io
from functools import partial
from itertools import chain

import h5py
import numpy as np
import torch
from tqdm import tqdm

from captioning.data.annotations import SPLITS, make_record
from captioning.data.demo.drawing import paint, sprite
from captioning.data.demo.scenes import CATEGORIES, PAIRS, describe, sample_scene
from captioning.data.loader import make_loader
from captioning.files import atomic_path, make_folder, remove_leftovers, write_bytes, write_json

NAMES = list(CATEGORIES)
BATCH = 32      # images that a process draws at a time


def generate(folder, sizes=(4000, 500, 500), seed=1, bias=0.95, test_bias=0.5, image_size=112,
             workers=2):
    """Writes images/, masks_demo.hdf5, boxes_demo.json and objects_demo.json to `folder`; returns
    the images' Records.

    sizes: number of images of each split. bias: probability that the first object of a pair (a
    dog) comes with the second (a ball); test_bias: in the test split. image_size: in pixels.
    workers: processes that draw images; if 0, the calling process draws them."""
    folder = make_folder(folder)
    remove_leftovers(make_folder(folder / "images"))
    sprite("dog", None)     # raises before any work if the package of the emoji is missing
    records, boxes = [], {}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["categories"] = NAMES
        for split, size in zip(SPLITS, sizes, strict=True):
            settings = (folder / "images", split, seed, test_bias if split == "test" else bias,
                        image_size)
            batches = [range(size)[start:start + BATCH] for start in range(0, size, BATCH)]
            drawn = chain.from_iterable(make_loader(
                range(size), batches, workers, torch.device("cpu"), partial(_draw, settings)))
            masks = np.zeros((size, image_size, image_size), np.uint8)
            things = np.zeros((size, 6), np.uint8)
            bar = tqdm(drawn, f"drawing {split}", size, unit="image")
            for i, (record, entry, mask, numbers) in enumerate(bar):
                records.append(record)
                boxes[record.name] = entry
                masks[i] = mask
                things[i, :len(numbers)] = numbers
            file.create_dataset(f"{split}/masks", data=masks, compression="gzip",
                                compression_opts=1)
            file.create_dataset(f"{split}/things", data=things)
    write_bytes(folder / "masks_demo.hdf5", buffer.getbuffer())
    write_json(folder / "boxes_demo.json", boxes)
    words = {}
    for name, (_, nouns, plurals, _) in CATEGORIES.items():
        words |= dict.fromkeys(nouns + plurals, name)
    write_json(folder / "objects_demo.json", {"words": words, "biased": list(PAIRS.values()),
                                              "pairs": list(PAIRS.items())})
    return records


def _draw(settings, numbers):
    return [_draw_one(*settings, number) for number in numbers]


def _draw_one(folder, split, seed, bias, image_size, number):
    """Draws image `number` of a split -> Record, boxes, mask (H, W), numbers of its categories."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    name = f"{split}_{number:05d}.png"
    while True:     # until every object is mostly visible
        scene = sample_scene(rng, bias)
        image, mask, visible = paint(scene, image_size, rng)
        if min(visible) >= 0.6:
            break
    record = make_record(name, name, split, describe(scene, rng))
    with atomic_path(folder / name, sync=False) as temporary:
        image.save(temporary, "PNG")

    # exact boxes of what is visible of each object
    numbers = [NAMES.index(thing.category) + 1 for thing in scene.things]
    entry = {"categories": {}, "bbox": {}, "shape": [image_size] * 2,
             "resize_ratio": [224 / image_size] * 2}
    for k, number in enumerate(numbers, start=1):
        rows, columns = np.nonzero(mask == k)
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        entry["categories"][NAMES[number - 1]] = number
        entry["bbox"].setdefault(str(number), []).append([int(value) for value in corners])
    return record, entry, mask, numbers
