"""Grounding (docs/method.md, section 12): does the image's share in a word tell whether the image shows its object?

Only the decoder is explained; no relevance passes through the CNN.
"""
from itertools import combinations

import torch
from torch.nn import functional as F

from captioning import grounding as flagging
from captioning.experiments.batch import word_log_p
from captioning.experiments.tpfp import auc

GROUPS = ("all objects", "biased objects")
FOLDS = 5


def grounding(batch, rows, steps):
    """Scores for "the image shows the object that the word names", for object words.

    Method lrp: image (the relevance of the image), share (its share of the logit) and absolute_share
    (captioning.grounding.image_share). Method model: log_p (log-probability of the word), log_p_gain (the same less its
    log-probability after the same words without the image, that is, with features of zero) and, for Ada-LSTM, 1-beta.

    rows, steps (n,) -> {(method, score): (n,)}; as method reference: present, biased (the object is the second of a
    biased pair), category (its number in the alphabetical order of all), image (its index) and, if the study has a
    calibration, flagged.
    """
    study, features = batch.study, batch.features
    entries = [study.boxes.get(name) for name in batch.names]
    present = [study.objects.present(*pair) for pair in zip(entries, batch.references, strict=True)]
    categories = [(b, batch.categories[b][t]) for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
    numbers = {name: number for number, name in enumerate(sorted(set(study.objects.words.values())))}
    explanation = batch.explanation("lrp")
    log_p = batch.log_p[rows, steps]
    # regions of zeros would count as padding; the smallest positive number does not, and changes no sum
    blank = torch.full_like(features[:1], torch.finfo(features.dtype).tiny)
    without_image = word_log_p(study.model, blank, batch.captions[rows], steps, torch.zeros_like(rows))
    image, logit = explanation.image[rows, steps], explanation.targets[rows, steps]
    values = {("reference", "present"): log_p.new_tensor([category in present[b] for b, category in categories]),
              ("reference", "biased"): log_p.new_tensor([name in study.objects.biased for _, name in categories]),
              ("reference", "category"): log_p.new_tensor([numbers[name] for _, name in categories]),
              ("reference", "image"): log_p.new_tensor(batch.indices)[rows],
              ("lrp", "image"): image, ("lrp", "share"): image / logit,
              ("lrp", "absolute_share"): flagging.image_share(explanation)[rows, steps],
              ("model", "log_p"): log_p, ("model", "log_p_gain"): log_p - without_image}
    if batch.beta is not None:
        values["model", "1-beta"] = 1 - batch.beta[rows, steps]
    if study.calibration:
        flagged = flagging.flags(explanation, batch.captions, study.vocabulary, study.calibration)
        values["reference", "flagged"] = flagged[rows, steps].to(log_p)
    return values


def split_values(values):
    """Values of `grounding` -> {score: (n,)}, {reference: (n,)}; pairs of scores, "a + b", are included."""
    tensors = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in values.items()}
    reference = {name: tensor for (method, name), tensor in tensors.items() if method == "reference"}
    scores = {name: tensor for (method, name), tensor in tensors.items() if method != "reference"}
    present, fold = reference["present"], reference["image"] % FOLDS
    pairs = {f"{a} + {b}": cross_validated(torch.stack([scores[a], scores[b]], 1), present, fold)
             for a, b in combinations(scores, 2)}
    return scores | pairs, reference


def groups(reference):
    """{group: (n,) bool} of all objects and, if there are any, of biased objects."""
    masks = dict(zip(GROUPS, (torch.ones_like(reference["biased"]) > 0, reference["biased"] > 0), strict=True))
    return {name: mask for name, mask in masks.items() if mask.any()}


def areas(values):
    """{(score, group): (area under the ROC curve, its standard error, number of words)}, and with a calibration the
    precision and recall of flags as detector of absent objects as {("flagged", …): (share, error, number of words)}."""
    scores, reference = split_values(values)
    present = reference["present"] > 0
    table = {(name, group): (*auc(score[mask], present[mask]), int(mask.sum()))
             for name, score in scores.items() for group, mask in groups(reference).items()}
    if "flagged" in reference:
        flagged = reference["flagged"] > 0
        table |= {("flagged", "precision"): share(~present[flagged]), ("flagged", "recall"): share(flagged[~present]),
                  ("flagged", "correct words kept"): share(~flagged[present])}
    return table


def share(is_true):
    """(share of True, its binomial standard error, number) of (n,) bool; NaN for no words."""
    mean = is_true.double().mean().item()
    return mean, (mean * (1 - mean) / max(1, len(is_true))) ** 0.5, len(is_true)


def cross_validated(x, y, fold):
    """(n,) predicted logits of y (n,), 0 or 1, from x (n, m): a logistic regression per fold, fitted to the others.

    fold (n,): number of each word's fold. Words of one image belong to one fold.
    """
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-12)
    logits = torch.zeros_like(y)
    for number in fold.unique():
        is_held_out = fold == number
        weights = fit_logistic(x[~is_held_out], y[~is_held_out])
        logits[is_held_out] = F.pad(x[is_held_out], (0, 1), value=1) @ weights
    return logits


def fit_logistic(x, y, ridge=1.0, iterations=25):
    """Weights (m+1,), the constant last, of a logistic regression of y (n,) on x (n, m): Newton's method, with the
    penalty ridge/2 · |weights|², which keeps them finite where a line separates the classes."""
    x = F.pad(x, (0, 1), value=1)
    weights, penalty = x.new_zeros(x.shape[1]), ridge * torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(iterations):
        p = (x @ weights).sigmoid()
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty
        weights = weights - torch.linalg.solve(hessian, x.T @ (p - y) + penalty @ weights)
    return weights
