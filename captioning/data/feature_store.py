"""Stores features of pictures, once for all: a CNN's here, those of regions in bottom_up.py and detector.py.

A file grows as <name>.partial, whose datasets have their final size from the start: killed at any moment it can still
be opened, and `done` says from where to go on.
"""
import hashlib
import os
import shutil
from pathlib import Path

import h5py
import numpy as np

from captioning.data.hdf5 import open_hdf5, reading
from captioning.errors import InputError

FLOAT16_MAX = 65504


def file_size(path):
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


def check_features(data, model):
    """InputError if the data's stored features were computed with other weights than the model's encoder has, or are of
    regions of another width than the model takes."""
    if model.encoder is not None and stored_weights(data.features) != weights_fingerprint(model.encoder):
        raise InputError(f"{data.features} was made with other weights of the encoder: give the same --encoder_weights "
                         "as to preparedataset.py, or run that again")
    if model.encoder is None and data.feature_dim != model.config["feature_dim"]:
        raise InputError(f"{data.features} has features of {data.feature_dim} channels, the model takes "
                         f"{model.config['feature_dim']}: name the data that it was trained on")


class Store:
    """`features` (N, *shape) float16 and `done` (N,), complete when that equals `marks` (N,); a context manager.

    with_boxes: of regions, shape (K, C); then `boxes` (N, K, 4) float32 and `counts` (N,), how many there are, too.
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
                self._dataset(file, "counts", (self.count,), np.int32)
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
                if self.with_boxes:
                    shapes |= {"boxes": (self.count, self.shape[0], 4), "counts": (self.count,)}
                return (all(np.array_equal(file.attrs.get(key), value) for key, value in self.attributes.items())
                        and all(name in file and file[name].shape == shape for name, shape in shapes.items())
                        and (path == self.partial or np.array_equal(file["done"][:], self.marks)))
        except InputError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise InputError(f"{path} is being written by another run: wait until it ends") from error
            return False

    def write(self, start, features, boxes=None, counts=None):
        """features (B, *shape), boxes (B, K, 4), counts (B,) of the pictures from `start` on."""
        rows = slice(start, start + len(features))
        try:
            if self.file is None:   # not before: workers that inherit the file would hold its lock after a kill
                self.file = h5py.File(self.partial, "r+")
            self.file["features"][rows] = features
            if boxes is not None:
                self.file["boxes"][rows], self.file["counts"][rows] = boxes, counts
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
