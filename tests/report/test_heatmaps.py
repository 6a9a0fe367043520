"""The PNGs of an explanation: colours show the sign, zero is transparent, and labels fit."""
import numpy as np
import pytest
from helpers import pixels, reds_and_blues, refused
from made_up import random_explanation, random_image
from PIL import Image, ImageDraw

from captioning.explanation.methods import METHODS
from captioning.files import shortened
from captioning.report import colours
from captioning.report.colours import LEVELS, PARTS, colour_maps
from captioning.report.explained_image import Relevance, compact
from captioning.report.heatmaps import (
    draw_heatmaps,
    grey_background,
    labels,
    overlay,
    thumbnail,
)

GREY = Image.new("RGB", (90, 60), (128, 128, 128))


def draw(path, words, maps, method="lrp", image=GREY, **fields):
    """Draws an explanation with these maps (T, h, w), or (T, K) with `boxes`; without a split."""
    relevance = Relevance(regions=maps) if "boxes" in fields else Relevance(pixels=maps)
    explained = random_explanation(words, (), image=image, **fields)
    explained.methods[method] = relevance
    draw_heatmaps(path, explained, method)
    return path


@pytest.fixture
def texts(monkeypatch):
    """The texts drawn during the test."""
    drawn = []
    text = ImageDraw.ImageDraw.text

    def record(self, xy, string, *rest, **options):
        drawn.append(string)
        text(self, xy, string, *rest, **options)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def test_very_long_words_and_captions_are_cut(tmp_path, texts):
    """Their whole length would take minutes and gigabytes."""
    words = ["x" * 10_000] * 3
    path = draw(tmp_path / "x.png", words, np.ones((3, 8, 8), np.float32))
    assert Image.open(path).height < 1000
    assert max(len(line) for text in texts for line in text.split("\n")) < 200


# -- colours ---------------------------------------------------------------------------------------


def test_colours_are_pure_red_and_blue_that_grow_opaque_with_relevance():
    rgba, _ = colour_maps(np.tile(np.linspace(-1, 1, 201), (1, 201, 1)), signed=True)
    middle = rgba[0, 100, 20:181].astype(int)       # without the border: smoothing pads with zeros
    assert np.array_equal(middle[:, 3], middle[::-1, 3]) and (np.diff(middle[80:, 3]) >= 0).all()
    assert middle[80, 3] == 0 and middle[-1, 3] > 200
    for half in (middle[:80, :3], middle[81:, :3]):
        assert len(np.unique(half, axis=0)) == 1
    assert middle[0, 2] > 200 > middle[0, 0] and middle[-1, 0] > 200 > middle[-1, 2]


@pytest.mark.parametrize("signed", [True, False])
def test_the_legend_has_the_colours_of_the_map_zero_included(signed):
    values = np.linspace(-1 if signed else 0, 1, 2 * LEVELS + 1)
    maps = np.tile(values.repeat(9), (1, 3, 1))
    seen = {tuple(rgba) for rgba in colour_maps(maps, signed)[0].reshape(-1, 4).tolist()}
    steps = {tuple(rgba) for rgba in colours.legend(signed, 2 * LEVELS + 1).tolist()}
    assert len(steps - seen) <= 3 and any(rgba[3] == 0 for rgba in steps)
    rgba, tops = colour_maps(np.zeros((2, 9, 9)), signed)
    assert not rgba[..., 3].any() and not tops.any()


def test_a_single_relevant_pixel_is_visible_and_hides_no_others():
    maps = np.zeros((1, 300, 300))
    maps[0, 150, 150] = 1e-9
    assert colour_maps(maps, True)[0][..., 3].max() > 230
    assert colour_maps(maps, False)[0][..., 3].max() > 180
    maps = np.ones((1, 100, 100))
    maps[0, 50, 50] = 1e6
    assert np.median(colour_maps(maps, False)[0][..., 3]) > 180


def test_each_map_has_its_own_scale_unless_it_is_shared():
    factors = np.array([1, 1e-6])
    maps = np.random.default_rng(0).normal(size=(1, 40, 40)) * factors[:, None, None]
    rgba, tops = colour_maps(maps, True)
    assert np.abs(rgba[0].astype(int) - rgba[1]).max() <= 1
    assert np.isclose(tops[0], 1e6 * tops[1], rtol=1e-3)
    shared, shared_tops = colour_maps(maps, True, shared_scale=True)
    assert np.array_equal(shared[0], rgba[0]) and not shared[1, ..., 3].any()
    assert (shared_tops == tops[0]).all()
    values = np.array([[1.0, -2.0], [0.5, 0.25]])
    assert np.array_equal(colours.scale_regions(values)[0], [[0.5, -1], [1, 0.5]])
    assert np.array_equal(colours.scale_regions(values, True)[0], values / 2)


def test_smoothing_is_a_convolution_that_keeps_the_sum():
    maps = np.zeros((2, 100, 100))
    maps[1, 40, 60] = 3
    smoothed = colours.smooth(maps)
    assert np.isclose(smoothed[1].sum(), 3) and not smoothed[0].any()
    kernel = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    kernel /= kernel.sum()
    assert np.allclose(smoothed[1, 38:43, 58:63], 3 * np.outer(kernel, kernel))


def test_words_are_normalised_without_start():
    matrix = np.array([[5.0, 0, 0], [-90, 2, 0], [70, -1, 0.5]])
    expected = [[0, 0, 0], [0, 1, 0], [0, -1, 0.5]]
    assert np.array_equal(colours.normalise_words(matrix), expected) and matrix[1, 0] == -90


@pytest.mark.parametrize("magnitude", [1e-9, 1e-3, 1e3, 1e6])
def test_stored_maps_are_rounded_to_a_small_share_of_their_maximum(magnitude):
    maps = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32) * magnitude
    maps[2] = 0
    stored = compact(maps)
    assert stored.dtype == (np.float16 if magnitude in (1e-3, 1e3) else np.float32)
    assert not stored[2].any()
    assert np.abs(stored.astype(float) - maps).max() <= 1.01 * np.abs(maps).max() / 256


# -- heatmaps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_regions", [False, True])
def test_positive_is_red_and_negative_blue(tmp_path, of_regions):
    fields = {}
    maps = np.zeros((1, 20, 20))
    maps[0, 5:15, 5:15] = 1
    if of_regions:
        maps = np.array([[1.0, 0.0]])
        fields["boxes"] = np.array([[0, 0, 40, 40], [20, 20, 90, 60.0]])
    positive = reds_and_blues(draw(tmp_path / "positive.png", ["dog"], maps, **fields))
    negative = reds_and_blues(draw(tmp_path / "negative.png", ["dog"], -maps, **fields))
    assert positive[0] > negative[0] + 200 and negative[1] > positive[1] + 200  # less the legend


def test_without_relevance_the_image_is_grey_beside_itself_in_colour(tmp_path):
    image = random_image()
    rgba, _ = colour_maps(np.zeros((1, 9, 9)), True)
    assert np.array_equal(overlay(image, rgba[0]), grey_background(image))
    assert np.ptp(np.asarray(grey_background(image)), axis=2).max() == 0
    green = Image.new("RGB", (90, 60), (20, 160, 40))
    drawn = pixels(draw(tmp_path / "x.png", ["a"], np.zeros((1, 9, 9)), image=green))
    assert (drawn == (20, 160, 40)).all(2).sum() == 190 * 127


def test_thumbnail_reduces_large_images_only():
    assert thumbnail(Image.new("RGB", (1000, 2000)), 480).size == (240, 480)
    assert np.array_equal(thumbnail(random_image(), 480), random_image())


@pytest.mark.parametrize("size", [(3000, 4), (4, 3000), (1, 1)])
def test_elongated_and_tiny_images(tmp_path, size):
    path = draw(tmp_path / "x.png", list("abcdefgh"), np.ones((8, 14, 14)),
                image=Image.new("RGB", size))
    assert max(pixels(path).shape) < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_more_words_need_more_rows_and_long_captions_more_lines(tmp_path):
    heights = [pixels(draw(tmp_path / "x.png", words, np.ones((len(words), 7, 7)))).shape[0]
               for words in (["word"] * 3, ["caption" * 9] * 3, ["word"] * 12)]
    assert heights[1] > heights[0] + 30 and heights[2] > 1.5 * heights[0]


def counts(path):
    """Pixels in the colour of each part but the grey one."""
    drawn = pixels(path)
    return {part: (drawn == PARTS[part]).all(2).sum() for part in ("image", "previous", "start")}


def test_the_split_is_a_bar_whose_lengths_are_the_parts(tmp_path, texts):
    values = zip(PARTS, (4.0, 2.0, -2.0, 0.0), strict=True)
    split = {part: np.array([value]) for part, value in values}
    maps = np.zeros((1, 4, 4))
    with_bar = counts(draw(tmp_path / "x.png", ["dog"], maps, "attention", split=split))
    assert {"image", "previous words", "<start>"} <= set(texts)
    assert not any(counts(draw(tmp_path / "y.png", ["dog"], maps, "attention")).values())
    bar = {part: count - 100 for part, count in with_bar.items()}       # less the legend's squares
    assert bar["image"] > 500 and bar["image"] == pytest.approx(2 * bar["previous"], rel=0.1)
    assert bar["start"] == pytest.approx(bar["previous"], rel=0.1)


def test_end_does_not_set_the_scale_of_the_bars(tmp_path):
    """However large its parts are: the other words' bars stay as long, and its own is cut off."""
    lengths = []
    for of_end in (1.0, 100.0):
        split = {part: np.zeros(2) for part in PARTS}
        split["image"] = np.array([2.0, 0.0])
        split["start"] = np.array([0.0, of_end])
        lengths.append(counts(draw(tmp_path / "x.png", ["dog", "<end>"], np.zeros((2, 4, 4)),
                                   split=split)))
    assert lengths[0]["image"] == lengths[1]["image"] > 1000
    assert lengths[0]["start"] < lengths[1]["start"] < 1.2 * lengths[1]["image"]


def test_maps_have_the_size_that_was_asked_for(tmp_path):
    shapes = [pixels(draw(tmp_path / "x.png", ["dog"], np.zeros((1, 4, 4)), map_size=size)).shape
              for size in (190, 380)]
    assert np.allclose(np.array(shapes[1][:2]) / shapes[0][:2], 2, atol=0.05)


def test_flagged_words_are_underlined(tmp_path, texts):
    split = {part: np.zeros(2) for part in PARTS}
    drawn = [counts(draw(tmp_path / "x.png", ["a", "dog"], np.zeros((2, 4, 4)), split=split,
                         flags=flags))["previous"] for flags in ([False, False], [False, True])]
    assert drawn[1] > drawn[0] + 40 and "underlined" in texts[-1]


def test_only_lrp_is_labelled_as_supporting_or_opposing_words(tmp_path, texts):
    labels = {method: " ".join(METHODS[method].labels) for method in METHODS}
    supporting = [method for method, label in labels.items() if "supports" in label]
    assert supporting == ["lrp", "lrp_specific", "lrp_gamma", "attn_lrp", "attn_lrp_gamma"]
    assert [*labels.values()].count("low high") == 2
    for method in METHODS:
        texts.clear()
        draw(tmp_path / "x.png", ["a"], np.ones((1, 4, 4)), method)
        drawn = " ".join(texts)
        assert all(label in drawn for label in METHODS[method].labels)
        assert ("supports" in drawn) == METHODS[method].additive


def test_the_legend_names_the_contrast():
    supporting = ("supports “cat”", "supports the word rather than “cat”")
    assert labels(METHODS["lrp"], "cat") == supporting != labels(METHODS["lrp"])
    assert labels(METHODS["gradient"], "cat") == METHODS["gradient"].labels


def test_a_folder_that_is_missing_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with refused():
        draw(tmp_path / "file" / "x.png", ["a"], np.ones((1, 4, 4)))


# -- figure for papers -----------------------------------------------------------------------------


def test_the_figure_has_a_map_and_a_bar_of_all_parts_for_every_word(tmp_path):
    words = ["a", "$x$", "y" * 10_000, "dog", "on", "a", "cat", "<end>"]
    explained = random_explanation(words, flags=np.arange(8) == 3)
    figure = explained.figure()
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps[1:]] == [shortened(word, 20) for word in words]
    assert [axis.title.get_color() != "black" for axis in maps[1:]] == explained.flags.tolist()
    bars = [axis for axis in figure.axes if axis.patches]
    for t, axis in enumerate(bars):
        parts = [explained.split[part][t] for part in PARTS]
        assert sorted(patch.get_width() for patch in axis.patches) == pytest.approx(
            sorted(map(abs, parts)))
        assert max(patch.get_x() + patch.get_width() for patch in axis.patches) == pytest.approx(
            sum(part for part in parts if part > 0))
    assert len(bars) == len(words)
    for suffix in ("pdf", "svg"):
        figure.savefig(tmp_path / f"x.{suffix}")
        assert (tmp_path / f"x.{suffix}").stat().st_size > 5000


@pytest.mark.filterwarnings("error")
def test_the_figure_of_an_empty_caption():
    assert len(random_explanation(["<end>"]).figure().axes) == 4


def test_the_figure_of_region_features_and_without_a_split():
    explained = random_explanation(["a", "<end>"], (), boxes=np.array([[0, 0, 20, 20]] * 16))
    explained.methods["gradient"] = Relevance(regions=np.ones((2, 16)))
    axes = explained.figure().axes
    assert sum(bool(axis.images) for axis in axes) == 3 and not any(axis.patches for axis in axes)
