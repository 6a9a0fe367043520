"""Losses on reference captions: cross-entropy with teacher forcing, scheduled sampling and the region loss.

Each loss is returned as three scalar tensors: the mean loss, the number of correct words and the number of words. Of a
`parts.Part` of a batch: its share of the batch's mean loss, and its correct words and words.
"""
from functools import partial

import torch
from torch.nn import functional as F

from captioning.decoding import without_special
from captioning.device import without_gradient
from captioning.recurrence import word_rows
from captioning.training.parts import WHOLE


def teacher_forced_loss(vocabulary, criterion=None, ss_prob=0.0, region_weight=0.0, region_epochs=0,
                        label_smoothing=0.0):
    """The loss function of `captioning.training.loop.fit` for training on reference captions.

    criterion(model, trace, captions, total=words of the whole batch) -> (loss, correct words, words): the loss of a
    teacher-forced trace, by default the cross-entropy with label_smoothing. ss_prob: probability of scheduled sampling.
    region_weight: weight of the region loss, which is added to the criterion. region_epochs: number of epochs, from the
    first, that train on the region loss alone.
    """
    criterion = criterion or partial(cross_entropy, label_smoothing=label_smoothing)

    def loss_function(model, features, all_captions, epoch, part=WHOLE):
        if epoch < region_epochs:
            return region_loss(model, features, all_captions, vocabulary, part)
        captions = all_captions[part.images]
        inputs = mix_in_predictions(model, features, captions, ss_prob, vocabulary) if ss_prob else captions
        loss, correct, words = criterion(model, model.teacher_force(features, inputs, skip_padding=True), captions,
                                         total=count_words(all_captions))
        if region_weight:
            loss = loss + region_weight * region_loss(model, features, all_captions, vocabulary, part)[0]
        return loss, correct, words
    return loss_function


def count_words(captions):
    """Number of words, <end> included, that captions (..., T+1) predict."""
    return (captions[..., 1:] != 0).sum()


def cross_entropy(model, trace, captions, label_smoothing=0.0, total=None):
    """`word_loss` of the logits p of a teacher-forced trace against captions (B, N, T+1)."""
    rows = word_rows(captions)
    return word_loss(model.output(trace.hidden.flatten(0, -2)[rows]), captions[..., 1:].flatten()[rows],
                     label_smoothing, total)


def word_loss(logits, targets, label_smoothing=0.0, total=None):
    """Cross-entropy of logits (n, V) against targets (n,), without <pad> -> (mean loss, correct words, words).

    total: number of words to divide by, default those of the targets. label_smoothing: share of the target probability
    that is spread over all V words (Szegedy et al. 2016)."""
    is_word = targets != 0
    loss = F.cross_entropy(logits.float(), targets, ignore_index=0, label_smoothing=label_smoothing, reduction="sum")
    words = is_word.sum()
    return loss / (words if total is None else total), ((logits.argmax(-1) == targets) & is_word).sum(), words


def region_loss(model, features, captions, vocabulary, part=WHOLE):
    """Multiple-instance loss of the words that single regions predict, after Fang et al. (2015), with the maximum over
    regions in place of their noisy-OR.

    Every word in an image's captions (B, N, L) should be predicted from at least one region of features (B, K, C)
    alone, and all other words from none; special tokens do not count. captions: those of the whole batch. Returns
    (binary cross-entropy per distinct word of an image's captions, predicted words, words).
    """
    logits = model.region_logits(features).float()                                     # (B, K, V)
    if model.encoder is None:       # regions that are all zero are padding
        logits = logits.masked_fill((features == 0).all(-1, keepdim=True), -100.0)
    highest = logits.amax(1)                                                           # (B, V)
    is_ordinary = torch.ones_like(highest[0])
    is_ordinary[[vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end]] = 0
    is_present = highest.new_zeros(len(captions), len(is_ordinary)).scatter_(1, captions.flatten(1), 1)
    total, is_present = (is_present * is_ordinary).sum(), is_present[part.images]
    loss = F.binary_cross_entropy_with_logits(highest, is_present, is_ordinary.expand_as(highest), reduction="sum")
    words = is_present * is_ordinary
    return loss / total.clamp(min=1), ((highest > 0) * words).sum(), words.sum()


def mix_in_predictions(model, features, captions, probability, vocabulary):
    """Scheduled sampling (Bengio et al. 2015) of all steps at once (Mihaylova and Martins 2019): captions (B, N, T+1)
    in which each word between <start> and <end> is replaced, with this probability, by a word sampled from the model's
    prediction at that step with teacher forcing. <pad>, <start> and <unk> are never sampled."""
    with without_gradient():
        hidden = model.teacher_force(features, captions, skip_padding=True).hidden
        logits = model.output(hidden).float()                                          # (B, N, T, V)
        p = without_special(logits, vocabulary).softmax(-1)
        # draws like torch.multinomial, which fails if p is not finite: the training loop reports that a little later
        draws = torch.empty_like(p).exponential_().clamp_(min=torch.finfo(p.dtype).tiny)
        sampled = (p / draws).argmax(-1)
    words = captions[..., 1:-1]
    replace = (torch.rand(words.shape, device=words.device) < probability) & (captions[..., 2:] != 0)
    return torch.cat([captions[..., :1], torch.where(replace, sampled[..., :-1], words), captions[..., -1:]], -1)
