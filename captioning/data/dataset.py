"""One split of a prepared data set: captions in HDF5, with stored features or images."""
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
from captioning.data.annotations import has_type
from captioning.data.hdf5 import checked_dataset, open_hdf5, read_whole, reading
from captioning.errors import InputError
from captioning.files import atomic_path, fingerprint, safe_name


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
    """Returns `count` of an image's captions: all of them and randomly repeated ones, or a random subset."""
    if len(captions) < count:
        return captions + [generator.choice(captions) for _ in range(count - len(captions))]
    return captions if len(captions) == count else generator.sample(captions, count)


def write_split(path, records, words, captions_per_image, max_len, seed, image_folder):
    """Writes the records of one split to the HDF5 file `path` and returns its captions.

    The file contains `captions` (N, captions_per_image, max_len + 2) int32, ids from <start> to <end>, zero-padded;
    `names` and `paths` (N,) of the images; `references` (N,), all captions of each image as a JSON list; and the
    attributes `image_folder` and `wordmap` (hash of the word map). words: the Vocabulary.
    """
    captions = np.zeros((len(records), captions_per_image, max_len + 2), dtype=np.int32)
    for row, record in zip(captions, records, strict=True):
        # seeded by the image's name, so that omitting one image does not change the captions of the others
        generator = random.Random(f"{seed} {record.name}")
        for line, tokens in zip(row, pick_captions(record.tokens, captions_per_image, generator), strict=True):
            ids = words.encode(tokens, max_len)
            line[:len(ids)] = ids
    buffer = io.BytesIO()       # in memory first, since HDF5 may crash on a full disk
    with h5py.File(buffer, "w") as file:
        file.create_dataset("captions", data=captions, compression="gzip", shuffle=True)
        for name, values in (("names", [record.name for record in records]),
                             ("paths", [record.path for record in records]),
                             ("references", [json.dumps(record.raw, ensure_ascii=False) for record in records])):
            file.create_dataset(name, data=values, dtype=h5py.string_dtype())
        file.attrs.update(image_folder=str(Path(image_folder).resolve()) if image_folder else "",
                          wordmap=fingerprint(words.wordmap))
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return captions


class CaptionDataset(Dataset):
    """One split of a prepared data set; it is indexed by lists of indices and returns whole batches.

    A batch is {"images": features (B, K, C) or pixels (B, 3, S, S), float32; "captions": (B, N, L) ids, zero-padded to
    the longest caption of the batch; "index": (B,)}. Without `features` and `image_size`, only names, references and
    captions are available. Raises InputError if a file is missing, damaged, or belongs to another data set.

    Args:
        data_folder, dataset, split: which split, as prepared by preparedataset.py.
        features: path of stored features; by default images are read.
        image_size: side S in pixels to which images are resized.
        augment: colour jitter and horizontal flips that depend on (seed, epoch, index) alone; the words "left" and
            "right" are swapped in the captions of a flipped image.
        captions_per_step: number of captions sampled per image per epoch (default: all).

    Attributes: names, paths and references (a list of captions) of the N images; image_folder; captions
    (N, captions per image, max_len + 2) ids; vocabulary; features; feature_dim, the channels C of stored features.
    """

    def __init__(self, data_folder, dataset, split, features=None, image_size=None, augment=False, seed=1,
                 captions_per_step=None):
        path = split_path(data_folder, dataset, split)
        with open_hdf5(path, ("captions", "names", "paths", "references")) as file, reading(path):
            self.captions = torch.from_numpy(read_whole(file, "captions", "iu", (None,) * 3).astype(np.int64))
            self.names, self.paths = (list(file[name].asstr()[:]) for name in ("names", "paths"))
            self.references = [json.loads(text) for text in file["references"].asstr()[:]]
            self.image_folder, wordmap = str(file.attrs["image_folder"]), str(file.attrs["wordmap"])
        self.vocabulary = vocabulary.read(wordmap_path(data_folder, dataset))
        if wordmap != fingerprint(self.vocabulary.wordmap):
            raise InputError(f"{wordmap_path(data_folder, dataset)} is not the word map that {path} was created with: "
                             "run preparedataset.py again")
        self._check_contents(path)
        self.path, self.features, self.image_size, self.augment = path, features, image_size, augment
        self.seed, self.epoch, self.captions_per_step = seed, 0, captions_per_step
        self._file, self._process = None, None
        self.sides = [self.vocabulary.wordmap.get(word) for word in ("left", "right")]
        if features:
            self._check_features()
        elif image_size:
            self._check_images()

    def _check_contents(self, path):
        """Raises InputError if the contents cannot have been written by write_split."""
        captions, end = self.captions, self.vocabulary.end
        sizes = {len(values) for values in (captions, self.names, self.paths, self.references)}
        lengths = (captions != 0).sum(-1, keepdim=True)                                # (N, captions per image, 1)
        is_valid = (len(sizes) == 1 and len(set(self.names)) == len(self.names)
                    and captions.min() >= 0 and captions.max() < len(self.vocabulary)
                    and ((captions != 0) == (torch.arange(captions.shape[-1]) < lengths)).all()
                    and (captions[..., 0] == self.vocabulary.start).all() and ((captions == end).sum(-1) == 1).all()
                    and (captions.gather(-1, (lengths - 1).clamp(min=0)) == end).all()
                    and all(isinstance(texts, list) and texts and all(has_type(text, str) for text in texts)
                            for texts in self.references))
        if not is_valid:
            raise InputError(f"{path} is damaged (its captions and names do not fit): regenerate it with "
                             "preparedataset.py")
        self.captions = captions.int()
        for name in {*self.names, *self.paths, self.image_folder or "."}:
            if not name.isprintable():
                raise InputError(f"{path} is damaged (it contains the name {name!r}): regenerate it with "
                                 "preparedataset.py")
        for relative in self.paths:
            safe_name(relative, path)

    def _check_features(self):
        with open_hdf5(self.features, ("features",)) as file, reading(self.features):
            if file.attrs.get("names") != fingerprint(self.names):
                raise InputError(f"{self.features} belongs to other images than {self.path}: run preparedataset.py "
                                 "with --features again")
            features = checked_dataset(file, "features", "fu", (len(self), None, None))
            K, self.has_scales = features.shape[1], features.dtype == np.uint8
            if self.has_scales:
                checked_dataset(file, "scales", "f", (len(self),))
            self.has_regions = "boxes" in file or "counts" in file
            if self.has_regions:
                checked_dataset(file, "boxes", "f", (len(self), K, 4))
                checked_dataset(file, "counts", "iu", (len(self),))

    def _check_images(self):
        if not self.image_folder:
            raise InputError(f"{self.path} was prepared without an image folder: run preparedataset.py with "
                             "--image_folder to use images")
        first = Path(self.image_folder, self.paths[0])
        if not os.path.isfile(first):
            raise InputError(f"the image {first} is missing: run preparedataset.py again with the --image_folder "
                             "that contains the images")

    def __len__(self):
        return len(self.captions)

    def set_epoch(self, epoch):
        """Sets the epoch on which augmentation and the sampling of captions depend."""
        self.epoch = epoch

    def __getitems__(self, indices, part=slice(None)):
        """The batch of the images `indices`; `part`: "images" and "index" are those of indices[part] alone."""
        captions = self.captions[indices].long()                                       # (B, N, L)
        if self.captions_per_step:
            order = torch.stack([torch.rand(captions.shape[1], generator=torch.Generator().manual_seed(
                self._seed(i, "captions"))) for i in indices]).argsort(1)
            captions = captions.take_along_dim(order[:, :self.captions_per_step, None], dim=1)
        captions = captions[..., :int((captions != 0).any(0).any(0).sum())]
        indices = indices[part]
        inputs = self.read_features(indices) if self.features else self.read_images(indices, captions[part])
        return {"images": inputs, "captions": captions, "index": torch.as_tensor(indices)}

    def _seed(self, index, purpose):
        return int(fingerprint([self.seed, self.epoch, index, purpose]), 16) % 2**63

    def read_features(self, indices):
        """Stored features (B, K, C) float32 of the images; InputError if they are not finite, or regions are all 0."""
        features = self._read("features", indices)
        if self.has_scales:
            features *= self._read("scales", indices)[:, None, None]
        low, high = features.flatten(1).amin(1), features.flatten(1).amax(1)     # much faster than isfinite() of all
        is_valid = low.isfinite() & high.isfinite()
        if self.has_regions:
            is_valid &= (low != 0) | (high != 0)
        return self._checked(features, is_valid, indices, "features that are not finite numbers")

    def read_boxes(self, indices):
        """Boxes (B, K, 4) float32 of the images' regions: x0, y0, x1, y1 in pixels of the image, zero-padded.

        Raises InputError if the bottom-up features were given without boxes.
        """
        boxes = self._read("boxes", indices)
        is_valid = (boxes.isfinite().all(-1) & (boxes[..., :2] <= boxes[..., 2:]).all(-1)).all(1)
        boxes = self._checked(boxes, is_valid, indices, "boxes that are not finite numbers x0 ≤ x1, y0 ≤ y1")
        without_boxes = (~boxes.any(2).any(1)).nonzero().flatten().tolist()
        if without_boxes:
            raise InputError(f"{self.features} has no boxes of {self.names[indices[without_boxes[0]]]}: regenerate it "
                             "from features with boxes, in .hdf5, .npz or tsv files")
        return boxes

    def region_counts(self, indices):
        """Number of regions (B,) of the images, from 1 to K."""
        counts = self._read("counts", indices).int()
        with open_hdf5(self.features) as file:
            is_valid = (counts > 0) & (counts <= file["features"].shape[1])
        return self._checked(counts, is_valid, indices, "a number of regions that is not from 1 to K")

    def _checked(self, values, is_valid, indices, problem):
        """`values` (B, ...) of the images; InputError that names the first image for which is_valid (B,) is False."""
        if not is_valid.all():
            name = self.names[indices[int(is_valid.int().argmin())]]
            raise InputError(f"{self.features} is damaged (for {name} it contains {problem}): run preparedataset.py "
                             "with --features again")
        return values

    def _read(self, name, indices):
        if self._process != os.getpid():    # each worker opens the file itself, also after a fork
            self._file, self._process = open_hdf5(self.features, ("features",)), os.getpid()
        order, inverse = np.unique(np.asarray(indices), return_inverse=True)
        with reading(self.features):
            return torch.from_numpy(self._file[name][order][inverse]).float()    # faster than NumPy's conversion

    @property
    def feature_dim(self):
        """Channels C of the stored features."""
        with open_hdf5(self.features) as file, reading(self.features):
            return file["features"].shape[2]

    def __getstate__(self):
        return self.__dict__ | {"_file": None, "_process": None}    # an open file cannot be sent to another process

    def read_images(self, indices, captions):
        """Images (B, 3, S, S) float32, normalised; the captions (B, N, L) of flipped images are changed in place."""
        batch = torch.stack([images.resize(images.read_image(Path(self.image_folder, self.paths[i])), self.image_size)
                             for i in indices])
        if self.augment:
            # "picture": a constant that separates these random numbers from those of the captions
            batch, flipped = images.augment(batch, [self._seed(i, "picture") for i in indices])
            left, right = self.sides
            if left is not None and right is not None:
                swapped = torch.where(captions == left, right, torch.where(captions == right, left, captions))
                captions.copy_(torch.where(flipped[:, None, None], swapped, captions))
        return images.normalise(batch)
