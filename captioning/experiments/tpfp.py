"""True and false positives (method.md, section 9): does an explanation tell whether its word is right?"""
import torch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def tpfp(batch, rows, steps):
    """Statistics of a predicted word's map, channels summed and not normalised, as scores for "the word is right", that
    is, a reference has it: mean, mean of the positive part, mean absolute, maximum and quantiles; of Ada-LSTM also
    1 − β, as method sentinel. For frequent object words. How well they tell is the table's area under the ROC curve.

    rows, steps (n,) -> {(method, statistic): (n,)} and {("reference", "right"): (n,)}, 0 or 1.
    """
    found = {("reference", "right"): batch.right_words(rows, steps).to(batch.images.dtype)}
    if batch.beta is not None:
        found["sentinel", "1-beta"] = 1 - batch.beta[rows, steps]
    for method in batch.study.methods:
        found |= {(method, name): values for name, values in statistics(batch.maps(method, rows, steps)).items()}
    return found


def statistics(maps):
    """maps (n, S, S) -> {name: (n,)}"""
    values = maps.flatten(1)
    ordered = values.sort(1).values
    quantiles = {f"quantile_{q}": ordered[:, round(q * (values.shape[1] - 1))] for q in QUANTILES}
    return {"mean": values.mean(1), "positive_mean": values.clamp(min=0).mean(1), "absolute_mean": values.abs().mean(1),
            "maximum": ordered[:, -1], **quantiles}


def auc(scores, right):
    """Area under the ROC curve of scores (n,) for right (n,) bool: the share of pairs of a right and a wrong word in
    which the right one scores higher, ties counting half; and its standard error by Hanley and McNeil (1982). NaN where
    all words are right or all are wrong."""
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return float("nan"), float("nan")
    area = (average_ranks(scores.double())[right].sum().item() - positives * (positives - 1) / 2) / (
        positives * negatives)
    variance = (area * (1 - area) + (positives - 1) * (area / (2 - area) - area ** 2)
                + (negatives - 1) * (2 * area ** 2 / (1 + area) - area ** 2)) / (positives * negatives)
    return area, max(0.0, variance) ** 0.5


def roc_curve(scores, right):
    """False and true positive rates, lists from 0 to 1, over thresholds from high to low; equal scores go together."""
    order = scores.argsort(descending=True, stable=True)
    last = torch.cat([scores[order].diff() != 0, torch.ones(1, dtype=torch.bool)])
    hits = right[order].double()
    rates = [torch.cat([torch.zeros(1).double(), values.cumsum(0)[last] / values.sum()]).tolist()
             for values in (1 - hits, hits)]
    return rates[0], rates[1]


def average_ranks(values):
    """values (..., n) -> their ranks from 0 on, equal values sharing the mean of theirs."""
    ordered = values.sort(-1).values
    low, high = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (low + high - 1).to(values.dtype) / 2
