"""Object words that come from language rather than the image: flags, and captions without them.

The score of a word is the share of the image in its logit (docs/method.md, section 4), which needs
no labels. Object words below a threshold are flagged; `evaluation.py --calibrate` fits the
threshold and stores it beside the checkpoint."""
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn import functional as F

from captioning.data.feature_store import weights_fingerprint
from captioning.decoding import decode, trimmed, with_start
from captioning.errors import InputError
from captioning.files import read_json, reading, write_json
from captioning.metrics.object_words import Objects


class Calibration(NamedTuple):
    """When an object word is flagged."""
    threshold: float        # flagged: words whose image_share is lower
    objects: Objects        # the words that name objects


def image_share(explanation):
    """image / (|image| + |start| + |previous| + |rest|) of LRP, (B, T) in [−1, 1]; 0 for padding.

    Unlike image / logit it is defined for logits near 0."""
    parts = torch.stack([explanation.image, explanation.start, explanation.previous,
                         explanation.rest])
    return parts[0] / parts.abs().sum(0).clamp(min=torch.finfo(parts.dtype).tiny)


def object_words(captions, vocabulary, objects):
    """(B, T) bool: whether captions[:, t + 1] names an object; of several words, the last does."""
    is_object = torch.zeros_like(captions[:, 1:], dtype=torch.bool)
    for row, caption in zip(is_object, captions[:, 1:].tolist(), strict=True):
        row[[step for step, _ in objects.named(vocabulary.decode(caption))]] = True
    return is_object


def flags(explanation, captions, vocabulary, calibration):
    """(B, T) bool: the object words captions[:, t + 1] whose image share is below the threshold.

    explanation: by LRP, without contrast."""
    is_low = image_share(explanation) < calibration.threshold
    return is_low & object_words(captions, vocabulary, calibration.objects)


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
        flagged = flags(explanation, captions, vocabulary, calibration)
        image, step = flagged.nonzero(as_tuple=True)
        words = captions[image, step + 1]                                              # (n,)
        names = (category == category[words, None]) & (category >= 0)                  # (n, V)
        names |= F.one_hot(words, len(vocabulary)).bool()
        banned.index_put_((rows[image],), names, accumulate=True)
        rows = rows[flagged.any(1)]
        if not len(rows):
            break
    return trimmed(tokens)


def fit_threshold(shares, is_present, kept=0.95):
    """The threshold that leaves the share `kept` of the correct object words unflagged.

    shares: image_share of n object words; is_present (n,) bool, whether the image shows the object.
    """
    correct = torch.tensor([share for share, present in zip(shares, is_present, strict=True)
                            if present], dtype=torch.float64)
    if not len(correct):
        raise InputError("no object word of the validation captions is correct, so that no "
                         "threshold can be fitted: train the model for longer, or give the object "
                         "words of the data with --synonyms")
    return correct.quantile(1 - kept).item()


def calibrate(weight, model, objects, folder):
    """Stores the Calibration of a checkpoint beside it, fitted to the table of the experiment
    grounding of the validation split in `folder`."""
    words = read_scores(folder, "val")
    threshold = fit_threshold(words.absolute_share, words.present, kept=0.95)
    ban_threshold = fit_threshold(words.absolute_share, words.present, kept=0.98)
    save(weight, model, threshold, ban_threshold, objects, words_correct=int(sum(words.present)),
         words_absent=int(len(words) - sum(words.present)))
    print(f"threshold of the image's share: {threshold:.4g} ({calibration_path(weight)})")


def read_scores(folder, split):
    """DataFrame of a split's object words, from the table of the experiment grounding in `folder`:
    absolute_share, which is image_share, and present, whether the image shows the object."""
    path = Path(folder, f"grounding_words_{split}.csv")
    with reading(path, f"run evaluation.py --calibrate --save_path {folder} first"):
        rows = pd.read_csv(path)
        table = rows.pivot_table(index=["image", "step"], columns="measure", values="value")
        return table.reindex(columns=["absolute_share", "present"]).dropna()


def calibration_path(weight):
    """The file of the calibration of a checkpoint: <stem>_grounding.json in its folder."""
    return Path(weight).with_name(f"{Path(weight).stem}_grounding.json")


def save(weight, model, threshold, ban_threshold, objects, **statistics):
    """Writes the calibration of a checkpoint: thresholds of flags and bans, and further numbers."""
    words = {" ".join(phrase): category for phrase, category in objects.words.items()}
    write_json(calibration_path(weight), {
        "threshold": threshold, "ban_threshold": ban_threshold, **statistics,
        "weights": weights_fingerprint(model), "words": words})


def load(weight, model, key="threshold"):
    """The Calibration of the checkpoint `weight`, or None if it has none.

    key: "threshold" for flags, or "ban_threshold". InputError if it belongs to other weights."""
    path = calibration_path(weight)
    if not path.exists():
        return None
    content = read_json(path, [key, "weights", "words"])
    if content["weights"] != weights_fingerprint(model):
        raise InputError(f"{path} was computed with other weights than those of {weight}: run "
                         "evaluation.py --calibrate again, or remove it")
    with reading(path, "run evaluation.py --calibrate again"):
        return Calibration(float(content[key]), Objects(content["words"]))


def decoder(weight, model, is_grounded, options):
    """A function like decoding.decode with these options, for --grounded without the object words
    below the checkpoint's threshold; InputError if it has none."""
    if not is_grounded:
        return partial(decode, **options)
    calibration = load(weight, model, "ban_threshold")
    if calibration is None:
        raise InputError(f"{calibration_path(weight)} is missing: --grounded requires a threshold, "
                         f"run evaluation.py --weight {weight} --dataset NAME --calibrate first")
    return partial(decode_grounded, calibration=calibration, **options)
