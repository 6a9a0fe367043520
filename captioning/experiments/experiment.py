"""What every experiment on explanations consists of, and the tables of its results.

Two pandas tables occur in all experiments. `values` has one row per number, with the columns image,
step, method, measure and value; `table` has one row per method and measure, with the columns mean,
standard_error and count, the number of words."""
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from captioning.report import plots

KEY = ["method", "measure"]
TABLE = ["mean", "standard_error", "count"]


def mean_table(values):
    """The mean of each measure over the words, with its standard error."""
    numbers = values.groupby(KEY, sort=False)["value"]
    return numbers.agg(mean="mean", standard_error="sem", count="count")


def table_of(rows):
    """A table from {(method, measure): (mean, standard error, count)}."""
    index = pd.MultiIndex.from_tuples(rows, names=KEY)
    return pd.DataFrame(list(rows.values()), index, TABLE)


def by_word(values):
    """The same numbers with one row per word and one column per method and measure."""
    columns = pd.MultiIndex.from_frame(values[KEY].drop_duplicates())
    return values.pivot(index=["image", "step"], columns=KEY, values="value")[columns]


def of_measure(table, measure):
    """The rows of a table for one measure, by method."""
    return table[table.index.get_level_values("measure") == measure].droplevel("measure")


def curves(table, measures):
    """{method: its rows for these measures} of the methods that have all of them."""
    methods = of_measure(table, measures[-1]).index     # baselines may have the first alone
    return {method: table.loc[method].loc[measures] for method in methods}


def bars(titles):
    """A `draw` of an Experiment: the means of measures {measure: title} as bars."""
    def draw(path, table, values):
        panels = {title: of_measure(table, measure) for measure, title in titles.items()}
        plots.draw_bars(path, panels)
    return draw


@dataclass(frozen=True)
class Part:
    """A function that measures words of one kind.

    A part of an experiment that measures explanations at steps (rows, steps), both (n,), returns
    {(method, measure): numbers (n,)}, NaN where a measure is not defined."""
    words: Callable                 # batch -> the words that are measured, (B, T) bool
    measure: Callable               # (batch, rows, steps) -> numbers of these words
    needs_pixels: bool = True       # it measures maps of pixels, which region features do not have


@dataclass(frozen=True)
class Experiment:
    """One entry of captioning.experiments.registry.EXPERIMENTS."""
    parts: tuple
    draw: Callable                  # (path, table, values): writes the plot
    shown: tuple = ()               # the measures printed on the screen; if empty, every fourth
    table: Callable = mean_table    # values -> table
    needs_boxes: bool = False
    needs_images: bool = True       # it cannot be computed from stored features of the encoder
