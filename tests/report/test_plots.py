"""Plots of scores show every method."""
import math

import pandas as pd
from helpers import pixels, reds_and_blues

from captioning.report import plots


def table(index, *rows):
    return pd.DataFrame(list(rows), index, ["mean", "standard_error"])


def draw(folder, function, *arguments):
    function(folder / "x.png", *arguments)
    return pixels(folder / "x.png")


def test_plots_show_every_method(tmp_path):
    one = {"inside": {"lrp": table([0, 1], (0.5, 0.1), (0.4, 0.1))}}
    with_line, without = (draw(tmp_path, plots.draw_curves, one, [0, 1], "x", "y", lines)
                          for lines in ({"the box": 0.3}, None))
    assert with_line.std() > 5 and with_line.shape != without.shape or (with_line != without).any()

    one = table(["lrp"], (0.7, 0.1))
    two = table(["lrp", "random"], (0.7, 0.1), (0.2, math.nan))
    wide = draw(tmp_path, plots.draw_bars, {"a": two, "b": one, "empty": one[:0]})
    assert wide.shape[1] > draw(tmp_path, plots.draw_bars, {"a": one}).shape[1]
    red, _ = reds_and_blues(tmp_path / "x.png")
    assert red > 500        # the colour of lrp

    for x in ([0.0, 1.0], ["W_o", "conv1"]):
        rising, falling = table(x, (0.0, 0.1), (1.0, 0.1)), table(x, (1.0, 0.1), (0.0, 0.1))
        figures = [draw(tmp_path, plots.draw_curves,
                        {"deletion": {"lrp": rising, "random": other}}, x, "x", "y")
                   for other in (rising, falling)]
        assert (figures[0] != figures[1]).any()

    labels, good, bad = [True, False, True], [0.9, 0.1, 0.8], [0.1, 0.9, 0.2]
    figures = [draw(tmp_path, plots.draw_roc, {"mean": {"lrp": (labels, scores)}})
               for scores in (good, bad)]
    assert (figures[0] != figures[1]).any()
