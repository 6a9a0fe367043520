"""Plots of scores show every method."""
import math

from helpers import pixels, reds_and_blues

from captioning.experiments.registry import Score
from captioning.report.plots import (
    draw_bars,
    draw_correctness,
    draw_curves,
    draw_roc,
)


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
