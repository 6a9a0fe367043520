"""Presence (docs/method.md, section 12): which score of a word tells whether the image shows the
object that the word names?

Only the decoder is explained; no relevance passes through the CNN."""
from itertools import combinations

import numpy as np
import pandas as pd

from captioning import grounding
from captioning.experiments.experiment import Experiment, Part, by_word, table_of
from captioning.experiments.tpfp import auc
from captioning.report import plots


def presence(batch, rows, steps):
    """Scores for "the image shows the object that the word names", of object words.

    Method lrp: image and absolute_share of captioning.grounding.scores, and share, the image's of
    the logit. Method model: log_p, log_p_gain and position of the same, 1-beta of Ada-LSTM and, if
    the study has a calibration, estimate, captioning.grounding.presence. Method reference: present,
    biased (the object is the second of a biased pair), category (its number in the alphabetical
    order), image (its index) and, if the study has a calibration, flagged."""
    study = batch.study
    entries = [study.boxes.get(name) for name in batch.names]
    present = [study.objects.present(entry, references)
               for entry, references in zip(entries, batch.references, strict=True)]
    named = [(b, batch.categories[b][t])
             for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
    categories = sorted(set(study.objects.words.values()))
    explanation = batch.explanation("lrp")
    scores = {name: score[rows, steps] for name, score in grounding.scores(
        study.model, batch.features, explanation, batch.captions).items()}
    image = scores["image"]

    values = {
        ("reference", "present"): image.new_tensor([name in present[b] for b, name in named]),
        ("reference", "biased"): image.new_tensor(
            [name in study.objects.biased for _, name in named]),
        ("reference", "category"): image.new_tensor([categories.index(name) for _, name in named]),
        ("reference", "image"): image.new_tensor(batch.indices)[rows],
        ("lrp", "share"): image / explanation.targets[rows, steps]}
    for name, score in scores.items():
        method = "lrp" if name in ("image", "absolute_share") else "model"
        values[method, name] = score.to(image)
    if batch.beta is not None:
        values["model", "1-beta"] = 1 - batch.beta[rows, steps]
    if study.calibration:
        estimates = grounding.presence(study.model, batch.features, explanation, batch.captions,
                                       study.vocabulary, study.calibration)[rows, steps]
        values["model", "estimate"] = estimates
        values["reference", "flagged"] = (estimates < study.calibration.threshold).to(image)
    return values


def scores_and_reference(values):
    """One row per word: its scores, also the pairs "a + b" of two scores, and its reference."""
    words = by_word(values)
    reference = words["reference"]
    scores = words.drop(columns="reference", level="method").droplevel("method", axis=1)
    for a, b in combinations(scores.columns, 2):
        fold = reference["image"] % grounding.FOLDS
        combined = cross_validated(scores[[a, b]], reference["present"], fold)
        if combined is not None:
            scores[f"{a} + {b}"] = combined
    return scores, reference


def cross_validated(x, y, fold):
    """Logits of y (n,), 0 or 1, from x (n, m): a logistic regression fitted to the other folds.

    fold (n,): the number of each word's fold; the words of one image belong to one fold. None if
    the words outside of some fold are all of one class."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    if any(y[fold != number].nunique() < 2 for number in fold.unique()):
        return None
    x = (x - x.mean()) / x.std().clip(lower=1e-12)
    # this solver penalises the constant, too
    regression = LogisticRegression(solver="liblinear", C=1, tol=1e-8, max_iter=1000)
    return cross_val_predict(
        regression, x, y, cv=PredefinedSplit(fold), method="decision_function")


def groups(reference):
    """{group: the rows of its words} of all objects and, if there are any, of biased objects."""
    is_biased = reference["biased"] > 0
    everything = pd.Series(True, reference.index)
    return {"all objects": everything} | ({"biased objects": is_biased} if is_biased.any() else {})


def area_table(values):
    """Areas under the ROC curve by score and group of objects; with a calibration also precision
    and recall of flags as a detector of absent objects."""
    scores, reference = scores_and_reference(values)
    present = reference["present"] > 0
    rows = {(name, group): auc(score[mask], present[mask])
            for name, score in scores.items() for group, mask in groups(reference).items()}
    if "flagged" in reference:
        flagged = reference["flagged"] > 0
        rows |= {("flagged", "precision"): share_of_true(~present[flagged]),
                 ("flagged", "recall"): share_of_true(flagged[~present]),
                 ("flagged", "correct words kept"): share_of_true(~flagged[present])}
    return table_of(rows)


def share_of_true(values):
    """The share of True, its binomial standard error and the number of values; NaN for none."""
    mean = values.mean()
    return mean, np.sqrt(mean * (1 - mean) / max(1, len(values))), len(values)


def draw(path, table, values):
    """ROC curves of the single scores and of the best pair; none if only one class occurs."""
    scores, reference = scores_and_reference(values)
    present = reference["present"] > 0
    if present.nunique() < 2:
        print("grounding: all objects are present, or all absent: there is no ROC curve to plot")
        return
    single = [name for name in scores if "+" not in name]
    pairs = sorted(set(scores) - set(single), key=lambda name: table["mean"][name, "all objects"])
    panels = {group: {name: (present[mask], scores[name][mask]) for name in single + pairs[-1:]}
              for group, mask in groups(reference).items() if present[mask].nunique() == 2}
    plots.draw_roc(path, panels)


PRESENCE = Experiment(
    (Part(lambda batch: batch.object_words, presence, needs_pixels=False),),
    draw, table=area_table, needs_images=False,
    shown=("all objects", "biased objects", "precision", "recall", "correct words kept"))
