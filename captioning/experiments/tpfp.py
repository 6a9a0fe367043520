"""True and false positives (docs/method.md, section 9): do explanations tell correct words?"""
import torch

from captioning.data.vocabulary import tokenise
from captioning.experiments.experiment import Experiment, Part, by_word, table_of
from captioning.report import plots

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def tpfp(batch, rows, steps):
    """Statistics of a predicted word's map as scores for "a reference contains the word".

    Maps are summed over channels and not normalised. Measures: the `statistics` of each method, and
    1-beta of Ada-LSTM as method sentinel; right of method reference is 1 for correct words."""
    reference_words = [set().union(*map(tokenise, texts)) for texts in batch.references]
    is_right = [batch.words[b][t] in reference_words[b]
                for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
    values = {("reference", "right"): torch.tensor(is_right).to(batch.images)}
    if batch.beta is not None:
        values["sentinel", "1-beta"] = 1 - batch.beta[rows, steps]
    for method in batch.study.methods:
        scores = statistics(batch.maps(method, rows, steps))
        values |= {(method, name): score for name, score in scores.items()}
    return values


def statistics(maps):
    """maps (n, H, W) -> {statistic: (n,)}"""
    values = maps.flatten(1)
    ordered = values.sort(1).values
    last = values.shape[1] - 1
    return {"mean": values.mean(1), "positive_mean": values.clamp(min=0).mean(1),
            "absolute_mean": values.abs().mean(1), "maximum": ordered[:, -1],
            **{f"quantile_{q}": ordered[:, round(q * last)] for q in QUANTILES}}


def auc(scores, is_positive):
    """Area under the ROC curve of scores (n,), its standard error and n; NaN for a single class.

    The error is that of Hanley and McNeil (1982)."""
    from sklearn.metrics import roc_auc_score  # slow to import
    n = int(is_positive.sum())
    m = len(is_positive) - n
    if not n or not m:
        return float("nan"), float("nan"), n + m
    area = roc_auc_score(is_positive, scores)
    variance = (area * (1 - area) + (n - 1) * (area / (2 - area) - area ** 2)
                + (m - 1) * (2 * area ** 2 / (1 + area) - area ** 2)) / (n * m)
    return area, max(0.0, variance) ** 0.5, n + m


def scores_and_labels(values):
    """The scores, one row per word and one column per method and statistic; is the word correct?"""
    words = by_word(values)
    is_correct = words.pop(("reference", "right")) > 0
    return words, is_correct


def area_table(values):
    """Areas under the ROC curve: means over pairs of a correct and an incorrect word."""
    words, is_correct = scores_and_labels(values)
    return table_of({key: auc(scores, is_correct) for key, scores in words.items()})


def draw(path, table, values):
    """ROC curves of four statistics of the maps; none if all words are correct or incorrect."""
    words, is_correct = scores_and_labels(values)
    if is_correct.nunique() < 2:
        print("tpfp: all words are correct, or all incorrect: there is no ROC curve to plot")
        return
    panels = {}
    for statistic in ("mean", "positive_mean", "absolute_mean", "maximum"):
        panels[statistic] = {method: (is_correct, scores) for (method, name), scores in
                             words.items() if name in (statistic, "1-beta")}
    plots.draw_roc(path, panels)


TPFP = Experiment(
    (Part(lambda batch: batch.frequent_words, tpfp),), draw, table=area_table,
    shown=("mean", "positive_mean", "absolute_mean", "maximum", "quantile_0.5", "1-beta"))
