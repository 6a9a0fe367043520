"""The PNGs of an explanation, drawn with Pillow, which takes a twentieth of matplotlib's time."""
import functools
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioning.explanation.methods import METHODS
from captioning.files import atomic_path, shortened
from captioning.report import colours
from captioning.report.colours import PARTS

CELL = 190          # width of a heatmap in pixels
COLUMNS = 6
GAP = 10
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


def draw_heatmaps(path, explained, method):
    """Draws the image, and beside it one heatmap per word; below it the split of the word's logit.

    Each heatmap has its own colour scale, unless they share one; the number below it is the value
    of the strongest colour. Names of objects that are probably not there are underlined."""
    image = explained.image
    signed = METHODS[method].signed
    # beyond an aspect ratio of 1.5 the image is limited by its height
    scale = min(CELL / image.width, 1.5 * CELL / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height))
    maps = explained.maps(method)
    if explained.boxes is None:
        rgba, tops = colours.colour_maps(maps, signed, explained.shared_scale)
        cells = [overlay(small, map_colours) for map_colours in rgba]
    else:
        values, tops = colours.scale_regions(maps, explained.shared_scale)
        cells = [_draw_boxes(small, explained.boxes * scale, row, signed) for row in values]

    # the sheet: a title, rows of cells, and the legend
    columns = min(COLUMNS, len(cells) + 1)
    row_height = 22 + height + (12 if explained.split else 0) + 16 + GAP
    sheet_width = max(columns * (CELL + GAP) + GAP, 620)
    contrast = f" rather than “{explained.contrast}”" if explained.contrast else ""
    caption = shortened(explained.caption, 1000)
    title = textwrap.wrap(f"{caption}{contrast}   [{method}]", sheet_width // 9)
    top_margin = 20 * len(title) + 12
    rows = -(-(len(cells) + 1) // columns)
    legend = top_margin + rows * row_height + 4
    sheet = Image.new("RGB", (sheet_width, legend + (40 if explained.split else 22)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, 6), "\n".join(title), "black", font(15), spacing=4)

    for position, cell in enumerate([small, *cells]):
        x = GAP + position % columns * (CELL + GAP)
        y = top_margin + position // columns * row_height
        left = x + (CELL - width) // 2
        below = y + 23 + height
        sheet.paste(cell, (left, y + 20))
        if position == 0:
            draw.text((left, y + 2), "image", GREY, font(13))
            continue
        t = position - 1
        word = shortened(explained.words[t], 40)
        face = font(14, bold=True)
        while len(word) > 4 and face.getlength(word) > CELL:
            word = word[:-2] + "…"
        draw.text((left, y + 1), word, "black", face)
        if explained.flags is not None and explained.flags[t]:
            end = left + face.getlength(word)
            draw.line((left, y + 18, end, y + 18), PARTS["previous"], 2)
        if explained.split:
            _draw_split(draw, (x, below, x + CELL, below + 9), explained, t)
            below += 12
        strongest = f"{'±' if signed else ''}{tops[t]:.2g}"
        draw.text((x + CELL, below - 1), strongest, GREY, font(11), anchor="ra")

    # the colour scale
    low, high = labels(METHODS[method], explained.contrast)
    bar = overlay(Image.new("RGB", (110, 12), (128,) * 3), colours.legend(signed, 110)[None])
    draw.text((GAP, legend), low, GREY, font(12))
    x = GAP + round(font(12).getlength(low)) + 6
    sheet.paste(bar, (x, legend + 2))
    scales = "all maps have the same scale" if explained.shared_scale else (
        "each map has its own scale")
    text = f"{high}; {scales}: below it the value of the strongest colour"
    draw.text((x + 116, legend), text, GREY, font(12))
    if explained.split:
        x = GAP
        y = legend + 20
        for part, colour in PARTS.items():
            draw.rectangle((x, y + 3, x + 9, y + 12), colour)
            draw.text((x + 14, y), PART_NAMES[part], GREY, font(12))
            x += font(12).getlength(PART_NAMES[part]) + 26
        text = "— the logit's parts (LRP)"
        if explained.flags is not None and any(explained.flags):
            text += "; underlined: an object that is probably not there"
        draw.text((x, y), text, GREY, font(12))
    with atomic_path(path, sync=False) as temporary:
        sheet.save(temporary, "png", compress_level=4)


def _draw_split(draw, box, explained, t):
    """A bar of the parts of word t, on one axis for all words.

    Positive parts extend to the right of zero, negative ones to the left. <end>, whose parts are
    often by far the largest, does not count for the scale, and its bar may be cut off."""
    x0, y0, x1, y1 = box
    values = np.stack([explained.split[part] for part in PARTS])                       # (4, T)
    counted = values[:, np.array(explained.words) != "<end>"]
    highest = counted.clip(min=0).sum(0).max(initial=0)
    lowest = counted.clip(max=0).sum(0).min(initial=0)
    unit = (x1 - x0) / ((highest - lowest) or 1)
    zero = right = left = x0 - lowest * unit
    for value, colour in zip(values[:, t] * unit, PARTS.values(), strict=True):
        if value > 0:
            _draw_bar(draw, right, right + value, box, colour)
            right += value
        elif value < 0:
            _draw_bar(draw, left + value, left, box, colour)
            left += value
    draw.line((zero, y0 - 1, zero, y1 + 1), "black")


def _draw_bar(draw, left, right, box, colour):
    """A rectangle from left to right, cut off at the box."""
    x0, y0, x1, y1 = box
    if left < x1 and right > x0:
        draw.rectangle((max(left, x0), y0, min(right, x1), y1), colour)


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
