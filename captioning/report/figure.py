"""The heatmaps of a method as a matplotlib figure, whose words and bars stay sharp in print."""
import math

from captioning.explanation.methods import METHODS
from captioning.files import shortened
from captioning.report.colours import PARTS
from captioning.report.heatmaps import (
    COLUMNS,
    PART_NAMES,
    labels,
    pictures,
    split_bar,
    split_range,
    thumbnail,
)

WIDTH = 1.5         # of a map, in inches
PIXELS = 600        # of a map's longer side


def _hex(colour):
    """matplotlib's name of a colour of numbers from 0 to 255."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def draw_figure(explained, method):
    """The image, and beside it one heatmap per word, as heatmaps.draw_heatmaps draws them ->
    matplotlib Figure."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.patches import Patch
    image = thumbnail(explained.image, PIXELS)
    heatmaps, tops = pictures(explained, method, image)
    columns = min(COLUMNS, len(heatmaps) + 1)
    rows = math.ceil((len(heatmaps) + 1) / columns)
    height = WIDTH * image.height / image.width
    figure = Figure((columns * WIDTH, rows * (height + 0.5) + 0.3), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False,
                           height_ratios=[height, 0.1] * rows)
    for axis in axes.flat:
        axis.axis("off")

    signed = METHODS[method].signed
    for position, picture in enumerate([image, *heatmaps]):
        row, column = divmod(position, columns)
        axis = axes[2 * row, column]
        axis.imshow(picture)
        if position == 0:
            continue
        t = position - 1
        is_doubtful = explained.flags is not None and explained.flags[t]
        axis.set_title(shortened(explained.words[t], 20), fontsize=9, fontweight="bold",
                       color=_hex(PARTS["previous"]) if is_doubtful else "black",
                       parse_math=False)
        axis.text(1, -0.02, f"{'±' if signed else ''}{tops[t]:.2g}", fontsize=6, va="top",
                  ha="right", transform=axis.transAxes)
        if explained.split:
            axis = axes[2 * row + 1, column]
            for left, right, colour in split_bar(explained, t):
                axis.barh(0, right - left, left=left, color=_hex(colour))
            axis.set_xlim(*split_range(explained))
            axis.axvline(0, color="black", linewidth=0.8)

    low, high = labels(METHODS[method], explained.contrast)
    handles = [Patch(color=_hex(colour), label=PART_NAMES[name])
               for name, colour in PARTS.items()] if explained.split else []
    title = f"{method}: {low} to {high}"
    if explained.flags is not None and any(explained.flags):
        title += "; violet words: objects that are probably not there"
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False,
                  title=title, title_fontsize=7)
    return figure
