"""Stored image features: of a CNN, which are computed here, or of regions, which bottom_up and
detector write; and opening them for a model.

While it is written, the file is called <name>.partial. Its datasets have their final size from the
start, so that it can be opened after the process was killed at any moment; `done` then marks the
images whose features are complete."""
import contextlib
import hashlib
import os
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from captioning import processes
from captioning.data.arrays import open_hdf5
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.images import preprocess, read_image
from captioning.data.loader import make_loader
from captioning.device import amp_dtype, autocast, supports_amp
from captioning.errors import InputError
from captioning.files import content_hash, fingerprint, shortened

FLOAT16_MAX = 65504


def weights_fingerprint(encoder):
    """A short hash of the weights of an encoder or model, and of what else a model of transformers
    depends on."""
    digest = hashlib.sha256(getattr(encoder, "settings", "").encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_features(data_folder, dataset, split, model, **options):
    """Opens a split as a CaptionDataset on the stored features that `model` needs."""
    encoder = model.config["encoder"] or "bottom_up"
    data = open_features_of(data_folder, dataset, split, encoder, **options)
    check_features(data, model)
    return data


def open_features_of(data_folder, dataset, split, encoder, alternative="", **options):
    """Opens a split as a CaptionDataset on the stored features of `encoder`, or "bottom_up".

    alternative: another remedy for missing features, which ends the message. options: of
    CaptionDataset."""
    path = features_path(data_folder, dataset, split, encoder)
    if not path.exists():
        source = "bottom_up" if encoder == "bottom_up" else f"cnn --encoder {encoder}"
        raise InputError(f"the stored features {path} are missing: run preparedataset.py with "
                         f"--features {source}{alternative}")
    return CaptionDataset(data_folder, dataset, split, features=path, **options)


def check_features(data, model):
    """InputError unless `model` takes the stored features of the CaptionDataset `data`: those of
    its own encoder's weights, or region features of its width."""
    if model.encoder is None:
        width = model.config["feature_dim"]
        if data.feature_dim != width:
            raise InputError(f"{data.features} contains features of {data.feature_dim} channels, "
                             f"the model takes {width}: use those that it was trained on")
    elif data.attributes.get("encoder") == "bottom_up":
        raise InputError(f"{data.features} contains region features, the model takes features of "
                         f"the encoder {model.config['encoder']}: run preparedataset.py with "
                         "--features cnn")
    elif data.attributes.get("weights") != weights_fingerprint(model.encoder):
        raise InputError(f"{data.features} was computed with other weights of the encoder: give "
                         "the same --encoder_weights as to preparedataset.py, or run that again")


def store_cnn(path, records, image_folder, encoder, name, size, batch_size, workers, device,
              amp=False):
    """Stores the features (N, K, C) of the records' images in the HDF5 file `path`, row by row.

    encoder: module from images (B, 3, size, size) to features (B, C, h, w), K = h·w. amp: compute
    in mixed precision, where the device supports it."""
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    precision = amp_dtype(device) if amp and supports_amp(device) else torch.float32
    attributes = {"encoder": name, "weights": weights_fingerprint(encoder), "size": size,
                  "precision": str(precision)}

    @torch.inference_mode()
    def encode(pixels):
        with autocast(device, amp):
            features = encoder(pixels.to(device)).flatten(2).transpose(1, 2)           # (B, K, C)
        return {"features": features.half().cpu().numpy()}

    shape = encode(torch.zeros(1, 3, size, size))["features"].shape[1:]
    store_of_images(path, records, image_folder, shape, attributes, encode,
                    partial(_read, size=size), batch_size, workers, device)


def _read(paths, size):
    return torch.stack([preprocess(read_image(path), size) for path in paths])


def store_of_images(path, records, image_folder, shape, attributes, encode, read, batch_size,
                    workers, device, with_boxes=False):
    """Stores encode(read(paths)), {name: array}, of batches of the records' images; resumes an
    interrupted run."""
    # an image's mark changes with its content, so that a replaced image is noticed
    files = [Path(image_folder, record.path) for record in records]
    marks = processes.from_first(
        lambda: [1 + int(content_hash(file), 16) % 2**63 for file in files])
    attributes = attributes | {"names": fingerprint([record.name for record in records])}
    with Store(path, marks, shape, attributes, with_boxes) as store:
        store.fill(encode, files, read, batch_size, workers, device)


class Store:
    """Context manager that writes stored features to `path`, and resumes an interrupted run.

    The file contains `features` (N, *shape) float16 and `done` (N,) uint64; it is complete when
    `done` equals `marks`. After entering, `missing` is the set of incomplete images. Under torchrun
    the first process alone opens it.

    marks: (N,) positive integers that change when an image is replaced. shape: (K, C), regions and
    channels. attributes: of the HDF5 file; a file with others is discarded. with_boxes: also
    `boxes` (N, K, 4) float32 and `counts` (N,) int32, the number of regions."""

    def __init__(self, path, marks, shape, attributes, with_boxes=False):
        self.path = Path(path)
        self.partial = Path(f"{path}.partial")
        self.marks = np.asarray(marks, np.uint64)
        self.attributes = attributes
        self.file = None
        self.missing = set()
        self.complete = True
        count = len(marks)
        self.datasets = {"features": ((count, *shape), "float16")}      # {name: (shape, type)}
        if with_boxes:
            self.datasets["boxes"] = (count, shape[0], 4), "float32"
            self.datasets["counts"] = (count,), "int32"
        self.datasets["done"] = (count,), "uint64"

    def __enter__(self):
        if processes.rank():
            return self
        if self._fits(self.path):
            print(f"{self.path} is already complete")
            return self
        self.complete = False
        with self._writing():
            if not self._fits(self.partial):
                self._create()
            with h5py.File(self.partial) as file:
                done = file["done"][:]
        self.missing = set(np.flatnonzero(done != self.marks).tolist())
        if first := min(self.missing, default=len(done)):
            print(f"resuming after {first} of {len(done)} images in {self.partial}")
        return self

    def _fits(self, path):
        if not path.exists():
            return False
        try:
            with open_hdf5(path, ("features", "done")) as file:
                same_source = all(np.array_equal(file.attrs.get(name), value)
                                  for name, value in self.attributes.items())
                same_form = all((file[name].shape, file[name].dtype) == form
                                for name, form in self.datasets.items())
                return same_source and same_form and (
                    path == self.partial or np.array_equal(file["done"][:], self.marks))
        except InputError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise InputError(f"{path} is being written by another run: wait until it ends"
                                 ) from error
            return False

    def _create(self):
        """Creates the partial file in its final size, so that a full disk is noticed at once."""
        # with space allocated early, writing changes no metadata: a killed process leaves a
        # valid file
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        with h5py.File(self.partial, "w") as file:
            for name, (shape, kind) in self.datasets.items():
                file.create_dataset(name, shape, kind, dcpl=plan)
            file.attrs.update(self.attributes)
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            with open(self.partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(self.partial))
        except OSError:
            self.partial.unlink()
            raise

    def fill(self, encode, files, read, batch_size, workers, device):
        """Writes encode(read(paths)), {name: array}, of batches of all images from the first
        missing one on.

        files: paths of the images. The processes of torchrun encode every n-th
        batch each, and the first writes them all, so that their number does not change the file."""
        count = len(self.marks)
        first = processes.from_first(lambda: min(self.missing, default=count))
        starts = range(first, count, batch_size)
        batches = [list(range(start, min(start + batch_size, count))) for start in starts]
        loader = make_loader(files, processes.shard(batches), workers, device, read)
        encoded = map(encode, loader)
        with tqdm(desc=self.path.name, total=len(batches), unit="batch",
                  disable=processes.rank() > 0) as bar:
            for i in range(0, len(batches), processes.count()):
                results = processes.gather_each(next(encoded, None))
                for batch, arrays in zip(batches[i:], results, strict=False):
                    if not processes.rank():
                        self.write(batch[0], **arrays)
                    bar.update()

    def write(self, start, features, **others):
        """Writes features (B, K, C), and other datasets by name, of images start, …, start+B−1."""
        rows = slice(start, start + len(features))
        with self._writing():
            if self.file is None:
                # opened late: workers that inherit the file would keep its lock after a kill
                self.file = h5py.File(self.partial, "r+")
            # `done` last: a killed process must not leave marks without features
            for arrays in ({"features": features, **others}, {"done": self.marks[rows]}):
                for name, values in arrays.items():
                    dataset = self.file[name]
                    # HDF5 1.14.2 itself would round 15.9998 to a float16 of 8
                    dataset[rows] = np.asarray(values, dataset.dtype)
                    dataset.flush()     # raises errors, which h5py would only print at the end
                self.file.flush()
        self.missing.difference_update(range(rows.start, rows.stop))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.partial} cannot be written ({shortened(error)}): free some "
                             "space or choose another --output_folder, and run the same command "
                             "again to resume") from error

    def __exit__(self, kind, error, traceback):
        if self.file is not None:
            self.file.close()
        if kind is None and not self.complete:
            os.replace(self.partial, self.path)
