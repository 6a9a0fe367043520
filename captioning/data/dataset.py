"""One split of a prepared data set: captions in HDF5, with stored features or pictures."""
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
from captioning.data.hdf5 import open_hdf5, reading
from captioning.errors import InputError
from captioning.files import atomic_path, fingerprint, safe_name


def split_path(data_folder, dataset, split):
    return Path(data_folder) / dataset / f"{split}_{dataset}.hdf5"


def features_path(data_folder, dataset, split, encoder):
    return Path(data_folder) / dataset / f"features_{encoder}_{split}_{dataset}.hdf5"


def wordmap_path(data_folder, dataset):
    return Path(data_folder) / dataset / f"wordmap_{dataset}.json"


def pick_captions(sentences, count, generator):
    """`count` of the sentences: all, with missing ones drawn again, or as many drawn without repetition."""
    if len(sentences) < count:
        return sentences + [generator.choice(sentences) for _ in range(count - len(sentences))]
    return sentences if len(sentences) == count else generator.sample(sentences, count)


def write_split(path, records, words, captions_per_image, max_len, seed, image_folder):
    """Writes the records of one split: `captions` (N, captions_per_image, max_len + 2) ids from <start> to <end>,
    `names`, `paths` and `references`, all sentences of each image as JSON. Returns the captions."""
    captions = np.zeros((len(records), captions_per_image, max_len + 2), dtype=np.int32)
    for row, record in zip(captions, records, strict=True):
        # seeded by the name: a picture left out does not change the others' captions
        generator = random.Random(f"{seed} {record.name}")
        for line, tokens in zip(row, pick_captions(record.tokens, captions_per_image, generator), strict=True):
            ids = words.encode(tokens, max_len)
            line[:len(ids)] = ids
    buffer = io.BytesIO()       # HDF5 itself may crash on a full disk
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
    """One split, a batch at a time: {"images": features (B, K, C) or pixels (B, 3, S, S), "captions": (B, N, L) ids,
    zero-padded to the longest of the batch, "index": (B,)}.

    features: path of stored features; otherwise pictures are read and resized to image_size. augment: colour jitter and
    flips, a function of (seed, epoch, index) alone; a flipped picture has 'left' and 'right' swapped in its captions.
    captions_per_step: so many of each picture's captions, drawn anew every epoch; all by default. Without features and
    image_size it has names, references and captions only.
    """

    def __init__(self, data_folder, dataset, split, features=None, image_size=None, augment=False, seed=1,
                 captions_per_step=None):
        path = split_path(data_folder, dataset, split)
        with open_hdf5(path, ("captions", "names", "paths", "references")) as file, reading(path):
            self.captions = torch.from_numpy(file["captions"][:].astype(np.int32))  # (N, cpi, max_len + 2)
            self.names, self.paths = (list(file[name].asstr()[:]) for name in ("names", "paths"))
            self.references = [json.loads(text) for text in file["references"].asstr()[:]]
            self.image_folder, wordmap = str(file.attrs["image_folder"]), str(file.attrs["wordmap"])
        self.vocabulary = vocabulary.read(wordmap_path(data_folder, dataset))
        if wordmap != fingerprint(self.vocabulary.wordmap):
            raise InputError(f"{wordmap_path(data_folder, dataset)} is not the word map that {path} was made with: run "
                             "preparedataset.py again")
        self._check_contents(path)
        self.path, self.features, self.image_size, self.augment = path, features, image_size, augment
        self.seed, self.epoch, self.captions_per_step = seed, 0, captions_per_step
        self._file, self._reader = None, None
        self.sides = [self.vocabulary.wordmap.get(word) for word in ("left", "right")]
        if features:
            self._check_features()
        elif image_size:
            self._check_pictures()

    def _check_contents(self, path):
        """InputError if what was read cannot be a split that write_split wrote."""
        if not len(self.captions):
            raise InputError(f"the split {path} is empty: make it anew with preparedataset.py")
        sizes = {len(values) for values in (self.captions, self.names, self.paths, self.references)}
        sound = (len(sizes) == 1 and self.captions.dim() == 3 and self.captions.numel() > 0 and self.captions.min() >= 0
                 and self.captions.max() < len(self.vocabulary)
                 and all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
                         for texts in self.references))
        if not sound:
            raise InputError(f"{path} is damaged (its captions and names do not fit): make it anew with "
                             "preparedataset.py")
        for relative in self.paths:
            safe_name(relative, path)

    def _check_features(self):
        with open_hdf5(self.features, ("features",)) as file, reading(self.features):
            if file.attrs.get("names") != fingerprint(self.names):
                raise InputError(f"{self.features} was made for other pictures than {self.path}: run preparedataset.py "
                                 "with --features again")
            features = file["features"]
            if features.ndim != 3 or len(features) != len(self) or features.dtype.kind != "f":
                raise InputError(f"{self.features} holds no features (pictures, regions, channels) of "
                                 f"{len(self)} pictures: run preparedataset.py with --features again")

    def _check_pictures(self):
        if not self.image_folder:
            raise InputError(f"{self.path} was prepared without a picture folder: run preparedataset.py with "
                             "--image_folder to work on pictures")
        first = Path(self.image_folder, self.paths[0])
        if not os.path.isfile(first):
            raise InputError(f"the picture {first} is missing: run preparedataset.py again with the --image_folder "
                             "where the pictures are")

    def __len__(self):
        return len(self.captions)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitems__(self, indices):
        captions = self.captions[indices].long()                                       # (B, N, L)
        if self.captions_per_step:
            order = torch.stack([torch.rand(captions.shape[1], generator=torch.Generator().manual_seed(
                self._seed(i, "captions"))) for i in indices]).argsort(1)
            captions = captions.take_along_dim(order[:, :self.captions_per_step, None], dim=1)
        captions = captions[..., :int((captions != 0).any(0).any(0).sum())]
        pictures = self.read_features(indices) if self.features else self.read_pictures(indices, captions)
        return {"images": pictures, "captions": captions, "index": torch.as_tensor(indices)}

    def _seed(self, index, purpose):
        return int(fingerprint([self.seed, self.epoch, index, purpose]), 16) % 2**63

    def read_features(self, indices):
        """(B, K, C) float32, in one read."""
        return self._read("features", indices)

    def read_boxes(self, indices):
        """(B, K, 4) float32 of the regions of pictures with bottom-up features, x0, y0, x1, y1 in their pixels, zeros
        after their last; InputError if what the features were made of had no boxes."""
        boxes = self._read("boxes", indices)
        without = (~boxes.any(2).any(1)).nonzero().flatten().tolist()
        if without:
            raise InputError(f"{self.features} has no boxes of {self.names[indices[without[0]]]}: make it anew from "
                             "features with boxes, in .hdf5, .npz or tsv files")
        return boxes

    def region_counts(self, indices):
        """(B,) how many regions the pictures have, of at most K."""
        return self._read("counts", indices).int()

    def _read(self, name, indices):
        if self._reader != os.getpid():     # each worker opens the file for itself, also after a fork
            self._file, self._reader = open_hdf5(self.features, ("features",)), os.getpid()
        order, inverse = np.unique(np.asarray(indices), return_inverse=True)
        with reading(self.features):
            return torch.from_numpy(self._file[name][order][inverse].astype(np.float32))

    @property
    def feature_dim(self):
        """C of the stored features."""
        with open_hdf5(self.features) as file, reading(self.features):
            return file["features"].shape[2]

    def __getstate__(self):
        return self.__dict__ | {"_file": None, "_reader": None}     # an open file does not travel to another process

    def read_pictures(self, indices, captions):
        """(B, 3, S, S) float32; captions (B, N, L) of flipped pictures change in place."""
        pictures = torch.stack([images.resize(images.read_image(Path(self.image_folder, self.paths[index])),
                                              self.image_size) for index in indices])
        if self.augment:
            pictures, flipped = images.augment(pictures, [self._seed(i, "picture") for i in indices])
            left, right = self.sides
            if left is not None and right is not None:
                swapped = torch.where(captions == left, right, torch.where(captions == right, left, captions))
                captions.copy_(torch.where(flipped[:, None, None], swapped, captions))
        return images.normalise(pictures)
