"""Samples demo scenes and describes them with captions.

A scene consists of a background and up to four objects. Some categories form pairs, such as dog and
ball, in which the second object comes with the first with a given probability: the planted bias.
Captions mention only what the scene contains."""
from dataclasses import dataclass

# category: (code of the emoji, nouns, plurals, hue that can be changed or None); the first noun is
# the most frequent
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
# first object of a pair: the second
PAIRS = {"dog": "ball", "woman": "umbrella", "cat": "chair", "man": "bicycle"}
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
    """One object of a scene: position and size, as fractions of the image's side, and looks."""
    category: str
    colour: str | None
    side: float         # of its emoji
    x: float            # of its centre
    y: float
    flip: bool
    angle: float        # degrees
    light: float        # factor of its brightness


@dataclass
class Scene:
    """A background and the objects in front of it."""
    kind: str           # key of SCENES
    things: list        # Thing objects in the order in which they are drawn
    groups: list        # (category, indices of its things), in the order of the captions


def sample_scene(rng, bias):
    """Samples a Scene. A first object of PAIRS comes with its second with probability `bias`."""
    kind = rng.choice(list(SCENES))
    draw = rng.random()
    if draw < 0.4:
        main = rng.choice(list(PAIRS))
    elif draw < 0.48:
        main = rng.choice(list(PAIRS.values()))
    else:
        main = rng.choice(NEUTRAL)
    counts = {str(main): 1}     # {category: number of its objects}
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
        has_colour = CATEGORIES[category][3] is not None
        colour = str(rng.choice(list(COLOURS))) if has_colour else None
        few = sum(counts.values()) <= 2
        side = rng.uniform(0.34, 0.54) if few else rng.uniform(0.3, 0.42)
        groups.append((category, range(len(things), len(things) + count)))
        things += [_place(rng, category, colour, side * rng.uniform(0.92, 1.08), things)
                   for _ in range(count)]

    # objects further back are drawn first, and those in the air before them
    def nearness(i):
        return -1 if things[i].category in IN_THE_AIR else things[i].y + things[i].side / 2
    order = sorted(range(len(things)), key=nearness)
    groups = [(category, sorted(map(order.index, members))) for category, members in groups]
    return Scene(str(kind), [things[i] for i in order], groups)


def _place(rng, category, colour, side, things):
    """A Thing at the one of five random positions where it overlaps the others least."""
    def overlap(place):
        return sum(max(0, (side + other.side) / 2 - abs(place[0] - other.x))
                   * max(0, (side + other.side) / 2 - abs(place[1] - other.y)) for other in things)
    low, high = (0.28, 0.5) if category in IN_THE_AIR else (0.5, 1 - side / 2)
    places = [(rng.uniform(side / 2, 1 - side / 2), rng.uniform(min(low, high), high))
              for _ in range(5)]
    x, y = min(places, key=overlap)
    return Thing(category, colour, side, x, max(y, side / 2), bool(rng.random() < 0.5),
                 rng.uniform(-8, 8), rng.uniform(0.85, 1.1))


def describe(scene, rng):
    """Five captions that are true of the scene, and distinct if it allows as many."""
    captions = {}       # of which a dict keeps the order
    for _ in range(40):
        captions[_caption(scene, rng)] = None
        if len(captions) == 5:
            break
    return [*captions, *list(captions)[:5 - len(captions)]]


def _caption(scene, rng):
    def there(group):
        return f"there {'are' if len(scene.groups[group][1]) > 1 else 'is'} "
    place = str(rng.choice(SCENES[scene.kind], p=[0.75, 0.25]))
    phrases = [_noun_phrase(scene, group, rng) for group in scene.groups]
    opening = str(rng.choice(["", there(0), "a picture of ", "a photo of "],
                             p=[0.7, 0.12, 0.1, 0.08]))
    if len(phrases) == 1:
        is_plural = len(scene.groups[0][1]) > 1
        alone = "" if is_plural else str(rng.choice(["", " alone"], p=[0.8, 0.2]))
        return f"{opening}{phrases[0]}{alone} {place}"
    if len(phrases) == 2:
        first, second = (0, 1) if rng.random() < 0.8 else (1, 0)
        if opening.startswith("there"):
            opening = there(first)
        relation = _relation(scene, first, second, rng)
        return f"{opening}{phrases[first]} {relation} {phrases[second]} {place}"
    conjunction = rng.choice(["and", "near"], p=[0.6, 0.4])
    relation = _relation(scene, 0, 1, rng)
    return f"{opening}{phrases[0]} {relation} {phrases[1]} {conjunction} {phrases[2]} {place}"


def _noun_phrase(scene, group, rng):
    category, members = group
    _, nouns, plurals, _ = CATEGORIES[category]
    thing = scene.things[members[0]]
    synonym = int(len(nouns) > 1 and rng.random() < 0.2)
    colour = f"{thing.colour} " if thing.colour and rng.random() < 0.85 else ""
    if len(members) > 1:
        return f"{COUNTS[len(members)]} {colour}{plurals[synonym]}"
    size = ""
    if rng.random() < 0.5:
        size = "large " if thing.side > 0.5 else "small " if thing.side < 0.34 else ""
    noun = f"{size}{colour}{nouns[synonym]}"
    return f"{'an' if noun[0] in 'aeou' else 'a'} {noun}"


def _relation(scene, first, second, rng):
    """The spatial relation of group `first` to group `second`, in words."""
    first_category, first_members = scene.groups[first]
    second_category, second_members = scene.groups[second]
    draw = rng.random()
    if (first_category, second_category) in PAIRS.items() and draw < 0.5:
        return "with"
    if len(first_members) > 1 or len(second_members) > 1 or draw > 0.85:
        return "near"
    a = scene.things[first_members[0]]
    b = scene.things[second_members[0]]
    dx = b.x - a.x
    dy = b.y - a.y
    reach = (a.side + b.side) / 2
    is_vertical = abs(dx) < 0.5 * abs(dy)
    if is_vertical and (first_category in IN_THE_AIR) != (second_category in IN_THE_AIR):
        return "above" if dy > 0 else "under"
    if is_vertical or (abs(dx) < 0.6 * reach and abs(dy) < 0.6 * reach):
        # the object drawn later is in front
        return "in front of" if first_members[0] > second_members[0] else "behind"
    if draw > 0.65:
        return "next to"
    return "to the left of" if dx > 0 else "to the right of"
