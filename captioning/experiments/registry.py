"""The experiments, one entry each: which words, which measure, which table, which plot."""
import math
from typing import NamedTuple

import torch

from captioning.experiments.ablation import patch_ablation, word_ablation
from captioning.experiments.correctness import THRESHOLDS, correctness
from captioning.experiments.deletion_insertion import FRACTIONS, deletion_insertion
from captioning.experiments.localisation import mask_mass, pointing_game
from captioning.experiments.sanity import sanity
from captioning.experiments.tpfp import auc, roc_curve, tpfp
from captioning.explanation.methods import report_omitted
from captioning.report import plots


class Score(NamedTuple):
    """A line of a table."""
    mean: float
    error: float        # standard error
    count: int


def after(mask, first):
    """mask (B, T) without the steps before `first`."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= first)


def means(values):
    """{(method, measure): Score} of the values {(method, measure): numbers}."""
    return {key: mean_and_error(numbers) for key, numbers in values.items()}


def mean_and_error(numbers):
    n = len(numbers)
    mean = math.fsum(numbers) / n
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (n - 1) / n) if n > 1 else math.nan
    return Score(mean, error, n)


def areas(values):
    """Of tpfp: {(method, statistic): Score}, the mean over pairs of a right and a wrong word that is the area under the
    ROC curve, with its standard error."""
    scores, right = scores_and_labels(values)
    return {key: Score(*auc(own, right), len(right)) for key, own in scores.items()}


def scores_and_labels(values):
    """{(method, statistic): (words,)} and whether each word is right, (words,) bool."""
    tensors = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in values.items()}
    return tensors, tensors.pop(("reference", "right")) > 0


def draw_ablation(path, table, values):
    titles = {"disappears": "20 patches grey: words that disappear", "patch_drop": "drop of those that stay",
              "object_word_drop": "3 words deleted: drop of object words", "stop_word_drop": "drop of stop words"}
    plots.draw_bars(path, {title: by_method(table, measure) for measure, title in titles.items()})


def draw_correctness(path, table, values):
    shares = {method: [table[method, str(tau)].mean for tau in THRESHOLDS] for method in by_method(table, "0.9")}
    plots.draw_correctness(path, THRESHOLDS, shares, table["box", "0.0"].mean)


def draw_tpfp(path, table, values):
    scores, right = scores_and_labels(values)
    if right.all() or not right.any():
        print(f"tpfp: all {len(right)} words are {'right' if right.all() else 'wrong'}: there is no ROC curve")
        return
    plots.draw_roc(path, {name: {method: roc_curve(own, right) for (method, measured), own in scores.items()
                                 if measured in (name, "1-beta")}
                          for name in ("mean", "positive_mean", "absolute_mean", "maximum")})


def draw_curves(path, table, values):
    panels = {name: {method: [table[method, f"{name}_{x}"] for x in FRACTIONS] for method in by_method(table, name)}
              for name in ("deletion", "insertion")}
    plots.draw_curves(path, panels, FRACTIONS, "share of patches", "log-probability of the word")


def draw_localisation(measure, title):
    return lambda path, table, values: plots.draw_bars(path, {title: by_method(table, measure)})


def draw_sanity(path, table, values):
    layers = sorted({measure for _, measure in table})
    panels = {"another model, another explanation": {method: [table[method, layer] for layer in layers]
                                                     for method in by_method(table, layers[0])}}
    plots.draw_curves(path, panels, [layer.split("_", 1)[1] for layer in layers], "randomised down to this layer",
                      "rank correlation with the explanation")


def by_method(table, measure):
    """{method: Score} of one measure."""
    return {method: score for (method, name), score in table.items() if name == measure}


class Experiment(NamedTuple):
    """parts: [(which words of a batch, (B, T) bool, and the function that measures them)]; table(values) -> Scores;
    draw(path, table, values); shown: the measures that the screen shows."""
    parts: tuple
    draw: object
    shown: tuple
    table: object = means


EXPERIMENTS = {
    "ablation": Experiment(((lambda batch: after(batch.stop_words | batch.object_words, 6), word_ablation),
                            (lambda batch: after(batch.object_words, 1), patch_ablation)), draw_ablation,
                           ("disappears", "patch_drop", "object_word_drop", "stop_word_drop")),
    "correctness": Experiment(((lambda batch: batch.boxed_words, correctness),), draw_correctness,
                              ("0.0", "0.3", "0.6", "0.9")),
    "tpfp": Experiment(((lambda batch: batch.frequent_words, tpfp),), draw_tpfp,
                       ("mean", "positive_mean", "absolute_mean", "maximum", "quantile_0.5", "1-beta"), areas),
    "deletion_insertion": Experiment(((lambda batch: after(batch.object_words, 1), deletion_insertion),), draw_curves,
                                     ("deletion", "insertion")),
    "pointing_game": Experiment(((lambda batch: batch.boxed_words, pointing_game),),
                                draw_localisation("hit", "most relevant pixel in the box"), ("hit",)),
    "mask_mass": Experiment(((lambda batch: batch.masked_words, mask_mass),),
                            draw_localisation("inside", "positive relevance on the object"), ("inside",)),
    "sanity": Experiment(((lambda batch: after(batch.object_words, 1), sanity),), draw_sanity, ()),
}


NEED_BOXES = {"correctness", "pointing_game"}


NEED_PIXELS = {patch_ablation, tpfp, deletion_insertion, pointing_game, mask_mass, sanity}     # parts of experiments


def experiments_for_regions(names, weight):
    """Those of the experiments that need no pixels; says in one sentence what is left out."""
    left = [name for name in names if any(part not in NEED_PIXELS for _, part in EXPERIMENTS[name].parts)]
    missing = [part.__name__ for name in names for _, part in EXPERIMENTS[name].parts if part in NEED_PIXELS]
    if missing:
        report_omitted(missing, weight)
    return left
