"""One split of a prepared data set: captions in HDF5, with stored features or images."""
import hashlib
import io
import json
import os
import random
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from captioning.data import images, vocabulary
from captioning.data.arrays import checked_dataset, open_hdf5, read_whole
from captioning.errors import InputError
from captioning.files import content_hash, expect, fingerprint, reading, safe_name, write_bytes

FEATURES_AGAIN = "run preparedataset.py with --features again"


def split_path(data_folder, dataset, split):
    """The HDF5 file with the captions of a split."""
    return Path(data_folder) / dataset / f"{split}_{dataset}.hdf5"


def features_path(data_folder, dataset, split, encoder):
    """The HDF5 file with the stored features of a split; encoder: a CNN's name or "bottom_up"."""
    return Path(data_folder) / dataset / f"features_{encoder}_{split}_{dataset}.hdf5"


def wordmap_path(data_folder, dataset):
    """The JSON file {word: id} of a data set."""
    return Path(data_folder) / dataset / f"wordmap_{dataset}.json"


def pick_captions(captions, count, generator):
    """An image's captions, the first `count` of which are for training: all and randomly repeated
    ones, or a random subset, which the others follow."""
    if len(captions) > count:
        picked = generator.sample(range(len(captions)), count)
        others = [i for i in range(len(captions)) if i not in picked]
        return [captions[i] for i in picked + others]
    return captions + [generator.choice(captions) for _ in range(count - len(captions))]


def write_split(path, records, words, captions_per_image, max_len, seed, image_folder):
    """Writes the records of one split to the HDF5 file `path` and returns all their captions (N, R,
    max_len + 2).

    The file contains `captions` (N, captions_per_image, max_len + 2) int32, ids from <start> to
    <end>, zero-padded; `more_captions`, the others of images that have more; `names` and `paths`
    (N,) of the images; `references` (N,), all captions of each image as a JSON list; and the
    attributes `image_folder` and `wordmap`, a hash."""
    width = max([captions_per_image, *(len(record.tokens) for record in records)])
    captions = np.zeros((len(records), width, max_len + 2), dtype=np.int32)
    for row, record in zip(captions, records, strict=True):
        # seeded by the image's name, so that omitting one image does not change the others
        generator = random.Random(f"{seed} {record.name}")
        ordered = pick_captions(record.tokens, captions_per_image, generator)
        for line, tokens in zip(row, ordered, strict=False):
            ids = words.encode(tokens, max_len)
            line[:len(ids)] = ids

    texts = {"names": [record.name for record in records],
             "paths": [record.path for record in records],
             "references": [json.dumps(record.raw, ensure_ascii=False) for record in records]}
    buffer = io.BytesIO()       # in memory first, since HDF5 may crash on a full disk
    with h5py.File(buffer, "w") as file:
        parts = {"captions": captions[:, :captions_per_image],
                 "more_captions": captions[:, captions_per_image:]}
        for name, part in parts.items():
            if part.size:
                file.create_dataset(name, data=part, compression="gzip", shuffle=True)
        for name, values in texts.items():
            file.create_dataset(name, data=values, dtype=h5py.string_dtype())
        folder = str(Path(image_folder).resolve()) if image_folder else ""
        file.attrs.update(image_folder=folder, wordmap=fingerprint(words.wordmap))
    write_bytes(path, buffer.getbuffer())
    return captions


class CaptionDataset(Dataset):
    """One split of a prepared data set; it is indexed by lists of indices and returns batches.

    A batch is {"images": features (B, K, C) or pixels (B, 3, S, S), float32; "captions": (B, N, L)
    ids, zero-padded to the longest caption of the batch; "index": (B,)}. Without `features` and
    `image_size`, only names, references (lists of captions) and captions are available.

    features: path of stored features; by default images are read. image_size: side S in pixels to
    which images are resized. augment: colour jitter and horizontal flips that depend on (seed,
    epoch, index) alone; "left" and "right" are swapped in the captions of a flipped image.
    captions_per_epoch: number of captions sampled per image per epoch (default: all). prepare: in
    place of image_size, a function uint8 (3, H, W) -> float32 (3, S, S)."""

    def __init__(self, data_folder, dataset, split, features=None, image_size=None, augment=False,
                 seed=1, captions_per_epoch=None, prepare=None):
        self.path = split_path(data_folder, dataset, split)
        self.features = features
        self.image_size = image_size
        self.prepare = prepare
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.captions_per_epoch = captions_per_epoch
        self._file = None
        self._process = None

        words = wordmap_path(data_folder, dataset)
        with open_hdf5(self.path, ("captions", "names", "paths", "references")) as file:
            captions = read_whole(file, "captions", "iu", (None, None, None))
            self.names = list(file["names"].asstr()[:])
            self.paths = list(file["paths"].asstr()[:])
            self.references = [json.loads(text) for text in file["references"].asstr()[:]]
            self.image_folder = str(file.attrs["image_folder"])
            self.vocabulary = vocabulary.read(words)
            if file.attrs["wordmap"] != fingerprint(self.vocabulary.wordmap):
                raise InputError(f"{words} is not the word map that {self.path} was created with: "
                                 "run preparedataset.py again")
            self._check_contents(captions)      # that write_split can have written them
        self.captions = torch.from_numpy(captions.astype(np.int32))

        if features:
            self._check_features()
        elif (image_size or prepare) and not (self.image_folder and self._image(0).is_file()):
            raise InputError(f"the image {self.paths[0]} is not in the image folder "
                             f"'{self.image_folder}' that {self.path} was prepared with: run "
                             "preparedataset.py again with the --image_folder that contains it")

    def _check_contents(self, captions):
        sizes = {len(captions), len(self.names), len(self.paths), len(self.references)}
        expect(len(sizes) == 1 and len(set(self.names)) == len(self.names),
               "its captions and names do not fit")
        for name in {*self.names, *self.paths}:
            safe_name(name)
        expect(self.image_folder.isprintable(), "its image folder is not printable")
        expect(all(isinstance(texts, list) and texts and set(map(type, texts)) == {str}
                   for texts in self.references), "its references are no lists of captions")

        self._check_captions(captions)

    def _check_captions(self, captions):
        """ValueError unless each caption is <start>, words, <end>, and then only padding."""
        lengths = (captions != 0).sum(-1, keepdims=True)
        is_word = np.arange(captions.shape[-1]) < lengths
        is_end = np.arange(captions.shape[-1]) == lengths - 1
        expect((captions >= 0).all() and (captions < len(self.vocabulary)).all()
               and ((captions != 0) == is_word).all()
               and (captions[..., 0] == self.vocabulary.start).all()
               and ((captions == self.vocabulary.end) == is_end).all(),
               "its captions are not sequences of its words")

    def _check_features(self):
        with open_hdf5(self.features, remedy=FEATURES_AGAIN) as file:
            self.attributes = dict(file.attrs)
            if self.attributes.get("names") != fingerprint(self.names):
                raise InputError(f"{self.features} belongs to other images than {self.path}: "
                                 f"{FEATURES_AGAIN}")
            shape = checked_dataset(file, "features", "f", (len(self), None, None)).shape
            self.regions, self.feature_dim = shape[1:]
            self.has_regions = "boxes" in file or "counts" in file
            if self.has_regions:
                checked_dataset(file, "boxes", "f", (len(self), self.regions, 4))
                checked_dataset(file, "counts", "iu", (len(self),))

    def own_captions(self):
        """(N, R, L) ids of the captions of each image, all of them and each once, zero-padded."""
        counts = torch.tensor([len(texts) for texts in self.references])
        is_own = torch.arange(self.captions.shape[1]) < counts[:, None]        # others: repetitions
        captions = [self.captions * is_own[..., None]]
        with open_hdf5(self.path) as file:
            if "more_captions" in file:     # not written by earlier versions
                more = read_whole(file, "more_captions", "iu", (len(self), None, None))
                self._check_captions(more[more.any(-1)][None])
                captions.append(torch.from_numpy(more.astype(np.int32)))
        return torch.cat(captions, 1)

    def __len__(self):
        return len(self.captions)

    def __getitems__(self, indices):
        """The batch of the images `indices`."""
        captions = self.captions[indices].long()                                       # (B, N, L)
        if self.captions_per_epoch:
            order = []
            for i in indices:
                generator = torch.Generator().manual_seed(self._seed(i, "captions"))
                order.append(torch.rand(captions.shape[1], generator=generator).argsort())
            order = torch.stack(order)
            captions = captions.take_along_dim(order[:, :self.captions_per_epoch, None], dim=1)
        captions = captions[..., :int((captions != 0).any(0).any(0).sum())]
        if self.features:
            inputs = self.read_features(indices)
        else:
            inputs = self.read_images(indices, captions)
        return {"images": inputs, "captions": captions, "index": torch.as_tensor(indices)}

    def _seed(self, index, purpose):
        return int(fingerprint([self.seed, self.epoch, index, purpose]), 16) % 2**63

    def read_features(self, indices):
        """Stored features (B, K, C) float32 of the images."""
        features = self._read("features", indices)
        low = features.flatten(1).amin(1)           # much faster than isfinite() of all
        high = features.flatten(1).amax(1)
        is_valid = low.isfinite() & high.isfinite()
        if self.has_regions:
            is_valid &= (low != 0) | (high != 0)
        return self._checked(features, is_valid, indices, "features that are not finite numbers")

    def read_boxes(self, indices):
        """Boxes (B, K, 4) float32 of the images' regions: x0, y0, x1, y1 in pixels of the image,
        zero-padded."""
        boxes = self._read("boxes", indices)
        is_valid = boxes.isfinite().all(-1) & (boxes[..., :2] <= boxes[..., 2:]).all(-1)
        is_valid = is_valid.all(1) & boxes.any(2).any(1)
        return self._checked(boxes, is_valid, indices, "no boxes x0 ≤ x1, y0 ≤ y1")

    def region_counts(self, indices):
        """Number of regions (B,) of the images, from 1 to K."""
        counts = self._read("counts", indices).int()
        is_valid = (counts > 0) & (counts <= self.regions)
        return self._checked(counts, is_valid, indices, "a number of regions that is not 1 to K")

    def _checked(self, values, is_valid, indices, problem):
        """`values` (B, ...); InputError that names the first image whose is_valid (B,) is False."""
        if not is_valid.all():
            name = self.names[indices[int(is_valid.int().argmin())]]
            raise InputError(f"{self.features} is damaged (for {name} it contains {problem}): "
                             f"{FEATURES_AGAIN}")
        return values

    def _read(self, name, indices):
        with reading(self.features, FEATURES_AGAIN):
            if self._process != os.getpid():    # each worker opens the file, also after a fork
                self._file = h5py.File(self.features)
                self._process = os.getpid()
            order, inverse = np.unique(np.asarray(indices), return_inverse=True)
            # faster than NumPy's conversion
            return torch.from_numpy(self._file[name][order][inverse]).float()

    def content_hash(self, index):
        """A short hash of an image's file, or of its stored features."""
        if not self.features:
            return content_hash(self._image(index))
        parts = [self.read_features([index])]
        if self.has_regions:
            parts += [self.read_boxes([index]), self.region_counts([index])]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]

    def fingerprint(self):
        """A short hash of what training reads: names, captions, references, and of the images'
        files their sizes or of stored features the marks of their images."""
        if self.features:
            with open_hdf5(self.features, remedy=FEATURES_AGAIN) as file:
                inputs = [str(sorted((name, str(value)) for name, value in file.attrs.items())),
                          file["done"][:].tolist() if "done" in file else None]
        else:
            paths = [self._image(i) for i in range(len(self))]
            inputs = [os.path.getsize(path) if path.exists() else None for path in paths]
        captions = hashlib.sha256(self.captions.numpy().tobytes()).hexdigest()
        return fingerprint([self.names, captions, self.references, inputs])

    def __getstate__(self):
        # an open file cannot be sent to another process
        return self.__dict__ | {"_file": None, "_process": None}

    def _image(self, index):
        return Path(self.image_folder, self.paths[index])

    def read_images(self, indices, captions):
        """Images (B, 3, S, S) float32, normalised; the captions (B, N, L) of flipped images are
        changed in place."""
        if self.prepare:
            return torch.stack([self.prepare(images.read_image(self._image(i))) for i in indices])
        batch = torch.stack([images.resize(images.read_image(self._image(i)), self.image_size)
                             for i in indices])
        if self.augment:
            # "picture" separates these random numbers from those of the captions
            seeds = [self._seed(i, "picture") for i in indices]
            batch, flipped = images.augment(batch, seeds)
            left, right = (self.vocabulary.wordmap.get(word) for word in ("left", "right"))
            if left is not None and right is not None:
                swapped = torch.where(captions == left, right, captions)
                swapped = torch.where(captions == right, left, swapped)
                captions.copy_(torch.where(flipped[:, None, None], swapped, captions))
        return images.normalise(batch)
