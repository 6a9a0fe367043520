"""Demo data made on the spot: scenes of recognisable objects, true sentences on them, boxes, masks, a planted bias.

The objects are drawn by Twemoji (https://github.com/jdecked/twemoji, graphics licensed CC-BY 4.0, copyright Twitter,
Inc and other contributors; here scaled, rotated and recoloured). A picture depends on (seed, split, number) alone.
"""
from dataclasses import dataclass

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
