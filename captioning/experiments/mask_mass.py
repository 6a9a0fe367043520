"""Mask mass: the share of positive relevance on an object's segmentation mask."""
import hashlib
from pathlib import Path

import torch
from torch.nn import functional as F

from captioning.data.arrays import open_hdf5, read_whole
from captioning.errors import InputError
from captioning.experiments.batch import positive_shares
from captioning.experiments.experiment import Experiment, Part, bars


class Masks:
    """The segmentation masks of a split, read from masks_<dataset>.hdf5.

    The file contains `<split>/masks` (N, H, W), at each pixel the number of its object or 0, and
    `<split>/things` (N, objects), the category of each object, numbered from 1 in the order of the
    file's attribute `categories`. images: the number of images N."""

    def __init__(self, path, split, images):
        if not Path(path).exists():
            raise InputError(f"{path} is missing: --explanations mask_mass requires a data set "
                             "with masks, such as demo")
        with open_hdf5(path) as file:
            names = file.attrs["categories"]
            self.numbers = {str(name): i for i, name in enumerate(names, start=1)}
            pixels = read_whole(file, f"{split}/masks", "iu", (images, None, None))
            things = read_whole(file, f"{split}/things", "iu", (images, None))
        self.content_hash = hashlib.sha256(pixels.tobytes() + things.tobytes()).hexdigest()[:16]
        self.pixels = torch.from_numpy(pixels)
        self.things = torch.from_numpy(things.astype("int64"))

    def has(self, index, category):
        """Whether image `index` contains an object of the category."""
        return bool((self.things[index] == self.numbers.get(category, -1)).any())

    def mask(self, index, category, size):
        """(H, W) = size, bool: the pixels of all objects of a category, nearest-neighbour resized.
        """
        objects = (self.things[index] == self.numbers[category]).nonzero().squeeze(1) + 1
        mask = torch.isin(self.pixels[index].long(), objects)
        return F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest")[0, 0] > 0


def words_with_mask(batch):
    """The object words whose object has a mask in the image."""
    has_mask = batch.study.masks.has
    return batch.words_where(lambda b, t, _: has_mask(batch.indices[b], batch.categories[b].get(t)))


def mask_mass(batch, rows, steps):
    """The share of a word's positive relevance on the pixels of its object (measure inside).

    All objects of the category count together. Baseline, as method mask: the share of the image
    that they cover."""
    values = {}
    size = batch.images.shape[-2:]
    masks = [batch.study.masks.mask(batch.indices[b], batch.categories[b][t], size)
             for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
    masks = torch.stack(masks).to(batch.images.device)                                 # (n, H, W)
    for method in batch.study.methods:
        maps = positive_shares(batch.maps(method, rows, steps))
        total = maps.sum((1, 2)).clamp(min=torch.finfo(maps.dtype).tiny)
        values[method, "inside"] = (maps * masks).sum((1, 2)) / total
    values["mask", "inside"] = masks.to(batch.images.dtype).mean((1, 2))
    return values


MASK_MASS = Experiment(
    (Part(words_with_mask, mask_mass),),
    bars({"inside": "positive relevance on the object"}), shown=("inside",))
