"""Ablation (docs/method.md, section 9): the effect on a word of removing the input that is most relevant to it."""
import torch
from torch.nn import functional as F

from captioning.errors import InputError
from captioning.experiments.batch import encode_images, word_log_p
from captioning.explanation.methods import METHODS

PATCH = 8       # side of a patch in pixels


def word_ablation(batch, rows, steps, deleted=3):
    """Drop of a word's probability after deletion of the most relevant preceding words.

    The `deleted` most relevant of the words before it, never <start>, are deleted, and the model is teacher-forced on
    the remaining ones. For stop words and object words at steps t ≥ 6. Methods without word relevance are skipped.

    rows, steps (n,) -> {(method, measure): (n,)}; measures stop_word_drop and object_word_drop, NaN for words of the
    other kind.
    """
    model, values = batch.study.model, {}
    captions = batch.captions[rows]                                                    # (n, T+1)
    position = torch.arange(captions.shape[1] - 1, device=rows.device)
    before = batch.log_p[rows, steps].exp()
    is_stop = batch.stop_words[rows, steps]
    for method in batch.study.methods:
        if method in METHODS and not METHODS[method].has_words:
            continue
        relevance = batch.relevance(method, rows, steps)                               # (n, T)
        relevance = relevance.masked_fill((position == 0) | (position > steps[:, None]), -torch.inf)
        remains = torch.ones_like(relevance, dtype=torch.bool).scatter(1, relevance.topk(deleted).indices, False)
        remains = F.pad(remains, (0, 1), value=True)                                   # (n, T+1)
        shortened = captions.gather(1, (~remains).int().argsort(dim=1, stable=True))   # deleted words moved to the end
        drop = before - word_log_p(model, batch.features, shortened, steps - deleted, rows).exp()
        values[method, "stop_word_drop"] = drop.where(is_stop, torch.nan)
        values[method, "object_word_drop"] = drop.where(~is_stop, torch.nan)
    return values


def patch_ablation(batch, rows, steps, patches=20):
    """Whether a word disappears from the caption when the most relevant patches are hidden.

    The `patches` most relevant patches of 8×8 pixels are set to the mean colour (ImageNet's, zero in normalised images)
    and the image is captioned again. If the word remains, the drop of its probability is taken at its first position in
    the new caption. For object words at steps t ≥ 1.

    rows, steps (n,) -> {(method, measure): (n,)}; measures disappears, 0 or 1, and patch_drop, NaN where the word
    disappears. InputError if the images cannot be divided into patches.
    """
    model, values = batch.study.model, {}
    images, word = batch.images[rows], batch.captions[rows, steps + 1]
    start = torch.full_like(word, batch.study.vocabulary.start)[:, None]
    for method in batch.study.methods:
        rank = patch_ranks(batch.maps(method, rows, steps))
        features = encode_images(model, grey_out(images, rank < patches))
        captions = torch.cat([start, batch.study.decode(features)], 1)
        is_word = captions[:, 1:] == word[:, None]
        disappears = ~is_word.any(1)
        after = word_log_p(model, features, captions, is_word.int().argmax(1)).exp()
        values[method, "disappears"] = disappears.to(after.dtype)
        values[method, "patch_drop"] = (batch.log_p[rows, steps].exp() - after).masked_fill(disappears, torch.nan)
    return values


def patch_grid(size):
    """Rows and columns of patches in an image of size (H, W); InputError unless both sides are multiples of PATCH."""
    H, W = size
    if H % PATCH or W % PATCH:
        raise InputError(f"images of {W}×{H} pixels cannot be divided into patches of {PATCH}×{PATCH} pixels: omit "
                         "ablation and deletion_insertion from --explanations")
    return H // PATCH, W // PATCH


def patch_ranks(maps):
    """maps (n, H, W) -> (n, P): the rank of each patch, row by row, by the sum of its values; 0 for the highest sum."""
    patch_grid(maps.shape[-2:])
    sums = F.avg_pool2d(maps[:, None], PATCH).flatten(1)
    return sums.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def grey_out(images, selected):
    """Normalised images (n, 3, H, W) with the mean colour in the patches `selected`, (n, P) bool, row by row."""
    mask = selected.unflatten(1, patch_grid(images.shape[-2:])).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    return images.masked_fill(mask[:, None], 0)
