"""Ablation (docs/method.md, section 9): removing the input that is most relevant to a word."""
import torch
from torch.nn import functional as F

from captioning.errors import InputError
from captioning.experiments.batch import encode_images, from_step, word_log_p
from captioning.experiments.experiment import Experiment, Part, bars
from captioning.explanation.methods import METHODS

PATCH = 8       # side of a patch in pixels


def stop_words(batch):
    """(B, T) bool"""
    return batch.words_where(lambda b, t, word: word in batch.study.stop_words)


def words_for_word_ablation(batch):
    """Stop words and object words at steps t ≥ 6, which have enough words before them."""
    return from_step(stop_words(batch) | batch.object_words, 6)


def word_ablation(batch, rows, steps, deleted=3):
    """Drop of a word's probability after deletion of the most relevant words before it.

    The `deleted` most relevant words, never <start>, are deleted, and the model is teacher-forced
    on the remaining ones. Methods without relevance of words are skipped. Measures: stop_word_drop
    and object_word_drop, NaN for words of the other kind."""
    values = {}
    captions = batch.captions[rows]                                                    # (n, T+1)
    position = torch.arange(captions.shape[1] - 1, device=rows.device)
    may_be_deleted = (position > 0) & (position <= steps[:, None])                     # (n, T)
    before = batch.log_p[rows, steps].exp()
    is_stop = stop_words(batch)[rows, steps]
    for method in batch.study.methods:
        if method in METHODS and not METHODS[method].has_words:
            continue
        relevance = batch.relevance(method, rows, steps).masked_fill(~may_be_deleted, -torch.inf)
        most_relevant = relevance.topk(deleted).indices
        is_deleted = torch.zeros_like(may_be_deleted).scatter(1, most_relevant, True)

        # a stable sort moves the deleted words to the end
        order = F.pad(is_deleted, (0, 1)).int().argsort(dim=1, stable=True)
        shortened = captions.gather(1, order)
        after = word_log_p(batch.study.model, batch.features[rows], shortened, steps - deleted)
        drop = before - after.exp()
        values[method, "stop_word_drop"] = drop.where(is_stop, torch.nan)
        values[method, "object_word_drop"] = drop.where(~is_stop, torch.nan)
    return values


def patch_ablation(batch, rows, steps, patches=20):
    """Whether a word disappears from the caption when the most relevant patches are hidden.

    The `patches` most relevant patches of 8×8 pixels are set to the mean colour and the image is
    captioned again. Measures: disappears, 0 or 1, and, where the word remains, patch_drop, the drop
    of its probability at its first position in the new caption."""
    model = batch.study.model
    values = {}
    images = batch.images[rows]
    word = batch.captions[rows, steps + 1]
    start = torch.full_like(word, batch.study.vocabulary.start)[:, None]
    before = batch.log_p[rows, steps].exp()
    for method in batch.study.methods:
        hidden = patch_ranks(batch.maps(method, rows, steps)) < patches
        features = encode_images(model, grey_out(images, hidden))
        captions = torch.cat([start, batch.study.decode(features)], 1)
        is_word = captions[:, 1:] == word[:, None]
        disappears = ~is_word.any(1)
        after = word_log_p(model, features, captions, is_word.int().argmax(1)).exp()
        values[method, "disappears"] = disappears.to(after.dtype)
        values[method, "patch_drop"] = (before - after).masked_fill(disappears, torch.nan)
    return values


def patch_grid(size):
    """Rows and columns of patches in an image of size (H, W), multiples of the patches' side."""
    H, W = size
    if H % PATCH or W % PATCH:
        raise InputError(f"images of {W}×{H} pixels cannot be divided into patches of "
                         f"{PATCH}×{PATCH} pixels: omit ablation and deletion_insertion from "
                         "--explanations")
    return H // PATCH, W // PATCH


def patch_ranks(maps):
    """maps (n, H, W) -> (n, P): the rank of each patch by its sum, from 0 for the highest."""
    patch_grid(maps.shape[-2:])
    sums = F.avg_pool2d(maps[:, None], PATCH).flatten(1)
    # the argsort of an argsort is the rank of each entry
    return sums.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def grey_out(images, selected):
    """Images (n, 3, H, W) with the mean colour, 0, in the patches `selected`, (n, P) bool."""
    mask = selected.unflatten(1, patch_grid(images.shape[-2:]))
    mask = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    return images.masked_fill(mask[:, None], 0)


TITLES = {"disappears": "20 patches hidden: object words that disappear",
          "patch_drop": "probability drop of those that remain",
          "object_word_drop": "3 words deleted: probability drop of object words",
          "stop_word_drop": "probability drop of stop words"}


ABLATION = Experiment(
    (Part(words_for_word_ablation, word_ablation, needs_pixels=False),
     Part(lambda batch: batch.later_object_words, patch_ablation)),
    bars(TITLES), shown=tuple(TITLES))
