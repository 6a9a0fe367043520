"""The PNGs of an explanation: colours show the sign, zero is transparent, and labels fit the method."""
import numpy as np
import pytest
from helpers import pixels, reds_and_blues
from PIL import Image, ImageDraw

from captioning.errors import InputError
from captioning.explanation.methods import METHODS
from captioning.report.colours import LEVELS, TABLES, colour_maps, legend, normalised_words, scale_labels, smooth
from captioning.report.explanations import compact
from captioning.report.heatmaps import PARTS, draw_heatmaps, draw_words, grey_background, overlay, thumbnail


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def grey_image():
    return np.full((60, 90, 3), 128, dtype=np.uint8)


@pytest.fixture
def texts(monkeypatch):
    """The texts drawn during the test."""
    drawn, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, string, *rest, **options: drawn.append(string) or
                        text(self, xy, string, *rest, **options))
    return drawn


# -- colours -----------------------------------------------------------------------------------------------------------


def test_colours_are_pure_red_and_blue_that_grow_opaque_with_relevance():
    rgba, _ = colour_maps(np.tile(np.linspace(-1, 1, 201), (1, 201, 1)), signed=True)
    middle = rgba[0, 100, 20:181].astype(int)       # without the border, where smoothing pads with zeros
    assert np.array_equal(middle[:, 3], middle[::-1, 3]) and (np.diff(middle[80:, 3]) >= 0).all()
    assert middle[80, 3] == 0 and middle[-1, 3] > 200
    assert len(np.unique(middle[:80, :3], axis=0)) == len(np.unique(middle[81:, :3], axis=0)) == 1
    assert middle[0, 2] > 200 > middle[0, 0] and middle[-1, 0] > 200 > middle[-1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_the_legend_has_the_colours_of_the_map_zero_included(method):
    signed = method not in ("attention", "grad_cam")
    maps = np.repeat(np.repeat(np.linspace(-1 if signed else 0, 1, 2 * LEVELS + 1)[None, None], 3, 1), 9, 2)
    colours = {tuple(rgba) for rgba in colour_maps(maps, signed)[0].reshape(-1, 4).tolist()}
    steps = {tuple(rgba) for rgba in legend(method, 2 * LEVELS + 1).tolist()}
    assert len(steps - colours) <= 3 and any(rgba[3] == 0 for rgba in steps)
    assert TABLES[signed][LEVELS, 3] == 0


def test_a_map_of_zeros_is_transparent():
    for signed in (True, False):
        rgba, tops = colour_maps(np.zeros((2, 9, 9)), signed)
        assert not rgba[..., 3].any() and not tops.any()


def test_a_single_relevant_pixel_is_visible():
    maps = np.zeros((1, 300, 300))
    maps[0, 150, 150] = 1e-9
    assert colour_maps(maps, True)[0][..., 3].max() > 230 and colour_maps(maps, False)[0][..., 3].max() > 180


def test_one_outlier_does_not_hide_other_pixels():
    maps = np.ones((1, 100, 100))
    maps[0, 50, 50] = 1e6
    assert np.median(colour_maps(maps, False)[0][..., 3]) > 180


def test_each_map_has_its_own_scale_unless_it_is_shared():
    maps = np.random.default_rng(0).normal(size=(1, 40, 40)) * np.array([1, 1e-6])[:, None, None]
    rgba, tops = colour_maps(maps, True)
    assert np.abs(rgba[0].astype(int) - rgba[1]).max() <= 1 and np.isclose(tops[0], 1e6 * tops[1], rtol=1e-3)
    shared, shared_tops = colour_maps(maps, True, shared_scale=True)
    assert np.array_equal(shared[0], rgba[0]) and not shared[1, ..., 3].any() and (shared_tops == tops[0]).all()


def test_smoothing_is_a_convolution_that_keeps_the_sum():
    maps = np.zeros((2, 100, 100))
    maps[1, 40, 60] = 3
    smoothed = smooth(maps)
    assert np.isclose(smoothed[1].sum(), 3) and not smoothed[0].any()
    kernel = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    kernel /= kernel.sum()
    assert np.allclose(smoothed[1, 38:43, 58:63], 3 * np.outer(kernel, kernel))


def test_words_are_normalised_without_start():
    matrix = np.array([[5.0, 0, 0], [-90, 2, 0], [70, -1, 0.5]])
    assert np.array_equal(normalised_words(matrix), [[0, 0, 0], [0, 1, 0], [0, -1, 0.5]]) and matrix[1, 0] == -90


@pytest.mark.parametrize("magnitude", [1e-9, 1e-3, 1e3, 1e6])
def test_stored_maps_are_rounded_to_a_small_share_of_their_maximum(magnitude):
    maps = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32) * magnitude
    maps[2] = 0
    stored = compact(maps)
    assert stored.dtype == (np.float16 if magnitude in (1e-3, 1e3) else np.float32) and not stored[2].any()
    assert np.abs(stored.astype(float) - maps).max() <= 1.01 * np.abs(maps).max() / 256


# -- heatmaps ----------------------------------------------------------------------------------------------------------


def test_positive_is_red_and_negative_blue(tmp_path):
    maps = np.zeros((1, 20, 20))
    maps[0, 5:15, 5:15] = 1
    draw_heatmaps(tmp_path / "positive.png", grey_image(), ["dog"], maps, "a dog", "lrp")
    draw_heatmaps(tmp_path / "negative.png", grey_image(), ["dog"], -maps, "a dog", "lrp")
    positive, negative = reds_and_blues(tmp_path / "positive.png"), reds_and_blues(tmp_path / "negative.png")
    assert positive[0] > negative[0] + 500 and negative[1] > positive[1] + 500     # both contain the legend


def test_without_relevance_the_image_is_grey(image):
    small = Image.fromarray(image)
    rgba, _ = colour_maps(np.zeros((1, 9, 9)), True)
    assert np.array_equal(overlay(small, rgba[0]), grey_background(small))
    assert np.ptp(np.asarray(grey_background(small)), axis=2).max() == 0


def test_the_image_itself_keeps_its_colours(tmp_path, image):
    image[:] = (20, 160, 40)
    draw_heatmaps(tmp_path / "image.png", image, ["a"], np.zeros((1, 9, 9)), "", "lrp")
    drawn = pixels(tmp_path / "image.png")
    assert (np.abs(drawn - (20, 160, 40)).max(2) < 9).sum() > 10000


def test_thumbnail_reduces_large_images_only(image):
    assert thumbnail(np.zeros((2000, 1000, 3), np.uint8)).shape == (480, 240, 3)
    assert np.array_equal(thumbnail(image), image)


@pytest.mark.parametrize("shape", [(4, 3000, 3), (3000, 4, 3), (1, 1, 3)])
def test_elongated_and_tiny_images(tmp_path, shape):
    words = list("abcdefgh")
    draw_heatmaps(tmp_path / "x.png", np.zeros(shape, np.uint8), words, np.ones((8, 14, 14)), "x", "lrp")
    assert max(pixels(tmp_path / "x.png").shape) < 2000


def test_more_words_need_more_rows_and_long_titles_more_lines(tmp_path, image):
    heights = []
    for T, title in ((3, "a caption"), (3, "a caption " * 40), (12, "a caption")):
        draw_heatmaps(tmp_path / f"{T}.png", image, ["word"] * T, np.ones((T, 7, 7)), title, "lrp")
        heights.append(pixels(tmp_path / f"{T}.png").shape[0])
    assert heights[1] > heights[0] + 50 and heights[2] > 1.5 * heights[0]


def counts(path):
    """Pixels in the colour of each part but the grey one."""
    drawn = pixels(path)
    return {part: (drawn == PARTS[part]).all(2).sum() for part in ("image", "previous", "start")}


def test_the_split_is_a_bar_whose_lengths_are_the_parts(tmp_path, texts):
    split = {part: np.array([value]) for part, value in zip(PARTS, (4.0, 2.0, -2.0, 0.0), strict=True)}
    draw_heatmaps(tmp_path / "x.png", grey_image(), ["dog"], np.zeros((1, 4, 4)), "dog", "attention", split=split)
    with_bar = counts(tmp_path / "x.png")
    draw_heatmaps(tmp_path / "y.png", grey_image(), ["dog"], np.zeros((1, 4, 4)), "dog", "attention")
    assert not any(counts(tmp_path / "y.png").values())
    bar = {part: count - 100 for part, count in with_bar.items()}       # less the squares in the legend
    assert bar["image"] > 500 and bar["image"] == pytest.approx(2 * bar["previous"], rel=0.1)
    assert bar["start"] == pytest.approx(bar["previous"], rel=0.1)
    assert {"image", "earlier words", "<start>"} <= set(texts)


def test_flagged_words_are_underlined(tmp_path, texts):
    split = {part: np.zeros(2) for part in PARTS}
    drawn = []
    for flags in ([False, False], [False, True]):
        draw_heatmaps(tmp_path / "x.png", grey_image(), ["a", "dog"], np.zeros((2, 4, 4)), "", "lrp", None, split,
                      flags)
        drawn.append(counts(tmp_path / "x.png")["previous"])
    assert drawn[1] > drawn[0] + 40 and texts[-1].startswith("underlined")


def test_only_lrp_is_labelled_as_supporting_or_opposing_words(tmp_path, texts):
    labels = {method: " ".join(scale_labels(method)) for method in METHODS}
    assert [method for method, label in labels.items() if "supports" in label] == ["lrp", "lrp_specific"]
    assert [method for method, label in labels.items() if label == "low high"] == ["grad_cam", "attention"]
    for method in METHODS:
        texts.clear()
        draw_heatmaps(tmp_path / "x.png", grey_image(), ["a"], np.ones((1, 4, 4)), "a", method)
        heatmaps = " ".join(texts)
        texts.clear()
        draw_words(tmp_path / "x.png", ["<start>"], ["a"], np.ones((1, 1)), "a", method)
        words = " ".join(texts)
        assert ("supports" in heatmaps) == ("supports" in words) == METHODS[method].additive
        assert ("negative gradient" in heatmaps) == ("gradient" in method or "guided" in method)
        assert ("negative gradient" in words) == (not METHODS[method].additive)


def test_regions(tmp_path):
    boxes = np.array([[0, 0, 40, 40], [20, 20, 90, 60.0]])
    drawn = []
    for values in ([1.0, 0.0], [-1.0, 0.0]):
        draw_heatmaps(tmp_path / "x.png", grey_image(), ["dog"], np.array([values]), "dog", "lrp", boxes)
        drawn.append(reds_and_blues(tmp_path / "x.png"))
    assert drawn[0][0] > drawn[1][0] + 200 and drawn[1][1] > drawn[0][1] + 200


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5, 20])
def test_draw_words(tmp_path, T, texts):
    read, explained = ["<start>"] + ["cat"] * (T - 1), ["cat"] * (T - 1) + ["<end>"]
    path, matrix = tmp_path / "words.png", np.tril(np.full((T, T), 0.25))
    draw_words(path, read, explained, matrix, "cats", "lrp")
    numbers = T * (T + 1) // 2
    assert texts.count("0.25") == numbers and any("each row has its own" in text for text in texts)
    red, blue = reds_and_blues(path)
    assert blue == 0 and (red > 300 * (numbers - T) if T > 1 else red == 0)     # <start> has no colour
    draw_words(path, read, explained, -matrix, "cats", "lrp")
    assert reds_and_blues(path)[0] == 0
    draw_words(path, read, explained, np.zeros((T, T)), "cats", "gradient")        # must not divide by zero
    assert pixels(path).std() > 5


def test_plots_are_written_completely_or_not_at_all(tmp_path, image):
    draw_heatmaps(tmp_path / "x.png", image, ["a"], np.ones((1, 4, 4)), "a", "lrp")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        draw_heatmaps(tmp_path / "file" / "x.png", image, ["a"], np.ones((1, 4, 4)), "a", "lrp")
