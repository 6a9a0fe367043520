"""Stores features of pictures, once for all: a CNN's, or bottom-up ones made elsewhere.

A file grows as <name>.partial, whose datasets have their final size from the start: killed at any moment it can still
be opened, and `done` says from where to go on.
"""
import base64
import csv
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioning import images
from captioning.annotations import trailing_number
from captioning.dataset import collate, fingerprint, open_hdf5
from captioning.errors import InputError

REGIONS = 36


class Pictures:
    """Pictures of a folder, batch by batch: (B, 3, S, S) normalised."""

    def __init__(self, folder, paths, size):
        self.folder, self.paths, self.size = folder, paths, size

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, indices):
        pictures = [images.resize(images.read_image(Path(self.folder, self.paths[i])), self.size) for i in indices]
        return images.normalise(torch.stack(pictures))


def store_cnn(path, records, image_folder, encoder, name, size, batch_size, workers, device):
    """Features (N, K, C) float16 of the records' pictures by `encoder`, to `path`; goes on where it stopped."""
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    pictures = Pictures(image_folder, [record.path for record in records], size)
    weights = sum(parameter.double().sum().item() for parameter in encoder.parameters())
    with torch.inference_mode():
        C, h, w = encoder(torch.zeros(1, 3, size, size, device=device)).shape[1:]
    attributes = {"encoder": name, "weights": f"{weights:.6e}", "size": size,
                  "names": fingerprint([record.name for record in records])}
    with _Store(path, len(records), (h * w, C), attributes) as store, torch.inference_mode():
        batches = [batch.tolist() for batch in torch.arange(store.done, len(records)).split(batch_size)]
        loader = DataLoader(pictures, batch_sampler=batches, collate_fn=collate, num_workers=min(workers, len(batches)))
        bar = tqdm(zip(batches, loader, strict=True), desc=Path(path).name, total=len(batches), unit="batch")
        for batch, pixels in bar:
            features = encoder(pixels.to(device)).flatten(2).transpose(1, 2)           # (B, K, C)
            store.write(batch[0], features.half().cpu().numpy())


def store_bottom_up(path, records, source):
    """Features (N, 36, 2048) float16 of a tsv or a folder of <file name>.hdf5, to `path`; fewer regions are padded."""
    attributes = {"encoder": "bottom_up", "names": fingerprint([record.name for record in records]),
                  "source": str(Path(source).resolve())}
    find = _folder_regions if Path(source).is_dir() else _tsv_regions
    by_name = {key: i for i, record in enumerate(records) for key in _names_of(record.name)}
    with _Store(path, len(records), (REGIONS, 2048), attributes, with_boxes=True) as store:
        missing = store.missing
        for names, features, boxes in tqdm(find(source, records), desc=Path(path).name, unit="image"):
            i = next((by_name[name] for name in names if name in by_name), None)
            if i not in missing:
                continue
            if features.shape[1:] != (2048,) or boxes.shape != (len(features), 4):
                raise InputError(f"{source} has features {features.shape} and boxes {boxes.shape} for {names[0]}: "
                                 "(regions, 2048) and (regions, 4) are expected")
            missing.remove(i)
            store.write(i, _padded(features)[None], _padded(boxes)[None])
        if missing:
            raise InputError(f"{source} has no features of {records[min(missing)].name} (and {len(missing) - 1} "
                             "other pictures)")


class _Store:
    """`features` (N, *shape) float16 and `done` (N,), complete when all are; a context manager."""

    def __init__(self, path, count, shape, attributes, with_boxes=False):
        self.path, self.partial, self.count = Path(path), Path(f"{path}.partial"), count
        self.shape, self.attributes, self.with_boxes = shape, attributes, with_boxes

    def __enter__(self):
        if self._fits(self.path):
            print(f"{self.path} is already there")
            self.file, self.done, self.missing = None, self.count, set()
            return self
        try:
            if not self._fits(self.partial):
                self._create()
            self.file = h5py.File(self.partial, "r+")
        except OSError as error:
            raise InputError(f"{self.partial} cannot be written ({error}): choose another --output_folder") from error
        flags = self.file["done"][:]
        self.missing = {int(i) for i in np.flatnonzero(flags == 0)}
        self.done = min(self.missing, default=self.count)
        if self.done:
            print(f"going on after {self.done} of {self.count} pictures in {self.partial}")
        return self

    def _create(self):
        with h5py.File(self.partial, "w") as file:
            self._dataset(file, "features", (self.count, *self.shape), np.float16)
            if self.with_boxes:
                self._dataset(file, "boxes", (self.count, self.shape[0], 4), np.float32)
            self._dataset(file, "done", (self.count,), np.uint8)
            file.attrs.update(self.attributes)

    def _dataset(self, file, name, shape, dtype):
        # all of its space at once: writing changes no metadata, so a killed process leaves a sound file
        plan, space = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5s.create_simple(shape)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plan)

    def _fits(self, path):
        if not path.exists():
            return False
        try:
            with open_hdf5(path, ("features", "done")) as file:
                return (dict(file.attrs) == self.attributes and file["features"].shape == (self.count, *self.shape)
                        and (path == self.partial or bool(file["done"][:].all())))
        except (InputError, OSError):
            return False

    def write(self, start, features, boxes=None):
        """features (B, *shape), boxes (B, K, 4) of the pictures from `start` on."""
        rows = slice(start, start + len(features))
        self.file["features"][rows] = features
        if boxes is not None:
            self.file["boxes"][rows] = boxes
        self.file.flush()
        self.file["done"][rows] = 1
        self.file.flush()

    def __exit__(self, kind, error, traceback):
        if self.file is None:
            return
        self.file.close()
        if kind is None:
            os.replace(self.partial, self.path)


def _names_of(name):
    """What a features file may call a picture: its file name, its stem, or the number at the stem's end."""
    number = trailing_number(name)
    return [name, Path(name).stem] + ([str(number)] if number is not None else [])


def _folder_regions(folder, records):
    for record in records:
        path = Path(folder) / f"{record.name}.hdf5"
        if path.exists():
            with open_hdf5(path, ("image_features", "image_boxes")) as file:
                yield [record.name], file["image_features"][:], file["image_boxes"][:]


def _tsv_regions(path, records):
    """Rows of py-bottom-up-attention's or bottom-up-attention's tsv; of more than 36 regions the surest stay."""
    new = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
           "features")
    old = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for values in csv.reader(file, delimiter="\t"):
                row = dict(zip(new if len(values) == len(new) else old, values, strict=True))
                boxes, features = (np.frombuffer(base64.b64decode(row[key]), np.float32).reshape(
                    int(row["num_boxes"]), -1) for key in ("boxes", "features"))
                if "objects_conf" in row and len(features) > REGIONS:
                    surest = np.sort(np.argsort(-np.frombuffer(base64.b64decode(row["objects_conf"]), np.float32),
                                                kind="stable")[:REGIONS])
                    boxes, features = boxes[surest], features[surest]
                name = row.get("img_id", row.get("image_id"))
                yield [name, Path(name).stem, str(trailing_number(name))], features, boxes
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the features {path} cannot be read ({error}): give a tsv of bottom-up-attention") from error


def _padded(values):
    """The first 36 rows of values (n, …), zero rows below."""
    padded = np.zeros((REGIONS, *values.shape[1:]), np.float32)
    padded[:len(values)] = values[:REGIONS]
    return padded
