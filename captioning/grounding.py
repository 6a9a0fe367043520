"""Is the object that a word names in the image? Estimates, flags, and captions without such words.

A logistic regression estimates the probability from how the word came about: LRP's parts of its
logit (docs/method.md, section 4), its probability with and without the image, its position and how
frequent it is. `evaluation.py --calibrate` fits it and stores it beside the checkpoint. Object
words whose estimate is below a threshold are flagged."""
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from captioning.data.feature_store import weights_fingerprint
from captioning.data.vocabulary import tokenise
from captioning.decoding import decode, trimmed, with_start
from captioning.errors import InputError
from captioning.explanation.methods import SPLIT
from captioning.files import expect, read_json, reading, write_json
from captioning.metrics.object_words import Objects

# what the estimate depends on: see `scores`; frequency is log(1 + the word's count in references)
SCORES = ("image", "absolute_share", "log_p", "log_p_gain", "position", "frequency")
FOLDS = 5


class Calibration(NamedTuple):
    """How the estimates are computed, and which of them are flagged."""
    threshold: float        # flagged: words with a lower estimate
    objects: Objects        # the words that name objects
    coefficients: dict      # {of SCORES or "constant": its summand in the log-odds, per unit}
    frequencies: dict       # {word: its score frequency}; 0 for others


def object_words(captions, vocabulary, objects):
    """(B, T) bool: whether captions[:, t + 1] names an object; of several words, the last does."""
    is_object = torch.zeros_like(captions[:, 1:], dtype=torch.bool)
    for row, caption in zip(is_object, captions[:, 1:].tolist(), strict=True):
        row[[step for step, _ in objects.named(vocabulary.decode(caption))]] = True
    return is_object


def scores(model, features, explanation, captions):
    """{name: (B, T)} of SCORES but frequency, for the words captions[:, t + 1].

    image: the relevance of the image; absolute_share: the same divided by the absolute values of
    the logit's parts, which is in [−1, 1] also for logits near 0; log_p: the log-probability;
    log_p_gain: the same less that without the image; position: t. features (B, K, C) of the images;
    explanation: by LRP, without contrast."""
    magnitude = torch.stack([getattr(explanation, part) for part in SPLIT]).abs().sum(0)
    share = explanation.image / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)
    # without the image: regions of zeros would count as padding; tiny ones do not and add nothing
    blank = torch.full_like(features, torch.finfo(features.dtype).tiny)
    log_p = explanation.word_log_p
    if log_p is None:
        log_p = explanation.logits.log_softmax(-1).gather(2, captions[:, 1:, None]).squeeze(2)
    with torch.no_grad():
        without = model.log_p(blank, captions)
    return {"image": explanation.image, "absolute_share": share, "log_p": log_p,
            "log_p_gain": log_p - without,
            "position": torch.arange(log_p.shape[1], device=log_p.device).expand_as(log_p)}


def presence(model, features, explanation, captions, vocabulary, calibration):
    """(B, T): the estimated probability that the object that captions[:, t + 1] names is in the
    image; NaN for words that name none. Arguments: as for `scores`."""
    coefficients = calibration.coefficients
    of_words = [calibration.frequencies.get(word, 0.0) for word in vocabulary.words]
    frequency = torch.tensor(of_words, device=features.device)[captions[:, 1:]]
    log_odds = coefficients["constant"] + coefficients["frequency"] * frequency
    for name, score in scores(model, features, explanation, captions).items():
        log_odds = log_odds + coefficients[name] * score
    is_object = object_words(captions, vocabulary, calibration.objects)
    return log_odds.sigmoid().masked_fill(~is_object, torch.nan)


def decode_grounded(model, features, vocabulary, calibration, max_len=50, seeds=None, **options):
    """Captions (B, T) of features (B, K, C) that avoid flagged object words.

    Where a caption has flagged words, all words that name their categories are banned for this
    image and it is captioned again, up to three times. seeds, options: as in decoding.decode."""
    category = calibration.objects.category_ids(vocabulary).to(features.device)        # (V,)
    rows = torch.arange(len(features), device=features.device)      # images still to be captioned
    banned = torch.zeros(len(features), len(vocabulary), dtype=torch.bool, device=features.device)
    tokens = torch.zeros(len(features), max_len, dtype=torch.long, device=features.device)
    for attempt in range(4):
        if seeds is not None:
            options["seeds"] = seeds[rows.cpu()]
        new = decode(model, features[rows], vocabulary, max_len=max_len, banned=banned[rows],
                     **options)
        tokens[rows] = F.pad(new, (0, max_len - new.shape[1]))
        if attempt == 3:
            break

        captions = with_start(new, vocabulary)
        explanation = model.lrp(features[rows], captions, pixels=False)
        estimated = presence(model, features[rows], explanation, captions, vocabulary, calibration)
        flagged = estimated < calibration.threshold
        image, step = flagged.nonzero(as_tuple=True)
        words = captions[image, step + 1]                                              # (n,)
        names = (category == category[words, None]) & (category >= 0)                  # (n, V)
        names |= F.one_hot(words, len(vocabulary)).bool()
        banned.index_put_((rows[image],), names, accumulate=True)
        rows = rows[flagged.any(1)]
        if not len(rows):
            break
    return trimmed(tokens)


def fit(words):
    """A logistic regression of `present` on SCORES, fitted to a DataFrame of object words.

    Returns the coefficients {score or "constant": per unit of the score}, and the estimates of the
    words by regressions that were fitted to other images. InputError if all words, or all of some
    images, are of one class."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    fold = words.index.get_level_values("image").factorize()[0] % FOLDS
    if any(words.present[fold != number].nunique() < 2 for number in range(FOLDS)):
        raise InputError("too few object words of the validation captions are correct, or too few "
                         "wrong, so that no estimate can be fitted: train the model for longer, "
                         "use more images, or give the object words of the data with --synonyms")
    names = [name for name in SCORES if name in words]
    scale = words[names].std().clip(lower=1e-12)
    x = (words[names] - words[names].mean()) / scale
    regression = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
    estimates = cross_val_predict(regression, x, words.present, cv=PredefinedSplit(fold),
                                  method="predict_proba")[:, 1]
    factors = regression.fit(x, words.present).coef_[0] / scale
    constant = regression.intercept_[0] - (factors * words[names].mean()).sum()
    return {"constant": float(constant)} | factors.to_dict(), estimates


def calibrate(weight, model, objects, folder, references):
    """Stores the Calibration of a checkpoint beside it, fitted to the table of the experiment
    grounding of the validation split in `folder`; prints what each score contributes.

    references: the captions of each of the split's images."""
    import pandas as pd  # slow to import, as is scikit-learn
    from sklearn.metrics import roc_auc_score
    counts = Counter()
    for text in chain.from_iterable(references):
        counts.update(tokenise(text))
    frequencies = np.log1p(pd.Series(counts))
    words = read_scores(folder, "val")
    words["frequency"] = words.index.get_level_values("word").map(frequencies).fillna(0.0)
    coefficients, probabilities = fit(words)
    areas = {"all": roc_auc_score(words.present, probabilities)}
    for name in SCORES:
        _, others = fit(words.drop(columns=name))
        areas[f"without {name}"] = roc_auc_score(words.present, others)
    print("AUC of the estimates, cross-validated: "
          + ", ".join(f"{name} {area:.3f}" for name, area in areas.items()))

    # thresholds that keep 95 and 98 % of the correct words
    thresholds = np.quantile(probabilities[words.present > 0], [0.05, 0.02])
    last = {phrase[-1] for phrase in objects.words}     # the words for which estimates are made
    save(weight, model, *thresholds.tolist(), objects, coefficients,
         {word: value for word, value in frequencies.items() if word in last}, areas=areas,
         words_correct=int(words.present.sum()), words_absent=int((1 - words.present).sum()))
    print(f"estimates of object words: {calibration_path(weight)}")


def estimates(words, calibration):
    """The `presence` of the words of `read_scores`."""
    frequency = words.index.get_level_values("word").map(calibration.frequencies)
    words = words.assign(frequency=np.nan_to_num(frequency.to_numpy(float)))
    log_odds = sum((calibration.coefficients[name] * words[name] for name in SCORES),
                   start=calibration.coefficients["constant"])
    return 1 / (1 + np.exp(-log_odds))


def read_scores(folder, split):
    """DataFrame of a split's object words by image, step and word, from the table of the experiment
    grounding in `folder`: `scores`, and present, whether the image shows the object."""
    import pandas as pd  # slow to import
    path = Path(folder, f"grounding_words_{split}.csv")
    with reading(path, f"run evaluation.py --calibrate --save_path {folder} first"):
        rows = pd.read_csv(path, keep_default_na=False)
        rows["value"] = rows["value"].astype(float)
        table = rows.pivot_table(index=["image", "step", "word"], columns="measure",
                                 values="value")
        return table.reindex(columns=[*SCORES[:-1], "present"]).dropna()


def calibration_path(weight):
    """The calibration of a checkpoint or folder: the file <its name>_grounding.json beside it."""
    path = Path(weight).absolute()
    return path.with_name(f"{path.name if path.is_dir() else path.stem}_grounding.json")


def save(weight, model, threshold, ban_threshold, objects, coefficients, frequencies, **statistics):
    """Writes the calibration of a checkpoint: thresholds of flags and bans, and further numbers."""
    words = {" ".join(phrase): category for phrase, category in objects.words.items()}
    write_json(calibration_path(weight), {
        "threshold": threshold, "ban_threshold": ban_threshold,
        "coefficients": coefficients, **statistics, "weights": weights_fingerprint(model),
        "frequencies": frequencies, "words": words})


def load(weight, model, key="threshold"):
    """The Calibration of the checkpoint `weight`, or None if it has none.

    key: "threshold" for flags, or "ban_threshold". InputError if it belongs to other weights."""
    path = calibration_path(weight)
    if not path.exists():
        return None
    content = read_json(path, [key, "weights", "words", "coefficients", "frequencies"])
    if content["weights"] != weights_fingerprint(model):
        raise InputError(f"{path} was computed with other weights than those of {weight}: run "
                         "evaluation.py --calibrate again, or remove it")
    with reading(path, "run evaluation.py --calibrate again"):
        expect(content["coefficients"].keys() == {"constant", *SCORES}, "its scores are others")
        numbers = [{name: float(value) for name, value in content[part].items()}
                   for part in ("coefficients", "frequencies")]
        return Calibration(float(content[key]), Objects(content["words"]), *numbers)


def decoder(weight, model, is_grounded, options):
    """A function like decoding.decode with these options, for --grounded without the object words
    below the checkpoint's threshold; InputError if it has none."""
    if not is_grounded:
        return partial(decode, **options)
    if not hasattr(model, "step"):
        raise InputError(f"{weight} is a model of transformers, for which --grounded cannot ban "
                         "words: omit it")
    calibration = load(weight, model, "ban_threshold")
    if calibration is None:
        raise InputError(f"{calibration_path(weight)} is missing: --grounded requires a threshold, "
                         f"run evaluation.py --weight {weight} --dataset NAME --calibrate first")
    return partial(decode_grounded, calibration=calibration, **options)
