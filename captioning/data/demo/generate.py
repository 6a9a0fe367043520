"""Writes the demo data set."""
import io
import multiprocessing
from functools import partial

import h5py
import numpy as np
from tqdm import tqdm

from captioning.data.annotations import SPLITS, Record
from captioning.data.demo.drawing import _sprite, paint
from captioning.data.demo.scenes import CATEGORIES, PAIRS, describe, sample_scene
from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.files import atomic_path, make_folder, write_json


def generate(folder, sizes=(4000, 500, 500), seed=1, bias=0.95, test_bias=0.5, image_size=112, workers=2):
    """Writes the pictures, masks_demo.hdf5, boxes_demo.json and objects_demo.json; returns their Records.

    bias: how often the first object of a pair (a dog) comes with the second (a ball) in the training and validation
    splits; test_bias: in the test split. sizes: pictures of each split; image_size: their side in pixels.
    """
    _check(sizes, seed, bias, test_bias, image_size)
    folder = make_folder(folder)
    make_folder(folder / "images")
    _sprite("dog", None)    # says early if the package is missing
    records, boxes = [], {}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as masks:
        masks.attrs["categories"] = list(CATEGORIES)
        for split, size in zip(SPLITS, sizes, strict=True):
            own_bias = test_bias if split == "test" else bias
            draw = partial(_draw_one, folder / "images", split, seed, own_bias, image_size)
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
        raise InputError(f"the demo's sizes {tuple(sizes)} must be three numbers of pictures: train, val, test")
    if seed < 0:
        raise InputError(f"the demo's seed {seed} must not be negative")
    for name, value in (("bias", bias), ("test_bias", test_bias)):
        if not 0 <= value <= 1:
            raise InputError(f"the demo's {name} {value} must lie between 0 and 1")
    if image_size < 48:     # smaller, the objects cannot be told
        raise InputError(f"the demo's image_size {image_size} must be at least 48 pixels")


def _map(draw, size, workers, split):
    bar = partial(tqdm, desc=f"drawing {split}", total=size, unit="picture")
    if workers < 2:
        yield from bar(map(draw, range(size)))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from bar(pool.imap(draw, range(size), chunksize=32))


def _draw_one(folder, split, seed, bias, image_size, number):
    """Picture `number` of a split -> (Record, boxes, mask (H, W), category numbers of its things)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    name = f"{split}_{number:05d}.png"
    while True:     # until every object is mostly visible
        scene = sample_scene(rng, bias)
        picture, mask, visible = paint(scene, image_size, rng)
        if min(visible) >= 0.6:
            break
    sentences = describe(scene, rng)
    with atomic_path(folder / name, sync=False) as temporary:
        picture.save(temporary, "PNG")
    names = list(CATEGORIES)
    entry = {"categories": {}, "bbox": {}, "shape": [image_size] * 2, "resize_ratio": [224 / image_size] * 2}
    for k, thing in enumerate(scene.things, start=1):
        rows, columns = np.nonzero(mask == k)
        category_id = names.index(thing.category) + 1
        entry["categories"][thing.category] = category_id
        entry["bbox"].setdefault(str(category_id), []).append(
            [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])
    record = Record(name, name, split, [tokenise(sentence) for sentence in sentences], sentences)
    return record, entry, mask, [names.index(thing.category) + 1 for thing in scene.things]
