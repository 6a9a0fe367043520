"""True and false positives (docs/method.md, section 9): statistics of explanations as predictors of correctness."""
import torch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def tpfp(batch, rows, steps):
    """Statistics of a predicted word's map as scores for "the word is correct", that is, a reference contains it.

    Maps are summed over channels and not normalised; the statistics are mean, mean of the positive part, mean absolute
    value, maximum and quantiles, and 1 − β of Ada-LSTM as method sentinel. For frequent object words. The table reports
    the area under the ROC curve of each score.

    rows, steps (n,) -> {(method, statistic): (n,)} and {("reference", "right"): (n,)}, 1 for correct words, else 0.
    """
    values = {("reference", "right"): batch.correct_words(rows, steps).to(batch.images.dtype)}
    if batch.beta is not None:
        values["sentinel", "1-beta"] = 1 - batch.beta[rows, steps]
    for method in batch.study.methods:
        values |= {(method, name): scores for name, scores in statistics(batch.maps(method, rows, steps)).items()}
    return values


def statistics(maps):
    """maps (n, H, W) -> {statistic: (n,)}"""
    values = maps.flatten(1)
    ordered = values.sort(1).values
    quantiles = {f"quantile_{q}": ordered[:, round(q * (values.shape[1] - 1))] for q in QUANTILES}
    return {"mean": values.mean(1), "positive_mean": values.clamp(min=0).mean(1), "absolute_mean": values.abs().mean(1),
            "maximum": ordered[:, -1], **quantiles}


def auc(scores, is_correct):
    """Area under the ROC curve of scores (n,) for is_correct (n,) bool, and its standard error by Hanley and McNeil
    (1982).

    The area is the share of pairs of a correct and an incorrect word in which the correct one has the higher score,
    ties counting half. Both are NaN where all words are correct or all are incorrect.
    """
    positives, negatives = int(is_correct.sum()), int((~is_correct).sum())
    if not positives or not negatives:
        return float("nan"), float("nan")
    area = (average_ranks(scores.double())[is_correct].sum().item() - positives * (positives - 1) / 2) / (
        positives * negatives)
    variance = (area * (1 - area) + (positives - 1) * (area / (2 - area) - area ** 2)
                + (negatives - 1) * (2 * area ** 2 / (1 + area) - area ** 2)) / (positives * negatives)
    return area, max(0.0, variance) ** 0.5


def roc_curve(scores, is_correct):
    """False and true positive rates, two lists from 0 to 1, over descending thresholds; ties share one threshold."""
    order = scores.argsort(descending=True, stable=True)
    last_of_tie = torch.cat([scores[order].diff() != 0, torch.ones(1, dtype=torch.bool)])
    hits = is_correct[order].double()
    false_positive_rates, true_positive_rates = [
        torch.cat([torch.zeros(1).double(), values.cumsum(0)[last_of_tie] / values.sum()]).tolist()
        for values in (1 - hits, hits)]
    return false_positive_rates, true_positive_rates


def average_ranks(values):
    """values (..., n) -> their ranks along the last dimension, from 0; ties get their average rank."""
    ordered = values.sort(-1).values
    low, high = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (low + high - 1).to(values.dtype) / 2
