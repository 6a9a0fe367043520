"""The tables of the experiments on Flickr8k."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from captioning.errors import InputError
from captioning.metrics.object_words import Objects
from studies import flickr8k

OBJECTS = Objects({"dog": "dog", "puppy": "dog", "ball": "ball"})


def test_absent_object_words_are_counted():
    captions = ["a dog and a puppy with a ball", "a tree", "a ball"]
    counts = flickr8k.count_objects(captions, [["a puppy"], ["a dog"], ["a ball"]], OBJECTS)
    assert counts.tolist() == [[3, 1], [0, 0], [1, 0]]
    assert flickr8k.chair(np.stack([counts, counts])) == 1 / 4


def test_interval_contains_the_difference_unless_there_is_none():
    rng = np.random.default_rng(1)
    words = np.ones((1, 2000, 1), int)
    rare, frequent = (np.concatenate([words, rng.random((1, 2000, 1)) < share], 2)
                      for share in (0.1, 0.3))
    low, high = flickr8k.interval(rare, frequent)
    assert low < flickr8k.chair(rare) - flickr8k.chair(frequent) < high < -0.1
    expected = 2 * 1.96 * (0.1 * 0.9 + 0.3 * 0.7) ** 0.5 / 2000 ** 0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    assert (flickr8k.interval(rare, rare) == 0).all()


def test_rows_are_paired_by_seed(tmp_path):
    values = {("ce", 1): 0.50, ("ce", 2): 0.40, ("lrp", 1): 0.52, ("lrp", 2): 0.44}
    for (mode, seed), value in values.items():
        folder = tmp_path / f"aoa_{seed}" / mode
        folder.mkdir(parents=True)
        (folder / "metrics_test.json").write_text(json.dumps({"cider": value}))
    rows = list(flickr8k.score_rows("aoa", flickr8k.read_folders(tmp_path)["aoa"]))
    assert rows[0] == "| | CIDEr |" and rows[2:] == [
        "| `aoa`, ce | 45.0 |", "| `aoa`, lrp | 48.0 |", "| `aoa`, lrp − ce | +3.0 ± 1.0 |"]
    with pytest.raises(InputError, match="no finished runs"):
        flickr8k.read_folders(tmp_path / "aoa_1")


def test_object_words_are_compared_over_common_seeds(tmp_path):
    """Mode "lrp" has no seed 1, in which the control invents every ball."""
    captions = {("ce", 1): "a ball", ("ce", 2): "a dog", ("lrp", 2): "a dog", ("cider", 3): "a dog"}
    modes = {}
    for (mode, seed), caption in captions.items():
        modes.setdefault(mode, {})[str(seed)] = tmp_path / f"{mode}_{seed}"
        modes[mode][str(seed)].mkdir()
        (modes[mode][str(seed)] / "predictions_test.json").write_text(json.dumps(
            [{"image": name, "caption": caption} for name in "ab"]))
    data = SimpleNamespace(names=["a", "b"], references=[["a puppy"], ["a dog"]])
    rows = list(flickr8k.object_rows("aoa", modes, data, OBJECTS))[2:]
    assert rows == ["| `aoa`, ce | 2 | 1 | 50.0 |  |",
                    "| `aoa`, lrp | 2 | 0 | 0.0 | +0.0 [+0.0, +0.0] |",
                    "| `aoa`, cider | 2 | 0 | 0.0 |  |"]
