"""The experiments by name: for each, the words that it measures, its measures, its table and its plot."""
import math
from operator import attrgetter
from typing import NamedTuple

import torch

from captioning.experiments.ablation import patch_ablation, word_ablation
from captioning.experiments.correctness import THRESHOLDS, correctness
from captioning.experiments.deletion_insertion import FRACTIONS, deletion_insertion
from captioning.experiments.grounding import areas as grounding_areas
from captioning.experiments.grounding import grounding, groups, split_values
from captioning.experiments.localisation import mask_mass, pointing_game
from captioning.experiments.sanity import sanity
from captioning.experiments.tpfp import auc, roc_curve, tpfp
from captioning.explanation.methods import report_omitted
from captioning.report import plots


class Score(NamedTuple):
    """A row of a table."""
    mean: float
    error: float        # standard error
    count: int          # number of words


class Experiment(NamedTuple):
    """One entry of EXPERIMENTS.

    `values`, here and below, are {(method, measure): numbers, one per word}; a `table` is {(method, measure): Score}.
    """
    parts: tuple            # pairs of functions: batch -> words (B, T) bool; (batch, rows, steps) -> values
    draw: object            # function: (path, table, values) -> None; writes the plot
    shown: tuple            # measures printed on the screen; if empty, every fourth
    table: object           # function: values -> table


def from_step(mask, first):
    """mask (B, T) without the steps before `first`."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= first)


def means(values):
    """Table of the means over words."""
    return {key: mean_and_error(numbers) for key, numbers in values.items()}


def mean_and_error(numbers):
    """Score of a list of numbers; the standard error of a single number is NaN."""
    n = len(numbers)
    mean = math.fsum(numbers) / n
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (n - 1) / n) if n > 1 else math.nan
    return Score(mean, error, n)


def areas(values):
    """Table of tpfp: areas under the ROC curve, that is, means over pairs of a correct and an incorrect word."""
    scores, is_correct = scores_and_labels(values)
    return {key: Score(*auc(word_scores, is_correct), len(is_correct)) for key, word_scores in scores.items()}


def scores_and_labels(values):
    """Values of tpfp -> {(method, statistic): scores (words,)}, and (words,) bool, whether each word is correct."""
    tensors = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in values.items()}
    return tensors, tensors.pop(("reference", "right")) > 0


def grounding_table(values):
    """Table of grounding: areas under the ROC curve by score and group of objects."""
    return {key: Score(*row) for key, row in grounding_areas(values).items()}


def by_method(table, measure):
    """{method: Score} of one measure."""
    return {method: score for (method, name), score in table.items() if name == measure}


def draw_ablation(path, table, values):
    """Bars of words that disappear and of probability drops, per method."""
    titles = {"disappears": "20 patches hidden: object words that disappear",
              "patch_drop": "probability drop of those that remain",
              "object_word_drop": "3 words deleted: probability drop of object words",
              "stop_word_drop": "probability drop of stop words"}
    plots.draw_bars(path, {title: by_method(table, measure) for measure, title in titles.items()})


def draw_correctness(path, table, values):
    """Share of relevance inside the box over τ, and the box's share of the image."""
    shares = {method: [table[method, str(tau)].mean for tau in THRESHOLDS] for method in by_method(table, "0.9")}
    plots.draw_correctness(path, THRESHOLDS, shares, table["box", "0.0"].mean)


def draw_tpfp(path, table, values):
    """ROC curves of four statistics of the maps; none if all words are correct or all incorrect."""
    scores, is_correct = scores_and_labels(values)
    if is_correct.all() or not is_correct.any():
        label = "correct" if is_correct.all() else "incorrect"
        print(f"tpfp: all {len(is_correct)} words are {label}, so there is no ROC curve to plot")
        return
    curves = {key: roc_curve(word_scores, is_correct) for key, word_scores in scores.items()}
    plots.draw_roc(path, {statistic: {method: curve for (method, name), curve in curves.items()
                                      if name in (statistic, "1-beta")}
                          for statistic in ("mean", "positive_mean", "absolute_mean", "maximum")})


def draw_grounding(path, table, values):
    """ROC curves of the single scores and of the best pair; none if all objects are present or all absent."""
    scores, reference = split_values(values)
    present = reference["present"] > 0
    if present.all() or not present.any():
        label = "present" if present.all() else "absent"
        print(f"grounding: all {len(present)} objects are {label}, so there is no ROC curve to plot")
        return
    best = max((name for name in scores if "+" in name), key=lambda name: table[name, "all objects"].mean)
    plots.draw_roc(path, {group: {name: roc_curve(score[mask], present[mask]) for name, score in scores.items()
                                  if "+" not in name or name == best}
                          for group, mask in groups(reference).items()
                          if 0 < present[mask].sum() < mask.sum()})


def draw_deletion_insertion(path, table, values):
    """Both curves over the fraction of patches, per method."""
    panels = {name: {method: [table[method, f"{name}_{x}"] for x in FRACTIONS] for method in by_method(table, name)}
              for name in ("deletion", "insertion")}
    plots.draw_curves(path, panels, FRACTIONS, "fraction of patches", "log-probability of the word")


def draw_pointing_game(path, table, values):
    """Bars of the hit rate per method."""
    plots.draw_bars(path, {"most relevant pixel inside the box": by_method(table, "hit")})


def draw_mask_mass(path, table, values):
    """Bars of the share of relevance on the object per method."""
    plots.draw_bars(path, {"positive relevance on the object": by_method(table, "inside")})


def draw_sanity(path, table, values):
    """Rank correlation with the original map over the randomised layers, per method."""
    layers = sorted({measure for _, measure in table})
    panels = {"cascading randomisation of the weights": {method: [table[method, layer] for layer in layers]
                                                         for method in by_method(table, layers[0])}}
    plots.draw_curves(path, panels, [layer.split("_", 1)[1] for layer in layers], "randomised down to this layer",
                      "rank correlation with the original map")


def words_for_word_ablation(batch):
    """(B, T) bool: stop words and object words at steps t ≥ 6."""
    return from_step(batch.stop_words | batch.object_words, 6)


def later_object_words(batch):
    """Object words at steps t ≥ 1."""
    return from_step(batch.object_words, 1)


object_words, words_with_box, words_with_mask, frequent_words = map(attrgetter, (
    "object_words", "words_with_box", "words_with_mask", "frequent_words"))

EXPERIMENTS = {
    "ablation": Experiment(((words_for_word_ablation, word_ablation), (later_object_words, patch_ablation)),
                           draw_ablation, ("disappears", "patch_drop", "object_word_drop", "stop_word_drop"), means),
    "correctness": Experiment(((words_with_box, correctness),), draw_correctness, ("0.0", "0.3", "0.6", "0.9"), means),
    "tpfp": Experiment(((frequent_words, tpfp),), draw_tpfp,
                       ("mean", "positive_mean", "absolute_mean", "maximum", "quantile_0.5", "1-beta"), areas),
    "deletion_insertion": Experiment(((later_object_words, deletion_insertion),), draw_deletion_insertion,
                                     ("deletion", "insertion"), means),
    "pointing_game": Experiment(((words_with_box, pointing_game),), draw_pointing_game, ("hit",), means),
    "mask_mass": Experiment(((words_with_mask, mask_mass),), draw_mask_mass, ("inside",), means),
    "grounding": Experiment(((object_words, grounding),), draw_grounding,
                            ("all objects", "biased objects", "precision", "recall", "correct words kept"),
                            grounding_table),
    "sanity": Experiment(((later_object_words, sanity),), draw_sanity, (), means),
}
NEED_BOXES = {"correctness", "pointing_game"}       # experiments
NEED_IMAGES = EXPERIMENTS.keys() - {"grounding"}    # experiments that explain images even where features are stored
NEED_PIXELS = {patch_ablation, tpfp, deletion_insertion, pointing_game, mask_mass, sanity}     # parts of experiments


def experiments_for_regions(names, weight):
    """Those of the experiments `names` that region features permit; prints one sentence on the omitted ones.

    weight: path of the checkpoint, for the message.
    """
    applicable = [name for name in names if any(part not in NEED_PIXELS for _, part in EXPERIMENTS[name].parts)]
    omitted = [part.__name__ for name in names for _, part in EXPERIMENTS[name].parts if part in NEED_PIXELS]
    if omitted:
        report_omitted(omitted, weight)
    return applicable


def metrics_of(tables, methods):
    """{key: number} in metrics_<split>.json of the tables of the experiments."""
    metrics, table = {}, tables.get("correctness")
    if table:
        methods = [*methods, *(["even"] if ("even", "0.0") in table else [])]
        metrics |= {f"inside_box_{method}": table[method, "0.0"].mean for method in methods}
        metrics |= {"box_share": table["box", "0.0"].mean, "explained_words": table["box", "0.0"].count}
    table = tables.get("grounding") or {}
    keys = {("absolute_share", "all objects"): "grounding_auc", ("flagged", "precision"): "flag_precision",
            ("flagged", "recall"): "flag_recall"}
    return metrics | {name: table[key].mean for key, name in keys.items() if key in table and
                      math.isfinite(table[key].mean)}
