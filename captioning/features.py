"""Stores features of pictures, once for all: a CNN's, or bottom-up ones made elsewhere.

A file grows as <name>.partial, whose datasets have their final size from the start: killed at any moment it can still
be opened, and `done` says from where to go on.
"""
import base64
import csv
import hashlib
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioning import images
from captioning.annotations import trailing_number
from captioning.dataset import collate, fingerprint, open_hdf5, reading
from captioning.errors import InputError

REGIONS = 36
FLOAT16_MAX = 65504


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
    attributes = {"encoder": name, "weights": weights_fingerprint(encoder), "size": size,
                  "names": fingerprint([record.name for record in records])}
    marks = [1 + _bytes(Path(image_folder, record.path)) for record in records]
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    pictures = Pictures(image_folder, [record.path for record in records], size)
    with torch.inference_mode():
        C, h, w = encoder(torch.zeros(1, 3, size, size, device=device)).shape[1:]
    with _Store(path, marks, (h * w, C), attributes) as store, torch.inference_mode():
        rows = list(range(store.done, len(records)))
        batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        loader = DataLoader(pictures, batch_sampler=batches, collate_fn=collate, num_workers=min(workers, len(batches)))
        bar = tqdm(zip(batches, loader, strict=True), desc=Path(path).name, total=len(batches), unit="batch")
        for batch, pixels in bar:
            features = encoder(pixels.to(device)).flatten(2).transpose(1, 2)           # (B, K, C)
            store.write(batch[0], features.half().cpu().numpy())


def _bytes(path):
    """The file's size, which tells that a picture was replaced; 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def weights_fingerprint(encoder):
    """A short hash of an encoder's weights."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def stored_weights(path):
    """The fingerprint of the weights that stored features were computed with; None for features made elsewhere."""
    with open_hdf5(path) as file, reading(path):
        return file.attrs.get("weights")


def store_bottom_up(path, records, source):
    """Features (N, 36, 2048) float16 of a tsv or a folder of <file name>.hdf5, to `path`; fewer regions are padded."""
    attributes = {"encoder": "bottom_up", "names": fingerprint([record.name for record in records]),
                  "source": str(Path(source).resolve())}
    find = _folder_regions if Path(source).is_dir() else _tsv_regions
    index = _finder([record.name for record in records])
    with _Store(path, [1] * len(records), (REGIONS, 2048), attributes, with_boxes=True) as store:
        missing = store.missing
        regions = find(source, [records[i] for i in sorted(missing)]) if missing else ()
        for name, features, boxes in tqdm(regions, desc=Path(path).name, unit="image"):
            i = index(name)
            if i not in missing:
                continue
            if features.shape[1:] != (2048,) or boxes.shape != (len(features), 4) or not len(features):
                raise InputError(f"{source} has features {features.shape} and boxes {boxes.shape} for {name!r}: "
                                 "(regions, 2048) and (regions, 4) are expected")
            if not ((np.abs(features) <= FLOAT16_MAX).all() and np.isfinite(boxes).all()):
                raise InputError(f"{source} has features of {name!r} that are no finite numbers: make them anew")
            store.write(i, _padded(features)[None], _padded(boxes)[None])
            missing.remove(i)
            if not missing:
                break
        if missing:
            raise InputError(f"{source} has no features of {records[min(missing)].name} (and {len(missing) - 1} "
                             "other pictures): make them, or leave the pictures out of the captions")


class _Store:
    """`features` (N, *shape) float16 and `done` (N,), complete when that equals `marks` (N,); a context manager.

    A picture's mark changes when the picture is replaced by another.
    """

    def __init__(self, path, marks, shape, attributes, with_boxes=False):
        self.path, self.partial, self.count = Path(path), Path(f"{path}.partial"), len(marks)
        self.marks = np.asarray(marks, np.uint64)
        self.shape, self.attributes, self.with_boxes = shape, attributes, with_boxes

    def __enter__(self):
        self.file, self.missing, self.complete = None, set(), self._fits(self.path)
        if self.complete:
            print(f"{self.path} is already there")
            self.done = self.count
            return self
        try:
            if not self._fits(self.partial):
                self._create()
            with h5py.File(self.partial, "r") as file:
                self.missing = {int(i) for i in np.flatnonzero(file["done"][:] != self.marks)}
        except (OSError, RuntimeError) as error:
            raise self._unwritable(error) from error
        self.done = min(self.missing, default=self.count)
        if self.done:
            print(f"going on after {self.done} of {self.count} pictures in {self.partial}")
        return self

    def _create(self):
        need, free = 2 * self.count * int(np.prod(self.shape)), shutil.disk_usage(self.path.parent).free
        if need > free:
            raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free")
        with h5py.File(self.partial, "w") as file:
            self._dataset(file, "features", (self.count, *self.shape), np.float16)
            if self.with_boxes:
                self._dataset(file, "boxes", (self.count, self.shape[0], 4), np.float32)
            self._dataset(file, "done", (self.count,), np.uint64)
            file.attrs.update(self.attributes)

    def _dataset(self, file, name, shape, dtype):
        # all of its space at once: writing changes no metadata, so a killed process leaves a sound file
        plan, space = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5s.create_simple(shape)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_obj_track_times(False)
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plan)

    def _fits(self, path):
        if not path.exists():
            return False
        try:
            with open_hdf5(path, ("features", "done")) as file, reading(path):
                shapes = {"features": (self.count, *self.shape), "done": (self.count,)}
                return (all(np.array_equal(file.attrs.get(key), value) for key, value in self.attributes.items())
                        and all(file[name].shape == shape for name, shape in shapes.items())
                        and (path == self.partial or np.array_equal(file["done"][:], self.marks)))
        except InputError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise InputError(f"{path} is being written by another run: wait until it ends") from error
            return False

    def write(self, start, features, boxes=None):
        """features (B, *shape), boxes (B, K, 4) of the pictures from `start` on."""
        rows = slice(start, start + len(features))
        try:
            if self.file is None:   # not before: workers that inherit the file would hold its lock after a kill
                self.file = h5py.File(self.partial, "r+")
            self.file["features"][rows] = features
            if boxes is not None:
                self.file["boxes"][rows] = boxes
            self.file.flush()
            self.file["done"][rows] = self.marks[rows]
            self.file.flush()
        except (OSError, RuntimeError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error):
        return InputError(f"{self.partial} cannot be written ({error}): free some space or choose another "
                          "--output_folder, and run this again to go on")

    def __exit__(self, kind, error, traceback):
        if self.file is not None:
            self.file.close()
        if kind is None and not self.complete:
            os.replace(self.partial, self.path)


def _finder(names):
    """A function from what a features file calls a picture to its place in `names`, or None.

    It may be called by file name or stem; or by the number at the end, if one of the two names is but a number:
    '42' and 'COCO_val2014_000000000042' both mean 000000000042.jpg. A name that fits two pictures means none.
    """
    def keys(name, numbers):
        number = trailing_number(name)
        return [name, Path(name).stem] + ([] if number is None else [(number, kind) for kind in numbers])

    def bare(name):
        return Path(name).stem.isdigit()

    places = defaultdict(set)
    for i, name in enumerate(names):
        for key in keys(name, ("any", "bare") if bare(name) else ("any",)):
            places[key].add(i)

    def find(name):
        found = (places.get(key, ()) for key in keys(name, ("any",) if bare(name) else ("bare",)))
        return next((min(some) for some in found if len(some) == 1), None)
    return find


def _folder_regions(folder, records):
    for record in records:
        path = Path(folder) / f"{record.name}.hdf5"
        if os.path.exists(path):
            with open_hdf5(path, ("image_features", "image_boxes")) as file, reading(path):
                arrays = [file[name][:].astype(np.float32) for name in ("image_features", "image_boxes")]
            yield record.name, *arrays


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
                yield row.get("img_id", row.get("image_id")), features, boxes
    except (OSError, ValueError, LookupError, csv.Error) as error:
        raise InputError(f"the features {path} cannot be read ({error}): give a tsv of bottom-up-attention") from error


def _padded(values):
    """The first 36 rows of values (n, …), zero rows below."""
    padded = np.zeros((REGIONS, *values.shape[1:]), np.float32)
    padded[:len(values)] = values[:REGIONS]
    return padded
