"""Stored image features: the HDF5 file that cnn_features, bottom_up and detector write, and opening it for a model.

While it is written, the file is called <name>.partial. Its datasets have their final size from the start, so that it
can be opened after the process was killed at any moment; `done` then marks the images whose features are complete.
"""
import hashlib
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from captioning import processes
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.hdf5 import open_hdf5, reading
from captioning.data.loader import make_loader
from captioning.errors import InputError
from captioning.files import shortened
from captioning.memory import readable

FLOAT16_MAX = 65504


def file_size(path):
    """Size of a file in bytes, by which a replaced image is noticed; 0 if there is no such file."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def weights_fingerprint(encoder):
    """A short hash of an encoder's weights."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_features(data_folder, dataset, split, model, **options):
    """Opens a split as a CaptionDataset on the stored features that `model` needs.

    These are the features of the encoder that the model's configuration names, or bottom-up features if it has none.
    options: further arguments of CaptionDataset. Raises InputError if the file is missing or does not fit the model
    (see `check_features`).
    """
    data = open_features_of(data_folder, dataset, split, model.config["encoder"] or "bottom_up", **options)
    check_features(data, model)
    return data


def open_features_of(data_folder, dataset, split, encoder, alternative="", **options):
    """Opens a split as a CaptionDataset on the stored features of `encoder`, or "bottom_up"; InputError if the file is
    missing. alternative: another remedy, which ends its message; options: further arguments of CaptionDataset."""
    path = features_path(data_folder, dataset, split, encoder)
    if not path.exists():
        source = "--features bottom_up" if encoder == "bottom_up" else f"--features cnn --encoder {encoder}"
        raise InputError(f"the stored features {path} are missing: run preparedataset.py with {source}{alternative}")
    return CaptionDataset(data_folder, dataset, split, features=path, **options)


def check_features(data, model):
    """Raises InputError if the stored features of the CaptionDataset `data` do not fit `model`.

    A model with a CNN needs features computed with the weights of its own encoder; a model of region features needs
    regions of its feature width.
    """
    if model.encoder is None:
        if data.feature_dim != model.config["feature_dim"]:
            raise InputError(f"{data.features} contains features of {data.feature_dim} channels, the model takes "
                             f"{model.config['feature_dim']}: use the features that the model was trained on")
        return
    with open_hdf5(data.features) as file, reading(data.features):
        encoder, weights = file.attrs.get("encoder"), file.attrs.get("weights")
    if encoder == "bottom_up":
        raise InputError(f"{data.features} contains region features, the model takes features of the encoder "
                         f"{model.config['encoder']}: run preparedataset.py with --features cnn")
    if weights != weights_fingerprint(model.encoder):
        raise InputError(f"{data.features} was computed with other weights of the encoder: give the same "
                         "--encoder_weights as to preparedataset.py, or run that again")


class Store:
    """Context manager that writes stored features to `path` and resumes where an earlier run stopped.

    The file contains `features` (N, *shape) and `done` (N,) uint64; it is complete when `done` equals `marks`.
    After entering, `done` is the number of leading images that are complete, and `missing` the set of the incomplete
    ones' indices. On success the partial file is renamed to `path`. Under torchrun the first process alone opens it.

    Args:
        marks: (N,) positive integers, one per image, that change when the image is replaced.
        shape: (K, C), regions and channels.
        attributes: HDF5 attributes {name: value}; a file with other attributes is discarded.
        dtype: of the features, "float16", or "uint8" in units of `scales` (N,) float32, which are stored as well.
        with_boxes: also store `boxes` (N, K, 4) float32 and `counts` (N,) int32, the number of regions of each image.
    """

    def __init__(self, path, marks, shape, attributes, with_boxes=False, dtype="float16"):
        self.path, self.partial, self.count = Path(path), Path(f"{path}.partial"), len(marks)
        self.marks = np.asarray(marks, np.uint64)
        self.attributes = attributes
        self.datasets = {"features": ((self.count, *shape), dtype)}      # {name: (shape, type)}
        if with_boxes:
            self.datasets |= {"boxes": ((self.count, shape[0], 4), "float32"), "counts": ((self.count,), "int32")}
        if dtype == "uint8":
            self.datasets["scales"] = (self.count,), "float32"
        self.datasets["done"] = (self.count,), "uint64"

    def __enter__(self):
        self.file, self.missing, self.complete, self.done = None, set(), False, self.count
        if processes.rank():
            return self
        self.complete = self._fits(self.path)
        if self.complete:
            print(f"{self.path} is already complete")
            return self
        try:
            if not self._fits(self.partial):
                self._create()
            with h5py.File(self.partial, "r") as file:
                self.missing = {int(i) for i in np.flatnonzero(file["done"][:] != self.marks)}
        except (OSError, RuntimeError) as error:
            raise self._write_error(error) from error
        self.done = min(self.missing, default=self.count)
        if self.done:
            print(f"resuming after {self.done} of {self.count} images in {self.partial}")
        return self

    def _create(self):
        need = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.datasets.values())
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise OSError(f"{readable(need)} are needed, {readable(free)} are free")
        with h5py.File(self.partial, "w") as file:
            for name, form in self.datasets.items():
                self._create_dataset(file, name, *form)
            file.attrs.update(self.attributes)
        try:
            self._reserve()
        except OSError:
            self.partial.unlink()
            raise

    def _reserve(self):
        """Reserves the disk space of the partial file, so that a disk that becomes full cannot interrupt writing."""
        if hasattr(os, "posix_fallocate"):
            with open(self.partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(self.partial))

    def _create_dataset(self, file, name, shape, dtype):
        # space is allocated at once: writing then changes no metadata, so that a killed process leaves a valid file
        plan, space = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5s.create_simple(shape)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_obj_track_times(False)
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plan)

    def _fits(self, path):
        """Whether `path` exists with these shapes and attributes and, unless it is the partial file, is complete."""
        if not path.exists():
            return False
        try:
            with open_hdf5(path, ("features", "done")) as file, reading(path):
                return (all(np.array_equal(file.attrs.get(key), value) for key, value in self.attributes.items())
                        and all(name in file and (file[name].shape, file[name].dtype) == form
                                for name, form in self.datasets.items())
                        and (path == self.partial or np.array_equal(file["done"][:], self.marks)))
        except InputError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise InputError(f"{path} is being written by another run: wait until it ends") from error
            return False

    def fill(self, encode, data, batch_size, workers, device):
        """Writes encode(batch), {name of a dataset: array}, of all batches that follow the first `done` images.

        data: the images, indexed by lists of indices. The processes of torchrun encode every n-th batch each, and the
        first writes them all, so that their number does not change the file."""
        rows = range(processes.from_first(lambda: self.done), self.count)
        batches = [list(rows[i:i + batch_size]) for i in range(0, len(rows), batch_size)]
        encoded = map(encode, make_loader(data, processes.shard(batches), workers, device))
        with tqdm(desc=self.path.name, total=len(batches), unit="batch", disable=processes.rank() > 0) as bar:
            for i in range(0, len(batches), processes.count()):
                parts = processes.gather_to_first(next(encoded, None))
                for batch, arrays in zip(batches[i:], parts, strict=False):
                    self.write(batch[0], **arrays)
                    bar.update()

    def write(self, start, features, **others):
        """Writes features (B, K, C), and the other datasets by name, of the images start, …, start + B − 1."""
        rows = slice(start, start + len(features))
        try:
            if self.file is None:   # opened late: workers that inherit the file would keep its lock after a kill
                self.file = h5py.File(self.partial, "r+")
            for name, values in ({"features": features} | others).items():
                self._write(name, rows, values)
            self.file.flush()
            self._write("done", rows, self.marks[rows])
            self.file.flush()
        except (OSError, RuntimeError) as error:
            raise self._write_error(error) from error

    def _write(self, name, rows, values):
        dataset = self.file[name]
        dataset[rows] = np.asarray(values, dataset.dtype)    # HDF5 1.14.2 itself rounds 15.9998 to a float16 of 8
        dataset.flush()     # raises errors, which h5py would only print when it closes the dataset

    def _write_error(self, error):
        return InputError(f"{self.partial} cannot be written ({shortened(error)}): free some space or choose another "
                          "--output_folder, and run the same command again to resume")

    def __exit__(self, kind, error, traceback):
        if self.file is not None:
            self.file.close()
        if kind is None and not self.complete and not processes.rank():
            os.replace(self.partial, self.path)
