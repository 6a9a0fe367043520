"""Deletion and insertion (Petsiuk, Das and Saenko 2018): a word's probability as patches are removed or added."""
import torch

from captioning.experiments.ablation import grey_out, patch_ranks
from captioning.experiments.batch import encode_images, word_log_p

FRACTIONS = [i / 10 for i in range(11)]


def deletion_insertion(batch, rows, steps):
    """Areas under the deletion and insertion curves of a word's log-probability, teacher-forced on its own caption.

    Deletion sets patches of 8×8 pixels to the mean colour in descending order of relevance; insertion restores them in
    this order in an image of the mean colour. The area under the curve over the fraction of patches, from 0 to 1, is
    the mean log-probability: a faithful explanation has a low area of deletion and a high area of insertion. For object
    words at steps t ≥ 1.

    rows, steps (n,) -> {(method, measure): (n,)}; measures deletion and insertion (areas), and the curves' values
    deletion_0.0, deletion_0.1, …, insertion_1.0. InputError if the images cannot be divided into patches.
    """
    model, values = batch.study.model, {}
    images, captions = batch.images[rows], batch.captions[rows]
    original = batch.log_p[rows, steps]
    blank = word_log_p(model, encode_images(model, torch.zeros_like(images)), captions, steps)
    for method in batch.study.methods:
        rank = patch_ranks(batch.maps(method, rows, steps))                            # (n, P)
        for name, first, last in (("deletion", original, blank), ("insertion", blank, original)):
            curve = [first]
            for fraction in FRACTIONS[1:-1]:
                most_relevant = rank < round(fraction * rank.shape[1])
                hidden = most_relevant if name == "deletion" else ~most_relevant
                features = encode_images(model, grey_out(images, hidden))
                curve.append(word_log_p(model, features, captions, steps))
            curve = torch.stack([*curve, last])                                        # (fractions, n)
            values |= {(method, f"{name}_{fraction}"): log_p
                       for fraction, log_p in zip(FRACTIONS, curve, strict=True)}
            values[method, name] = torch.trapezoid(curve, dx=FRACTIONS[1], dim=0)
    return values
