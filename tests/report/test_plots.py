"""Plots: they are written, their colours show the sign, and their labels fit the method."""
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from captioning.errors import InputError
from captioning.experiments.registry import Score
from captioning.explanation.methods import METHODS
from captioning.report.plots import (
    colours,
    draw_bars,
    draw_correctness,
    draw_curves,
    draw_heatmaps,
    draw_roc,
    draw_words,
    scale_labels,
    smooth,
    thumbnail,
)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def pixels(path):
    with Image.open(path) as plot:
        return np.asarray(plot.convert("RGB")).astype(int)


def reds_and_blues(path):
    r, g, b = pixels(path).transpose(2, 0, 1)
    return ((r > b + 100) & (r > g + 100)).sum(), ((b > r + 100) & (b > g + 100)).sum()


def grey_image():
    return np.full((60, 90, 3), 128, dtype=np.uint8)


def test_positive_is_red_and_negative_blue(tmp_path):
    heat = np.zeros((1, 20, 20))
    heat[0, 5:15, 5:15] = 1
    draw_heatmaps(tmp_path / "positive.png", grey_image(), ["dog"], heat, "a dog", "lrp")
    draw_heatmaps(tmp_path / "negative.png", grey_image(), ["dog"], -heat, "a dog", "lrp")
    red, blue = reds_and_blues(tmp_path / "positive.png")
    assert red > 500 and blue == 0
    red, blue = reds_and_blues(tmp_path / "negative.png")
    assert red == 0 and blue > 500


def test_a_map_of_zeros_does_not_change_the_image(tmp_path, image):
    for signed in (True, False):
        assert not colours(np.zeros((9, 9)), signed)[..., 3].any()
    draw_heatmaps(tmp_path / "zero.png", grey_image(), ["a", "b"], np.zeros((2, 9, 9)), "", "lrp")
    assert reds_and_blues(tmp_path / "zero.png") == (0, 0)
    assert np.ptp(pixels(tmp_path / "zero.png"), axis=2).max() == 0       # all pixels are grey
    draw_heatmaps(tmp_path / "image.png", image, ["a"], np.zeros((1, 9, 9)), "", "lrp")
    assert np.ptp(pixels(tmp_path / "image.png"), axis=2).max() > 50     # the first panel keeps the image's colours


def test_colours_are_centred_at_zero_and_grow_opaque_with_relevance():
    ramp = np.tile(np.linspace(-1, 1, 201), (201, 1))
    rgba = colours(ramp, signed=True)
    middle = rgba[100, 20:181]          # without the border, where smoothing pads with zeros
    assert np.allclose(middle[:, 3], middle[::-1, 3])
    assert middle[80, 3] < 0.05 and (np.diff(middle[80:, 3]) >= 0).all() and middle[-1, 3] > 0.8
    assert (middle[:60, 2] > middle[:60, 0]).all() and (middle[-60:, 0] > middle[-60:, 2]).all()


def test_a_single_relevant_pixel_is_visible():
    heat = np.zeros((300, 300))
    heat[150, 150] = 1e-9
    assert colours(heat, signed=True)[..., 3].max() > 0.9
    assert colours(heat, signed=False)[..., 3].max() > 0.7


def test_one_outlier_does_not_hide_other_pixels():
    heat = np.ones((100, 100))
    heat[50, 50] = 1e6
    assert np.median(colours(heat, signed=False)[..., 3]) > 0.7


def test_colours_do_not_depend_on_the_magnitude_of_the_map():
    heat = np.random.default_rng(0).normal(size=(40, 40))
    assert np.allclose(colours(heat, True), colours(heat * 1e-6, True))


def test_smoothing_is_a_convolution_that_keeps_the_sum():
    heat = np.zeros((100, 100))
    heat[40, 60] = 3
    smoothed = smooth(heat)
    assert np.isclose(smoothed.sum(), 3)
    kernel = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    kernel /= kernel.sum()
    assert np.allclose(smoothed[38:43, 58:63], 3 * np.outer(kernel, kernel))


def test_thumbnail_reduces_large_images_only(image):
    assert thumbnail(np.zeros((2000, 1000, 3), np.uint8)).shape == (480, 240, 3)
    assert np.array_equal(thumbnail(image), image)


@pytest.mark.parametrize("shape", [(4, 3000, 3), (3000, 4, 3), (1, 1, 3)])
def test_elongated_and_tiny_images(tmp_path, shape):
    words = list("abcdefgh")
    draw_heatmaps(tmp_path / "x.png", np.zeros(shape, np.uint8), words, np.ones((8, 14, 14)), "x", "lrp")
    assert max(pixels(tmp_path / "x.png").shape) < 3000


def test_more_words_need_more_rows(tmp_path, image):
    heights = []
    for T in (3, 12):
        draw_heatmaps(tmp_path / f"{T}.png", image, ["word"] * T, np.ones((T, 7, 7)), "a caption", "lrp")
        heights.append(pixels(tmp_path / f"{T}.png").shape[0])
    assert heights[1] > 1.5 * heights[0]


def test_only_lrp_is_labelled_as_supporting_or_opposing_words(tmp_path, monkeypatch):
    labels = {method: " ".join(scale_labels(method)) for method in METHODS}
    assert [method for method, label in labels.items() if "supports" in label] == ["lrp"]
    assert [method for method, label in labels.items() if label == "low high"] == ["grad_cam", "attention"]
    texts = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: texts.append(
        " ".join(text.get_text() for text in figure.findobj(Text))) or Path(path).touch())
    for method in METHODS:
        draw_heatmaps(tmp_path / "x.png", grey_image(), ["a"], np.ones((1, 4, 4)), "a", method)
        draw_words(tmp_path / "x.png", ["<start>"], ["a"], np.ones((1, 1)), "a", method)
        heatmaps, words = texts[-2:]
        assert ("supports" in heatmaps) == ("supports" in words) == (method == "lrp")
        assert ("negative gradient" in heatmaps) == ("gradient" in method or "guided" in method)


@pytest.mark.parametrize("T", [1, 5, 20])
def test_draw_words(tmp_path, T):
    read, explained = ["<start>"] + ["cat"] * (T - 1), ["cat"] * (T - 1) + ["<end>"]
    path = tmp_path / "words.png"
    draw_words(path, read, explained, np.tril(np.ones((T, T))), "cats", "lrp")
    red, _ = reds_and_blues(path)
    draw_words(path, read, explained, -np.tril(np.ones((T, T))), "cats", "lrp")
    assert red > 1000 and reds_and_blues(path)[0] < red / 2
    draw_words(path, read, explained, np.zeros((T, T)), "cats", "gradient")        # must not divide by zero
    assert pixels(path).std() > 5


def test_each_row_has_its_own_scale(tmp_path):
    matrix = np.array([[1.0, 0], [1e-6, 1e-6]])
    draw_words(tmp_path / "words.png", ["<start>", "a"], ["a", "dog"], matrix, "a dog", "lrp")
    draw_words(tmp_path / "same.png", ["<start>", "a"], ["a", "dog"], np.array([[1.0, 0], [1, 1]]), "a dog", "lrp")
    small, equal = (reds_and_blues(tmp_path / name)[0] for name in ("words.png", "same.png"))
    assert abs(small - equal) < 0.1 * equal     # the printed numbers differ


def test_draw_correctness(tmp_path):
    taus = [i / 10 for i in range(10)]
    draw_correctness(tmp_path / "c.png", taus, {"lrp": [0.5] * 10, "attention": [0.2] * 10}, 0.3)
    two_methods = pixels(tmp_path / "c.png")
    draw_correctness(tmp_path / "c.png", taus, {"lrp": [0.5] * 10}, 0.3)
    assert two_methods.std() > 5 and (two_methods != pixels(tmp_path / "c.png")).any()


def test_plots_of_scores_show_every_method(tmp_path):
    def draw(function, *arguments):
        function(tmp_path / "x.png", *arguments)
        return pixels(tmp_path / "x.png")

    one, two = {"lrp": Score(0.7, 0.1, 9)}, {"lrp": Score(0.7, 0.1, 9), "random": Score(0.2, math.nan, 1)}
    assert draw(draw_bars, {"a": two, "b": one, "empty": {}}).shape[1] > draw(draw_bars, {"a": one}).shape[1]
    red, _ = reds_and_blues(tmp_path / "x.png")
    assert red > 500        # the colour of lrp
    for x in ([0.0, 1.0], ["W_o", "conv1"]):
        curves = {"lrp": [(0.0, 0.1, 9), (1.0, 0.1, 9)], "random": [(1.0, 0.1, 9), (0.0, 0.1, 9)]}
        different = draw(draw_curves, {"deletion": curves}, x, "x", "y")
        assert (different != draw(draw_curves, {"deletion": curves | {"random": curves["lrp"]}}, x, "x", "y")).any()
    roc = {"lrp": ([0, 0, 1], [0, 1, 1]), "random": ([0, 1], [0, 1])}
    different = draw(draw_roc, {"mean": roc, "maximum": roc | {"lrp": ([0, 1], [0, 1])}})
    assert (different != draw(draw_roc, {"mean": roc, "maximum": roc})).any()


def test_plots_are_written_completely_or_not_at_all(tmp_path, image):
    draw_heatmaps(tmp_path / "x.png", image, ["a"], np.ones((1, 4, 4)), "a", "lrp")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        draw_heatmaps(tmp_path / "file" / "x.png", image, ["a"], np.ones((1, 4, 4)), "a", "lrp")
