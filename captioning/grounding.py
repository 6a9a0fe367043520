"""Object words that come from language rather than the image: flags, and captions without flagged words.

The score of a word is the share of the image in its logit (docs/method.md, section 4). It needs no labels. Object words
below a threshold are flagged; `evaluation.py --calibrate` fits the threshold and stores it beside the checkpoint.
"""
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from captioning.data.feature_store import weights_fingerprint
from captioning.decoding import decode, trimmed, with_start
from captioning.errors import InputError
from captioning.files import read_json, write_json
from captioning.metrics.object_words import NO_OBJECT, Objects


class Calibration(NamedTuple):
    """When an object word is flagged."""
    threshold: float        # flagged: words whose image_share is lower
    objects: Objects        # the words that name objects


def image_share(explanation):
    """The image's share of each explained value, image / (|image| + |start| + |previous| + |rest|), in [−1, 1].

    explanation: an Explanation by LRP -> (B, T); 0 for padding. Unlike image / logit, it is defined for logits near 0.
    """
    parts = torch.stack([explanation.image, explanation.start, explanation.previous, explanation.rest])
    return parts[0] / parts.abs().sum(0).clamp(min=torch.finfo(parts.dtype).tiny)


def flags(explanation, captions, vocabulary, calibration):
    """(B, T) bool: the object words captions[:, t + 1] whose image share is below the threshold.

    explanation: that of captions (B, T+1) by LRP, without contrast.
    """
    words = [vocabulary.decode(row) for row in captions[:, 1:].tolist()]
    is_object = torch.zeros_like(captions[:, 1:], dtype=torch.bool)
    for b, caption in enumerate(words):
        is_object[b, [step for step, _ in calibration.objects.named(caption)]] = True
    return is_object & (image_share(explanation) < calibration.threshold)


def decode_grounded(model, features, vocabulary, calibration, rounds=3, max_len=50, **options):
    """Captions (B, T) of features (B, K, C), as by captioning.decoding.decode, that avoid flagged object words.

    Where a caption has flagged words, all words that name their categories are banned for this image and it is
    captioned again, up to `rounds` times. options: those of `decode`.
    """
    def caption(rows, **bans):
        tokens = decode(model, features[rows], vocabulary, max_len=max_len, **options, **bans)
        return F.pad(tokens, (0, max_len - tokens.shape[1]))
    rows = torch.arange(len(features), device=features.device)      # the images whose caption is new
    tokens = caption(rows)
    category = word_categories(vocabulary, calibration.objects).to(features.device)        # (V,)
    banned = torch.zeros(len(features), len(vocabulary), dtype=torch.bool, device=features.device)
    for _ in range(rounds):
        captions = trimmed(with_start(tokens[rows], vocabulary))
        explanation = model.lrp(features[rows], captions, pixels=False)
        flagged = flags(explanation, captions, vocabulary, calibration)
        flagged_rows, steps = flagged.nonzero(as_tuple=True)
        words = captions[flagged_rows, steps + 1]                                      # (n,)
        names = (category == category[words, None]) & (category >= 0)                  # (n, V)
        names |= F.one_hot(words, len(vocabulary)).bool()
        banned.index_put_((rows[flagged_rows],), names, accumulate=True)
        rows = rows[flagged.any(1)]
        if not len(rows):
            break
        tokens[rows] = caption(rows, banned=banned[rows])
    return trimmed(tokens)


def word_categories(vocabulary, objects):
    """(V,) the number of the category that each word of the vocabulary names by itself; −1 for other words."""
    numbers = {category: number for number, category in enumerate(sorted(set(objects.words.values()) - {NO_OBJECT}))}
    return torch.tensor([numbers.get(objects.words.get((word,)), -1) for word in vocabulary.words])


# -- the threshold -----------------------------------------------------------------------------------------------------


def fit_threshold(shares, is_present, kept=0.95):
    """The threshold that leaves the share `kept` of the correct object words unflagged.

    shares: numbers (n,), image_share of object words; is_present (n,) bool, whether the image shows the object.
    InputError if no word is correct.
    """
    correct = torch.tensor(shares, dtype=torch.float64)[torch.tensor(is_present, dtype=torch.bool)]
    if not len(correct):
        raise InputError("no object word of the validation captions is correct, so that no threshold can be fitted: "
                         "train the model for longer, or give the object words of the data with --synonyms")
    return correct.quantile(1 - kept).item()


def calibration_path(weight):
    """The file of the calibration of a checkpoint: <stem>_grounding.json in its folder."""
    return Path(weight).with_name(f"{Path(weight).stem}_grounding.json")


def save(weight, model, threshold, objects, **statistics):
    """Writes the calibration of the checkpoint `weight`; statistics: further numbers for the reader."""
    write_json(calibration_path(weight), {
        "threshold": threshold, **statistics, "weights": weights_fingerprint(model),
        "words": {" ".join(phrase): category for phrase, category in objects.words.items()}})


def load(weight, model):
    """The Calibration of the checkpoint `weight`, or None if it has none; InputError if it belongs to other weights."""
    path = calibration_path(weight)
    if not path.exists():
        return None
    content = read_json(path, ["threshold", "weights", "words"])
    if content["weights"] != weights_fingerprint(model):
        raise InputError(f"{path} was computed with other weights than those of {weight}: run evaluation.py "
                         "--calibrate again, or remove it")
    is_valid = (isinstance(content["words"], dict) and all(isinstance(name, str) for name in content["words"].values())
                and isinstance(content["threshold"], int | float) and math.isfinite(content["threshold"]))
    if not is_valid:
        raise InputError(f"{path} must contain a number \"threshold\" and \"words\", {{word: category}}: run "
                         "evaluation.py --calibrate again")
    return Calibration(content["threshold"], Objects(content["words"]))


def load_for_decoding(weight, model):
    """The Calibration of the checkpoint `weight`; InputError if it has none, since --grounded requires it."""
    calibration = load(weight, model)
    if calibration is None:
        raise InputError(f"{calibration_path(weight)} is missing: --grounded requires a threshold, run evaluation.py "
                         f"--weight {weight} --calibrate first")
    return calibration
