"""Pointing game, and relevance mass inside an object's exact mask."""
import h5py
import torch
from torch.nn import functional as F

from captioning.data.hdf5 import open_hdf5, reading
from captioning.errors import InputError
from captioning.experiments.correctness import inside_boxes


class Masks:
    """Which pixels each object of a split's pictures covers, from masks_<dataset>.hdf5: `<split>/masks` (N, H, W), the
    number of the object at each pixel or 0, and `<split>/things` (N, objects), the category of each object, numbered
    from 1 as in the file's attribute `categories`."""

    def __init__(self, path, split, pictures):
        with open_hdf5(path) as file, reading(path):
            if not isinstance(file.get(f"{split}/masks"), h5py.Dataset):
                raise InputError(f"{path} has no masks of the split '{split}': choose another --split")
            self.numbers = {str(name): i for i, name in enumerate(file.attrs["categories"], start=1)}
            self.pixels = torch.from_numpy(file[f"{split}/masks"][:])
            self.things = torch.from_numpy(file[f"{split}/things"][:].astype("int64"))
        if len(self.pixels) != pictures or len(self.things) != pictures:
            raise InputError(f"{path} has masks of {len(self.pixels)} pictures, the split {split} has {pictures}: run "
                             "preparedataset.py again")

    def has(self, index, category):
        number = self.numbers.get(category)
        return number is not None and bool((self.things[index] == number).any())

    def of(self, index, category, size):
        """bool (size): the pixels of all objects of a category in picture `index`, resized to the nearest pixel."""
        own = (self.things[index] == self.numbers[category]).nonzero().squeeze(1) + 1
        mask = torch.isin(self.pixels[index].long(), own)
        return F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest")[0, 0] > 0


def pointing_game(batch, rows, steps):
    """Whether the most relevant pixel lies in a box of the word's object (Zhang et al. 2016), 0 or 1; a map without
    positive relevance misses. Baseline, as method box: the share of the picture that the object's boxes cover. For
    object words whose object has a box.

    rows, steps (n,) -> {(method, "hit"): (n,)}
    """
    size, found = tuple(batch.images.shape[-2:]), {}
    inside = inside_boxes(batch.boxes(rows, steps), size).any(1)                       # (n, S, S)
    for method in batch.study.methods:
        largest, place = batch.maps(method, rows, steps).flatten(1).max(1)
        hit = inside.flatten(1).gather(1, place[:, None]).squeeze(1) & (largest > 0)
        found[method, "hit"] = hit.to(batch.images.dtype)
    return found | {("box", "hit"): inside.to(batch.images.dtype).mean((1, 2))}


def mask_mass(batch, rows, steps):
    """The share of a word's positive relevance that lies on its object's own pixels, all objects of the category
    together; baseline, as method mask: the share of the picture that they cover. For object words whose object has a
    mask.

    rows, steps (n,) -> {(method, "inside"): (n,)}
    """
    masks, found = batch.masks(rows, steps), {}
    for method in batch.study.methods:
        maps = batch.maps(method, rows, steps).clamp(min=0)
        largest = maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        maps = maps / largest
        found[method, "inside"] = (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=torch.finfo(maps.dtype).tiny)
    return found | {("mask", "inside"): masks.to(batch.images.dtype).mean((1, 2))}
