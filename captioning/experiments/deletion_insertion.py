"""Deletion and insertion (Petsiuk, Das and Saenko 2018): a word's probability while patches go or come."""
import torch

from captioning.experiments.ablation import PATCH, grey_out, patch_ranks
from captioning.experiments.batch import encode, word_log_p

FRACTIONS = [i / 10 for i in range(11)]


def deletion_insertion(batch, rows, steps):
    """A word's log-probability, teacher-forced on its own caption, while patches of 8×8 pixels get the mean colour in
    order of relevance (deletion), or come back in that order to a picture of the mean colour (insertion). The area
    under the curve over the share of patches, 0 to 1, is its mean log-probability: a faithful explanation has a low
    area of deletion and a high one of insertion. For object words at steps t ≥ 1.

    rows, steps (n,) -> {(method, measure): (n,)}; measures deletion, insertion (areas), and deletion_0.1, … of curves.
    """
    model, found = batch.study.model, {}
    images, captions = batch.images[rows], batch.captions[rows]
    P = (images.shape[-1] // PATCH) ** 2
    whole = batch.log_p[rows, steps]
    blank = word_log_p(model, encode(model, torch.zeros_like(images)), captions, steps)
    for method in batch.study.methods:
        rank = patch_ranks(batch.maps(method, rows, steps))
        for name, first, last in (("deletion", whole, blank), ("insertion", blank, whole)):
            curve = [first]
            for fraction in FRACTIONS[1:-1]:
                most = rank < round(fraction * P)
                features = encode(model, grey_out(images, most if name == "deletion" else ~most))
                curve.append(word_log_p(model, features, captions, steps))
            curve = torch.stack([*curve, last])
            found |= {(method, f"{name}_{fraction}"): values for fraction, values in zip(FRACTIONS, curve, strict=True)}
            found[method, name] = torch.trapezoid(curve, dx=FRACTIONS[1], dim=0)
    return found
