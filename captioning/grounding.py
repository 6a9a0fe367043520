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
from captioning.metrics.object_words import Objects


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
    return object_words(captions, vocabulary, calibration.objects) & (image_share(explanation) < calibration.threshold)


def object_words(captions, vocabulary, objects):
    """(B, T) bool: whether captions[:, t + 1] names an object; captions (B, T+1). Of several words, the last does."""
    is_object = torch.zeros_like(captions[:, 1:], dtype=torch.bool)
    for row, caption in zip(is_object, captions[:, 1:].tolist(), strict=True):
        row[[step for step, _ in objects.named(vocabulary.decode(caption))]] = True
    return is_object


def decode_grounded(model, features, vocabulary, calibration, rounds=3, max_len=50, flag=flags, replace=True,
                    seeds=None, **options):
    """Captions (B, T) of features (B, K, C), as by captioning.decoding.decode, that avoid flagged object words.

    Where a caption has flagged words, all words that name their categories are banned for this image and it is
    captioned again, up to `rounds` times. flag: `flags`, or a function like it. replace: whether the new caption may
    name another object instead; otherwise only the objects without a flag are allowed. options: those of `decode`.
    """
    def caption(rows, **bans):
        of_rows = None if seeds is None else seeds[rows.cpu()]
        tokens = decode(model, features[rows], vocabulary, max_len=max_len, seeds=of_rows, **options, **bans)
        return F.pad(tokens, (0, max_len - tokens.shape[1]))
    rows = torch.arange(len(features), device=features.device)      # the images whose caption is new
    tokens = caption(rows)
    category = calibration.objects.category_ids(vocabulary).to(features.device)            # (V,)
    banned = torch.zeros(len(features), len(vocabulary), dtype=torch.bool, device=features.device)
    for _ in range(rounds):
        captions = trimmed(with_start(tokens[rows], vocabulary))
        explanation = model.lrp(features[rows], captions, pixels=False)
        flagged = flag(explanation, captions, vocabulary, calibration)
        flagged_rows, steps = flagged.nonzero(as_tuple=True)
        words = captions[flagged_rows, steps + 1]                                      # (n,)
        if replace:
            names = (category == category[words, None]) & (category >= 0)              # (n, V)
        else:
            unflagged = category[captions[:, 1:]].masked_fill(flagged, -1)             # (rows, T)
            named = (category == unflagged[..., None]).any(1)                          # (rows, V)
            names = (category >= 0) & ~named[flagged_rows]
        names |= F.one_hot(words, len(vocabulary)).bool()
        banned.index_put_((rows[flagged_rows],), names, accumulate=True)
        rows = rows[flagged.any(1)]
        if not len(rows):
            break
        tokens[rows] = caption(rows, banned=banned[rows])
    return trimmed(tokens)


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


def save(weight, model, threshold, ban_threshold, objects, **statistics):
    """Writes the calibration of the checkpoint `weight`: the thresholds of flags and of bans, and further numbers."""
    write_json(calibration_path(weight), {
        "threshold": threshold, "ban_threshold": ban_threshold, **statistics, "weights": weights_fingerprint(model),
        "words": {" ".join(phrase): category for phrase, category in objects.words.items()}})


def load(weight, model, key="threshold"):
    """The Calibration of the checkpoint `weight`, or None if it has none; InputError if it belongs to other weights.

    key: "threshold", below which words are flagged, or "ban_threshold", below which `decode_grounded` bans them."""
    path = calibration_path(weight)
    if not path.exists():
        return None
    content = read_json(path, [key, "weights", "words"])
    if content["weights"] != weights_fingerprint(model):
        raise InputError(f"{path} was computed with other weights than those of {weight}: run evaluation.py "
                         "--calibrate again, or remove it")
    is_valid = (isinstance(content["words"], dict) and all(isinstance(name, str) for name in content["words"].values())
                and isinstance(content[key], int | float) and math.isfinite(content[key]))
    if not is_valid:
        raise InputError(f"{path} must contain a number \"{key}\" and \"words\", {{word: category}}: run "
                         "evaluation.py --calibrate again")
    return Calibration(content[key], Objects(content["words"]))


def load_for_decoding(weight, model):
    """The Calibration of the checkpoint `weight`; InputError if it has none, since --grounded requires it."""
    calibration = load(weight, model, "ban_threshold")
    if calibration is None:
        raise InputError(f"{calibration_path(weight)} is missing: --grounded requires a threshold, run evaluation.py "
                         f"--weight {weight} --dataset NAME --calibrate first")
    return calibration
