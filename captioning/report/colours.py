"""Colours of relevance maps: the same tables colour the PNGs, the page and its legends."""
import matplotlib
import numpy as np
from scipy.ndimage import gaussian_filter

RED = (225, 0, 20)          # positive values
BLUE = (0, 70, 255)         # negative values
YELLOW = (240, 180, 0)      # boxes of methods without negative values
# the parts of a word's logit
PARTS = {"image": (0, 128, 96), "previous": (128, 90, 190), "start": (222, 135, 0),
         "rest": (130, 130, 130)}
LEVELS = 127        # colours on either side of zero


def _table(signed):
    """The colours of the values −1 … 1, RGBA (2·LEVELS+1, 4), uint8: zero is transparent, and no
    third colour lies between."""
    values = np.linspace(-1, 1, 2 * LEVELS + 1)
    table = np.empty((len(values), 4))
    if signed:
        table[:, :3] = np.where(values[:, None] > 0, RED, BLUE)
    else:
        table[:, :3] = 255 * matplotlib.colormaps["plasma"](values)[:, :3]
    table[:, 3] = 255 * (0.95 if signed else 0.75) * np.abs(values) ** 0.8
    return table.round().astype(np.uint8)


TABLES = {signed: _table(signed) for signed in (True, False)}


def legend(signed, steps=16):
    """The colours of a scale from its lowest to its highest value, RGBA uint8 (steps, 4)."""
    levels = np.linspace(0 if signed else LEVELS, 2 * LEVELS, steps)
    return TABLES[signed][levels.round().astype(int)]


def colour_maps(maps, signed, shared_scale=False):
    """maps (T, h, w) -> (RGBA uint8 (T, h, w, 4), values (T,) of the strongest colour).

    The strongest colour is that of the 99.5th percentile of a map's absolute values, which outliers
    do not change; if nearly all values are zero, that of the maximum. shared_scale: the largest
    such value of all maps, for each of them."""
    maps = np.asarray(maps, np.float32)
    if signed:
        maps = smooth(maps)
    absolute = np.abs(maps).reshape(len(maps), -1)
    tops = np.percentile(absolute, 99.5, axis=1)
    tops = np.where(tops > 0, tops, absolute.max(1))
    if shared_scale:
        tops[:] = tops.max()
    scaled = np.clip(maps / np.where(tops > 0, tops, 1)[:, None, None], -1, 1)
    return TABLES[signed][LEVELS + np.rint(scaled * LEVELS).astype(int)], tops


def scale_regions(values, shared_scale=False):
    """Relevance (T, K) of regions -> (the same in [−1, 1], values (T,) of the strongest colour)."""
    tops = np.abs(values).max(1)
    if shared_scale:
        tops[:] = tops.max()
    return values / np.where(tops == 0, 1, tops)[:, None], tops


def smooth(maps):
    """Maps (T, h, w) with a Gaussian filter of 1/100 of their side: single pixels are visible."""
    radius = max(1, round(maps.shape[-1] / 50))
    return gaussian_filter(maps, (0, radius / 2, radius / 2), mode="constant",
                           radius=(0, radius, radius))


def normalise_words(matrix):
    """Relevance (T, T) of the words read -> in [−1, 1], each row relative to its largest value;
    zero for <start> in column 0, often the largest by far."""
    matrix = np.array(matrix, float)
    matrix[:, 0] = 0
    return scale_regions(matrix)[0]
