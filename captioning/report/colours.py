"""Colours of relevance maps: the same tables colour the PNGs, the page and its legends."""
import numpy as np

from captioning.explanation.methods import METHODS

RED, BLUE = (225, 0, 20), (0, 70, 255)          # positive and negative values
PLASMA = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))     # low to high values
PARTS = {"image": (0, 128, 96), "previous": (128, 90, 190), "start": (222, 135, 0), "rest": (130, 130, 130)}
LEVELS = 127        # colours on either side of zero


def _table(signed):
    """RGBA (2·LEVELS+1, 4), uint8, of the values −1 … 1: the sign chooses the colour, the absolute value its opacity.
    Zero is transparent, and no third colour lies between."""
    values = np.linspace(-1, 1, 2 * LEVELS + 1)
    table = np.empty((len(values), 4))
    if signed:
        table[:, :3] = np.where(values[:, None] > 0, RED, BLUE)
    else:
        stops = np.linspace(0, 1, len(PLASMA))
        table[:, :3] = np.stack([np.interp(values, stops, channel) for channel in zip(*PLASMA, strict=True)], axis=1)
    table[:, 3] = 255 * (0.95 if signed else 0.75) * np.abs(values) ** 0.8
    return table.round().astype(np.uint8)


TABLES = {signed: _table(signed) for signed in (True, False)}


def is_signed(method):
    """Whether the method's maps have negative values."""
    return METHODS[method].signed


def legend(method, steps=16):
    """RGBA uint8 (steps, 4), the colours of a method's scale from its lowest to its highest value."""
    table = TABLES[is_signed(method)]
    return table[np.linspace(0 if is_signed(method) else LEVELS, 2 * LEVELS, steps).round().astype(int)]


def scale_labels(method):
    """What the lowest and the highest values of a method's maps mean, as two short labels."""
    return list(METHODS[method].labels)


def word_labels(method):
    """The same of a method's values of the words read: those of Grad-CAM are gradients, which have a sign."""
    return scale_labels(method if is_signed(method) else "gradient")


def colour_maps(maps, signed, shared_scale=False):
    """maps (T, h, w) -> (RGBA uint8 (T, h, w, 4), values (T,) of the strongest colour).

    The strongest colour is that of the 99.5th percentile of a map's absolute values, which outliers do not change; if
    nearly all values are zero, that of the maximum. shared_scale: the largest such value of all maps, for each of them.
    """
    maps = np.asarray(maps, np.float32)
    maps = smooth(maps) if signed else maps
    absolute = np.abs(maps).reshape(len(maps), -1)
    tops = np.percentile(absolute, 99.5, axis=1)
    tops = np.where(tops > 0, tops, absolute.max(1))
    if shared_scale:
        tops[:] = tops.max(initial=0)
    scaled = np.clip(maps / np.where(tops > 0, tops, 1)[:, None, None], -1, 1)
    return TABLES[signed][LEVELS + np.rint(scaled * LEVELS).astype(int)], tops


def smooth(maps):
    """Gaussian smoothing of maps (T, h, w) by about 1/100 of their side (standard deviation), which makes single pixels
    visible."""
    radius = max(1, round(maps.shape[-1] / 50))
    offsets = np.arange(2 * radius + 1)
    kernel = np.exp(-0.5 * ((offsets - radius) / (radius / 2)) ** 2)
    kernel = (kernel / kernel.sum()).astype(maps.dtype)
    h, w = maps.shape[1:]
    padded = np.pad(maps, ((0, 0), (radius, radius), (radius, radius)))
    rows = sum(k * padded[..., o:o + w] for k, o in zip(kernel, offsets, strict=True))
    return sum(k * rows[:, o:o + h] for k, o in zip(kernel, offsets, strict=True))


def normalised_words(matrix):
    """Relevance (T, T) of the words read -> in [−1, 1], each row divided by its largest absolute value among the
    caption's own words. <start> in column 0, often the largest by far, is left out of that and set to zero."""
    matrix = np.array(matrix, float)
    matrix[:, 0] = 0
    largest = np.abs(matrix).max(1, keepdims=True)
    return matrix / np.where(largest == 0, 1, largest)
