"""Writes the demo data set: images, masks, boxes and object words.

An image depends only on (seed, split, number), not on the number of images or workers.
"""
import io
import multiprocessing
import signal
from functools import partial

import h5py
import numpy as np
from tqdm import tqdm

from captioning.data.annotations import SPLITS, Record
from captioning.data.demo.drawing import paint, sprite
from captioning.data.demo.scenes import CATEGORIES, PAIRS, describe, sample_scene
from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import atomic_path, make_folder, remove_leftovers, write_json


def generate(folder, sizes=(4000, 500, 500), seed=1, bias=0.95, test_bias=0.5, image_size=112, workers=2):
    """Writes images/, masks_demo.hdf5, boxes_demo.json and objects_demo.json to `folder`; returns the images' Records.

    Args:
        sizes: number of images of the training, validation and test split.
        bias: probability that the first object of a pair (a dog) is accompanied by the second (a ball) in the training
            and validation split; test_bias: in the test split.
        image_size: side of the images in pixels.
        workers: processes that draw images; below 2, the calling process draws them.

    Raises InputError for invalid arguments, and if a file cannot be written.
    """
    _check(sizes, seed, bias, test_bias, image_size)
    folder = make_folder(folder)
    remove_leftovers(make_folder(folder / "images"))
    sprite("dog", None)     # raises before any work if the package of the emoji is missing
    records, boxes = [], {}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as masks:
        masks.attrs["categories"] = list(CATEGORIES)
        for split, size in zip(SPLITS, sizes, strict=True):
            split_bias = test_bias if split == "test" else bias
            draw = partial(_draw_one, folder / "images", split, seed, split_bias, image_size)
            all_masks = np.zeros((size, image_size, image_size), np.uint8)
            all_things = np.zeros((size, 6), np.uint8)
            for i, (record, entry, mask, things) in enumerate(_map(draw, size, workers, split)):
                records.append(record)
                boxes[record.name] = entry
                all_masks[i], all_things[i, :len(things)] = mask, things
            masks.create_dataset(f"{split}/masks", data=all_masks, compression="gzip", compression_opts=1)
            masks.create_dataset(f"{split}/things", data=all_things)
    with atomic_path(folder / "masks_demo.hdf5") as temporary:
        temporary.write_bytes(buffer.getbuffer())
    write_json(folder / "boxes_demo.json", boxes)
    write_json(folder / "objects_demo.json", {
        "words": {word: name for name, (_, nouns, plurals, _) in CATEGORIES.items() for word in nouns + plurals},
        "biased": list(PAIRS.values()), "pairs": [list(pair) for pair in PAIRS.items()]})
    return records


def _check(sizes, seed, bias, test_bias, image_size):
    if len(sizes) != len(SPLITS) or min(sizes) < 1:
        raise InputError(f"the demo's sizes {tuple(sizes)} must be three positive numbers of images: train, val, test")
    if seed < 0:
        raise InputError(f"the demo's seed {seed} must not be negative")
    for name, value in (("bias", bias), ("test_bias", test_bias)):
        if not 0 <= value <= 1:
            raise InputError(f"the demo's {name} {value} must lie between 0 and 1")
    if image_size < 48:     # objects of smaller images cannot be recognised
        raise InputError(f"the demo's image_size {image_size} must be at least 48 pixels")


def _map(draw, size, workers, split):
    bar = partial(tqdm, desc=f"drawing {split}", total=size, unit="image")
    if workers < 2:
        yield from bar(map(draw, range(size)))
        return
    # Ctrl-C reaches every process of a terminal: this one alone stops the others
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)      # which new processes inherit
    pool = multiprocessing.get_context("spawn").Pool(workers)
    signal.signal(signal.SIGINT, handler)
    with pool:
        yield from bar(pool.imap(draw, range(size), chunksize=32))


def _draw_one(folder, split, seed, bias, image_size, number):
    """Draws image `number` of a split; returns (Record, boxes, mask (H, W), category numbers of its objects)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    name = f"{split}_{number:05d}.png"
    while True:     # until every object is mostly visible
        scene = sample_scene(rng, bias)
        image, mask, visible = paint(scene, image_size, rng)
        if min(visible) >= 0.6:
            break
    captions = describe(scene, rng)
    with atomic_path(folder / name, sync=False) as temporary:
        image.save(temporary, "PNG")
    names = list(CATEGORIES)
    entry = {"categories": {}, "bbox": {}, "shape": [image_size] * 2, "resize_ratio": [224 / image_size] * 2}
    for k, thing in enumerate(scene.things, start=1):
        rows, columns = np.nonzero(mask == k)
        category_id = names.index(thing.category) + 1
        entry["categories"][thing.category] = category_id
        entry["bbox"].setdefault(str(category_id), []).append(
            [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])
    record = Record(name, name, split, [tokenise(caption) for caption in captions], captions)
    return record, entry, mask, [names.index(thing.category) + 1 for thing in scene.things]
