"""Ablation (method.md, section 9): what happens to a word when what was relevant to it is taken away."""
import torch
from torch.nn import functional as F

from captioning.experiments.batch import encode, word_log_p
from captioning.explanation.methods import WITHOUT_WORDS

PATCH = 8       # pixels of a patch's side


def word_ablation(batch, rows, steps, deleted=3):
    """The drop of a word's probability when the `deleted` most relevant of the words before it, never <start>, are
    deleted and the model is teacher-forced on the rest. For stop words and object words at steps t ≥ 6.

    rows, steps (n,) -> {(method, measure): (n,)}; measures stop_word_drop and object_word_drop, NaN for other words.
    """
    model, found = batch.study.model, {}
    captions = batch.captions[rows]                                                    # (n, T+1)
    place = torch.arange(captions.shape[1] - 1, device=rows.device)
    before = batch.log_p[rows, steps].exp()
    is_stop = batch.stop_words[rows, steps]
    for method in batch.study.methods:
        if method in WITHOUT_WORDS:
            continue
        relevance = batch.relevance(method, rows, steps)                               # (n, T)
        relevance = relevance.masked_fill((place == 0) | (place > steps[:, None]), -torch.inf)
        kept = F.pad(torch.ones_like(relevance, dtype=torch.bool).scatter(1, relevance.topk(deleted).indices, False),
                     (0, 1), value=True)
        shortened = captions.gather(1, (~kept).int().argsort(dim=1, stable=True))      # the deleted words come last
        drop = before - word_log_p(model, batch.features, shortened, steps - deleted, rows).exp()
        found[method, "stop_word_drop"] = drop.where(is_stop, torch.nan)
        found[method, "object_word_drop"] = drop.where(~is_stop, torch.nan)
    return found


def patch_ablation(batch, rows, steps, patches=20):
    """Whether a word disappears when the `patches` most relevant patches of 8×8 pixels get the mean colour and the
    picture is captioned again; where it stays, the drop of its probability, at its first place in the new caption. For
    object words at steps t ≥ 1. The mean colour is ImageNet's, zero in normalised pictures.

    rows, steps (n,) -> {(method, measure): (n,)}; measures disappears, 0 or 1, and patch_drop, NaN where it disappears.
    """
    model, found = batch.study.model, {}
    images, word = batch.images[rows], batch.captions[rows, steps + 1]
    start = torch.full_like(word, batch.study.vocabulary.start)[:, None]
    for method in batch.study.methods:
        rank = patch_ranks(batch.maps(method, rows, steps))
        features = encode(model, grey_out(images, rank < patches))
        captions = torch.cat([start, batch.study.decode(features)], 1)
        same = captions[:, 1:] == word[:, None]
        gone = ~same.any(1)
        after = word_log_p(model, features, captions, same.int().argmax(1)).exp()
        found[method, "disappears"] = gone.to(after.dtype)
        found[method, "patch_drop"] = (batch.log_p[rows, steps].exp() - after).masked_fill(gone, torch.nan)
    return found


def patch_ranks(maps):
    """maps (n, S, S) -> (n, P) each patch's place, row by row, when patches are sorted by their sum: 0 the highest."""
    sums = F.avg_pool2d(maps[:, None], PATCH).flatten(1)
    return sums.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def grey_out(images, chosen):
    """images (n, 3, S, S), normalised, with the mean colour in the patches `chosen`, (n, P) bool, row by row."""
    side = images.shape[-1] // PATCH
    mask = chosen.unflatten(1, (side, side)).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    return images.masked_fill(mask[:, None], 0)
