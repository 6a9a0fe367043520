"""Pointing game, and the share of relevance inside an object's segmentation mask."""
import torch
from torch.nn import functional as F

from captioning.data.hdf5 import open_hdf5, read_whole, reading
from captioning.experiments.correctness import inside_boxes


class Masks:
    """The segmentation masks of a split, read from masks_<dataset>.hdf5.

    The file contains `<split>/masks` (N, H, W), at each pixel the number of its object or 0, and `<split>/things`
    (N, objects), the category of each object, numbered from 1 in the order of the file's attribute `categories`.
    images: the number of images N. InputError if the file has no masks of the split or of another number of images.
    """

    def __init__(self, path, split, images):
        with open_hdf5(path) as file, reading(path):
            self.numbers = {str(name): i for i, name in enumerate(file.attrs["categories"], start=1)}
            self.pixels = torch.from_numpy(read_whole(file, f"{split}/masks", "iu", (images, None, None)))
            self.things = torch.from_numpy(read_whole(file, f"{split}/things", "iu", (images, None)).astype("int64"))

    def has(self, index, category):
        """Whether image `index` contains an object of the category."""
        number = self.numbers.get(category)
        return number is not None and bool((self.things[index] == number).any())

    def mask(self, index, category, size):
        """(H, W) = size, bool: the pixels of all objects of a category in image `index`, nearest-neighbour resized."""
        objects = (self.things[index] == self.numbers[category]).nonzero().squeeze(1) + 1
        mask = torch.isin(self.pixels[index].long(), objects)
        return F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest")[0, 0] > 0


def pointing_game(batch, rows, steps):
    """Whether the most relevant pixel lies in a box of the word's object (Zhang et al. 2016), 0 or 1.

    A map without positive relevance counts as a miss. For object words whose object has a box. Baseline, as method box:
    the share of the image that the object's boxes cover.

    rows, steps (n,) -> {(method, "hit"): (n,)}
    """
    size, values = tuple(batch.images.shape[-2:]), {}
    inside = inside_boxes(batch.boxes(rows, steps), size).any(1)                       # (n, H, W)
    for method in batch.study.methods:
        maximum, position = batch.maps(method, rows, steps).flatten(1).max(1)
        hit = inside.flatten(1).gather(1, position[:, None]).squeeze(1) & (maximum > 0)
        values[method, "hit"] = hit.to(batch.images.dtype)
    return values | {("box", "hit"): inside.to(batch.images.dtype).mean((1, 2))}


def mask_mass(batch, rows, steps):
    """The share of a word's positive relevance that lies on the pixels of its object, all objects of the category
    together.

    For object words whose object has a mask. Baseline, as method mask: the share of the image that the objects cover.

    rows, steps (n,) -> {(method, "inside"): (n,)}
    """
    masks, values = batch.masks(rows, steps), {}
    for method in batch.study.methods:
        maps = batch.maps(method, rows, steps).clamp(min=0)
        maximum = maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        maps = maps / maximum
        values[method, "inside"] = (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(
            min=torch.finfo(maps.dtype).tiny)
    return values | {("mask", "inside"): masks.to(batch.images.dtype).mean((1, 2))}
