"""The PNGs of an explanation, drawn with Pillow, which takes a twentieth of matplotlib's time."""
import functools
import textwrap
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioning.files import atomic_path
from captioning.report.colours import (
    BLUE,
    PARTS,
    PLASMA,
    RED,
    colour_maps,
    is_signed,
    legend,
    normalised_words,
    scale_labels,
    word_labels,
)

CELL = 190          # width of a heatmap in pixels
COLUMNS = 6
GAP = 10
GREY = 90           # of secondary text
PART_NAMES = {"image": "image", "previous": "earlier words", "start": "<start>", "rest": "biases, ε"}


@functools.cache
def font(size, bold=False):
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def thumbnail(image, side=480):
    """uint8 (H, W, 3), reduced so that no side is longer than `side` pixels."""
    reduced = Image.fromarray(np.ascontiguousarray(image))
    reduced.thumbnail((side, side))
    return np.asarray(reduced)


def grey_background(image):
    """The image (PIL, RGB) without colour and contrast, on which colours are visible."""
    return image.convert("L").point(lambda value: 0.6 * value + 89).convert("RGB")


def overlay(image, rgba):
    """A map's colours, RGBA (h, w, 4), stretched over the image (PIL, RGB), which becomes grey -> PIL, RGB."""
    colours = Image.fromarray(rgba).resize(image.size, Image.Resampling.BILINEAR)
    return Image.alpha_composite(grey_background(image).convert("RGBA"), colours.convert("RGBA")).convert("RGB")


def draw_heatmaps(path, image, words, maps, title, method, boxes=None, split=None, flags=None, shared_scale=False):
    """Draws the image, and beside it one heatmap per word over the image; below it the split of the word's logit.

    Each heatmap has its own colour scale, unless shared_scale; the number below it is the value of the strongest
    colour. Signed maps are red where positive, blue where negative and transparent at zero; maps of the other
    methods get more opaque, and change from blue to yellow, as values grow.

    image: uint8 (H, W, 3). words: T strings. maps: (T, h, w), stretched to the image; or (T, K), values of regions with
    `boxes` (K, 4), which are x0, y0, x1, y1 in pixels of the image. split: {part: (T,)} of the parts PARTS, whose bar
    extends to the right of zero if positive. flags: (T,) whether the word was predicted from language, which
    underlines it.
    """
    signed, full_width = is_signed(method), image.shape[1]
    width, height = _cell_size(image)
    small = Image.fromarray(np.ascontiguousarray(image)).resize((width, height))
    if boxes is None:
        rgba, tops = colour_maps(maps, signed, shared_scale)
        cells = [overlay(small, colours) for colours in rgba]
    else:
        tops = np.abs(maps).max(1) if len(maps) else np.empty(0)
        tops = np.full_like(tops, tops.max(initial=0)) if shared_scale else tops
        cells = [_draw_boxes(grey_background(small), boxes * (width / full_width), row, top, signed)
                 for row, top in zip(maps, tops, strict=True)]
    columns = min(COLUMNS, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    row_height = 22 + height + (12 if split else 0) + 16 + GAP
    sheet_width = max(columns * (CELL + GAP) + GAP, 620)
    lines = textwrap.wrap(title, sheet_width // 9) or [""]
    top_margin = 20 * len(lines) + 12
    sheet = Image.new("RGB", (sheet_width, top_margin + rows * row_height + (44 if split else 26)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, 6), "\n".join(lines), "black", font(15), spacing=4)
    for position, cell in enumerate([small, *cells]):
        x, y = GAP + position % columns * (CELL + GAP), top_margin + position // columns * row_height
        left = x + (CELL - width) // 2
        sheet.paste(cell, (left, y + 20))
        if position == 0:
            draw.text((left, y + 2), "image", (GREY,) * 3, font(13))
            continue
        t, below = position - 1, y + 23 + height
        _draw_word(draw, (left, y + 1), words[t], flags is not None and flags[t])
        if split:
            _draw_split(draw, (x, below, x + CELL, below + 9), split, t)
            below += 12
        draw.text((x + CELL, below - 1), f"{'±' if signed else ''}{tops[t]:.2g}", (GREY,) * 3, font(11), anchor="ra")
    _draw_legend(draw, sheet, (GAP, sheet.height - (42 if split else 22)), method, split, flags, shared_scale)
    _save(sheet, path, small)


def _cell_size(image):
    """Width and height of the image in a cell; beyond an aspect ratio of 3 it is stretched."""
    H, W = image.shape[:2]
    ratio = min(max(H / W, 1 / 3), 3)
    return (CELL, round(CELL * ratio)) if ratio <= 1.5 else (round(1.5 * CELL / ratio), round(1.5 * CELL))


def _draw_word(draw, corner, word, flagged):
    face = font(14, bold=True)
    while len(word) > 4 and face.getlength(word) > CELL:
        word = word[:-2] + "…"
    draw.text(corner, word, "black", face)
    if flagged:
        x, y = corner
        draw.line((x, y + 17, x + face.getlength(word), y + 17), PARTS["previous"], 2)


def _draw_split(draw, box, split, t):
    """A bar of the parts of word t, on one axis for all words: positive parts right of zero, negative ones left."""
    x0, y0, x1, y1 = box
    values = np.stack([split[part] for part in PARTS])                                  # (4, T)
    positive, negative = values.clip(min=0).sum(0).max(), -values.clip(max=0).sum(0).min()
    unit = (x1 - x0) / ((positive + negative) or 1)
    zero = x0 + negative * unit
    right = left = zero
    for value, colour in zip(values[:, t] * unit, PARTS.values(), strict=True):
        if value > 0:
            draw.rectangle((right, y0, right + value, y1), colour)
            right += value
        elif value < 0:
            draw.rectangle((left + value, y0, left, y1), colour)
            left += value
    draw.line((zero, y0 - 1, zero, y1 + 1), "black")


def _draw_legend(draw, sheet, corner, method, split, flags, shared_scale):
    x, y = corner
    low, high = scale_labels(method)
    bar = overlay(Image.new("RGB", (110, 12), (128,) * 3), legend(method, 110)[None])
    draw.text((x, y), low, (GREY,) * 3, font(12))
    x += font(12).getlength(low) + 6
    sheet.paste(bar, (round(x), y + 2))
    scales = "all maps have the same scale" if shared_scale else "each map has its own scale"
    draw.text((x + 116, y), f"{high}; {scales}: below it the value of the strongest colour", (GREY,) * 3, font(12))
    if not split:
        return
    x, y = corner[0], y + 20
    for text, colour in [("the logit's parts (LRP):", None), *((PART_NAMES[part], PARTS[part]) for part in PARTS)]:
        if colour:
            draw.rectangle((x, y + 3, x + 9, y + 12), colour)
            x += 14
        draw.text((x, y), text, (GREY,) * 3, font(12))
        x += font(12).getlength(text) + 12
    if flags is not None and any(flags):
        draw.text((x, y), "underlined: from language, hardly from the image", PARTS["previous"], font(12))


def _draw_boxes(image, boxes, values, top, signed):
    """Draws boxes (K, 4), thicker and more opaque for larger absolute values (K,), the strongest on top."""
    draw = ImageDraw.Draw(image, "RGBA")
    scaled = np.asarray(values, float) / (top or 1.0)
    for k in np.argsort(np.abs(scaled)):
        strength = min(1.0, float(abs(scaled[k])))
        colour = (RED if scaled[k] > 0 else BLUE) if signed else PLASMA[3]
        # powers of the strength: otherwise overlapping regions of medium strength hide the image
        draw.rectangle(tuple(boxes[k]), (*colour, round(30 * strength ** 4)), (*colour, round(255 * strength ** 1.5)),
                       round(1 + 3 * strength))
    return image


def draw_words(path, read, explained, matrix, title, method):
    """Draws the relevance of the words read, a matrix (T, T): row t belongs to the word explained at step t.

    Each row has its own colour scale, without <start> (column 0), whose values are shown without colour. read,
    explained: T strings each. method: name, for the labels of the colours.
    """
    T, side, face = len(explained), 52, font(13)
    left = round(max(face.getlength(word) for word in explained)) + 2 * GAP
    top = round(max(face.getlength(word) for word in read)) + GAP
    width = max(left + T * side + 2 * GAP, 620)
    lines = textwrap.wrap(title, width // 9) or [""]
    top += 20 * len(lines) + 8
    sheet = Image.new("RGB", (width, top + T * 26 + 56), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, 6), "\n".join(lines), "black", font(15), spacing=4)
    rgba = np.asarray(legend("lrp", 255))
    scaled = normalised_words(matrix)
    for t in range(T):
        draw.text((left - 8, top + 26 * t + 13), explained[t], "black", face, anchor="rm")
        _draw_upright(sheet, (left + side * t + (0 if t == 0 else GAP) + side // 2, top - 4), read[t])
        for i in range(t + 1):
            x, y = left + side * i + (GAP if i else 0), top + 26 * t
            *colour, alpha = rgba[round(127 + 127 * scaled[t, i])].tolist()
            fill = tuple(round(255 + (channel - 255) * alpha / 255) for channel in colour)
            draw.rectangle((x, y, x + side - 2, y + 24), fill, (225,) * 3)
            draw.text((x + side // 2 - 1, y + 12), f"{matrix[t, i]:.2g}", "white" if alpha > 150 else "black", font(11),
                      anchor="mm")
    low, high = word_labels(method)
    draw.text((GAP, sheet.height - 44), f"rows: words explained; columns: words read; blue: {low}, red: {high}",
              (GREY,) * 3, font(12))
    draw.text((GAP, sheet.height - 26), "each row has its own colour scale, which leaves out <start>", (GREY,) * 3,
              font(12))
    _save(sheet, path)


def _draw_upright(sheet, bottom, text):
    """Text that reads upwards from the point `bottom`."""
    face = font(13)
    label = Image.new("L", (round(face.getlength(text)) + 2, 18), 0)
    ImageDraw.Draw(label).text((1, 1), text, 255, face)
    label = label.rotate(90, expand=True)
    sheet.paste((0, 0, 0), (bottom[0] - 9, bottom[1] - label.height), label)


def _save(sheet, path, photograph=None):
    """Writes a PNG of 256 colours, a third of the size of true colour: those of the bars, and others chosen on a sample
    of the pixels in which the photograph, the only part in full colour, has more than its share."""
    sample = sheet.resize((sheet.width // 4, sheet.height // 4), Image.Resampling.NEAREST)
    if photograph:
        sample, cells = Image.new("RGB", (sample.width, sample.height + photograph.height)), sample
        sample.paste(cells, (0, photograph.height))
        for x in range(0, sample.width, photograph.width):
            sample.paste(photograph, (x, 0))
    fixed = [*PARTS.values(), RED, BLUE, (255, 255, 255), (0, 0, 0)]
    chosen = sample.point(lambda value: value & 0xF8 | 4).quantize(256 - len(fixed), Image.Quantize.MEDIANCUT)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*chain(*fixed), *chosen.getpalette()[:3 * (256 - len(fixed))]])
    with atomic_path(path, sync=False) as temporary:
        sheet.quantize(palette=palette, dither=Image.Dither.NONE).save(temporary, "png", compress_level=4)
