"""The PNGs of an explanation, drawn with Pillow, which takes a twentieth of matplotlib's time."""
import functools
import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioning.explanation.methods import METHODS
from captioning.files import atomic_path, shortened
from captioning.report import colours
from captioning.report.colours import PARTS

MAP_SIZE = 190      # width of a heatmap in pixels
COLUMNS = 6
GREY = (90, 90, 90)     # of secondary text
PART_NAMES = {"image": "image", "previous": "previous words", "start": "<start>", "rest": "rest"}


@functools.cache
def font(size, bold=False):
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def thumbnail(image, side):
    """The image (PIL), reduced so that no side is longer than `side` pixels."""
    reduced = image.copy()
    reduced.thumbnail((side, side))
    return reduced


def grey_background(image):
    """The image (PIL, RGB) without colour and contrast, on which colours are visible."""
    return image.convert("L").point(lambda value: 0.6 * value + 89).convert("RGB")


def overlay(image, rgba):
    """The image (PIL, RGB) in grey, and over it the colours RGBA (h, w, 4) of a map -> PIL, RGB."""
    colours = Image.fromarray(rgba).resize(image.size, Image.Resampling.BILINEAR)
    grey = grey_background(image).convert("RGBA")
    return Image.alpha_composite(grey, colours.convert("RGBA")).convert("RGB")


def labels(method, contrast=""):
    """What the lowest and the highest values of a Method's maps mean, with a contrast to a word."""
    if contrast and method.labels[1] == "supports the word":
        return f"supports “{contrast}”", f"supports the word rather than “{contrast}”"
    return method.labels


def pictures(explained, method, image):
    """A picture (PIL) of the method's map for each word over `image`, the explained one in another
    size; and the values (T,) of the strongest colours."""
    signed = METHODS[method].signed
    maps = explained.maps(method)
    if explained.boxes is None:
        rgba, tops = colours.colour_maps(maps, signed, explained.shared_scale)
        return [overlay(image, map_colours) for map_colours in rgba], tops
    values, tops = colours.scale_regions(maps, explained.shared_scale)
    boxes = explained.boxes * (image.width / explained.image.width)
    return [_draw_boxes(image, boxes, row, signed) for row in values], tops


def draw_heatmaps(path, explained, method):
    """Draws the image, and beside it one heatmap per word; below it the split of the word's logit.

    Each heatmap has its own colour scale, unless they share one; the number below it is the value
    of the strongest colour. Names of objects that are probably not there are underlined."""
    image = explained.image
    signed = METHODS[method].signed
    cell = explained.map_size

    def px(length):
        """A length for maps of MAP_SIZE pixels, in proportion to the maps' size."""
        return max(1, round(length * cell / MAP_SIZE))

    # beyond an aspect ratio of 1.5 the image is limited by its height
    scale = min(cell / image.width, 1.5 * cell / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height))
    heatmaps, tops = pictures(explained, method, small)

    # the sheet: a title, rows of heatmaps, and the legend
    columns = min(COLUMNS, len(heatmaps) + 1)
    gap = px(10)
    row_height = px(22) + height + (px(12) if explained.split else 0) + px(16) + gap
    sheet_width = max(columns * (cell + gap) + gap, px(620))
    contrast = f" rather than “{explained.contrast}”" if explained.contrast else ""
    caption = shortened(explained.caption, 1000)
    title = textwrap.wrap(f"{caption}{contrast}   [{method}]", sheet_width // px(9))
    top_margin = px(20) * len(title) + px(12)
    rows = math.ceil((len(heatmaps) + 1) / columns)
    legend = top_margin + rows * row_height + px(4)
    below_legend = px(40 if explained.split else 22)
    sheet = Image.new("RGB", (sheet_width, legend + below_legend), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, px(6)), "\n".join(title), "black", font(px(15)), spacing=px(4))

    for position, heatmap in enumerate([small, *heatmaps]):
        x = gap + position % columns * (cell + gap)
        y = top_margin + position // columns * row_height
        left = x + (cell - width) // 2
        below = y + px(23) + height
        sheet.paste(heatmap, (left, y + px(20)))
        if position == 0:
            draw.text((left, y + px(2)), "image", GREY, font(px(13)))
            continue
        t = position - 1
        word = shortened(explained.words[t], 40)
        face = font(px(14), bold=True)
        while len(word) > 4 and face.getlength(word) > cell:
            word = word[:-2] + "…"
        draw.text((left, y + px(1)), word, "black", face)
        if explained.flags is not None and explained.flags[t]:
            end = left + face.getlength(word)
            draw.line((left, y + px(18), end, y + px(18)), PARTS["previous"], px(2))
        if explained.split:
            _draw_split(draw, (x, below, x + cell, below + px(9)), explained, t)
            below += px(12)
        strongest = f"{'±' if signed else ''}{tops[t]:.2g}"
        draw.text((x + cell, below - 1), strongest, GREY, font(px(11)), anchor="ra")

    _draw_legend(sheet, (gap, legend), px, explained, method)
    with atomic_path(path, sync=False) as temporary:
        sheet.save(temporary, "png", compress_level=4)


def _draw_legend(sheet, corner, px, explained, method):
    """The colour scale with its meaning and, below it, the colours of the parts of the logit."""
    gap, legend = corner
    draw = ImageDraw.Draw(sheet)
    low, high = labels(METHODS[method], explained.contrast)
    face = font(px(12))
    grey = Image.new("RGB", (px(110), px(12)), (128,) * 3)
    bar = overlay(grey, colours.legend(METHODS[method].signed, px(110))[None])
    draw.text((gap, legend), low, GREY, face)
    x = gap + round(face.getlength(low)) + px(6)
    sheet.paste(bar, (x, legend + px(2)))
    scales = "all maps have the same scale" if explained.shared_scale else (
        "each map has its own scale")
    text = f"{high}; {scales}: below it the value of the strongest colour"
    draw.text((x + px(116), legend), text, GREY, face)
    if not explained.split:
        return
    x = gap
    y = legend + px(20)
    for part, colour in PARTS.items():
        draw.rectangle((x, y + px(3), x + px(9), y + px(12)), colour)
        draw.text((x + px(14), y), PART_NAMES[part], GREY, face)
        x += face.getlength(PART_NAMES[part]) + px(26)
    text = "— the logit's parts (LRP)"
    if explained.flags is not None and any(explained.flags):
        text += "; underlined: an object that is probably not there"
    draw.text((x, y), text, GREY, face)


def split_range(explained):
    """The lowest and the highest end of the bars of all words but <end>, whose parts are often by
    far the largest; they differ, even without such words."""
    values = np.stack([explained.split[part] for part in PARTS])                       # (4, T)
    counted = values[:, np.array(explained.words) != "<end>"]
    lowest = counted.clip(max=0).sum(0).min(initial=0)
    highest = counted.clip(min=0).sum(0).max(initial=0)
    return lowest, highest if highest > lowest else lowest + 1


def split_bar(explained, t):
    """[(left, right, colour)] of the parts of word t: positive parts extend to the right of zero,
    negative ones to the left."""
    bar = []
    left = right = 0.0
    for part, colour in PARTS.items():
        value = explained.split[part][t]
        if value > 0:
            bar.append((right, right + value, colour))
            right += value
        elif value < 0:
            bar.append((left + value, left, colour))
            left += value
    return bar


def _draw_split(draw, box, explained, t):
    """The bar of word t, on one axis for all words; that of <end> may be cut off at the box."""
    x0, y0, x1, y1 = box
    lowest, highest = split_range(explained)
    unit = (x1 - x0) / (highest - lowest)
    zero = x0 - lowest * unit
    for left, right, colour in split_bar(explained, t):
        left, right = zero + left * unit, zero + right * unit
        if left < x1 and right > x0:
            draw.rectangle((max(left, x0), y0, min(right, x1), y1), colour)
    draw.line((zero, y0 - 1, zero, y1 + 1), "black")


def _draw_boxes(image, boxes, values, signed):
    """The image (PIL) in grey with boxes (K, 4), more opaque for larger absolute values (K,)."""
    image = grey_background(image)
    draw = ImageDraw.Draw(image, "RGBA")
    for k in np.argsort(np.abs(values)):        # the strongest on top
        strength = float(abs(values[k]))
        colour = colours.RED if values[k] > 0 else colours.BLUE
        if not signed:
            colour = colours.YELLOW
        # powers of the strength: otherwise overlapping regions of medium strength hide the image
        fill = (*colour, round(30 * strength ** 4))
        outline = (*colour, round(255 * strength ** 1.5))
        draw.rectangle(tuple(boxes[k]), fill, outline, round(1 + 3 * strength))
    return image
