"""Losses."""
import torch
from torch.nn import functional as F


def teacher_forced_loss(args, vocabulary, data, criterion=None):
    """fit's loss_function for data's captions as they are: cross-entropy, or criterion(model, trace, captions) ->
    (loss, right words, words), with the scheduled sampling and the region losses that the flags ask for."""
    criterion = criterion or (lambda model, trace, captions: word_loss(model.output(trace.hidden), captions))

    def loss_function(model, features, captions):
        if data.epoch < args.region_epochs:
            return region_loss(model, features, captions, vocabulary)
        read = mix_in_predictions(model, features, captions, args.ss_prob) if args.ss_prob else captions
        loss, right, words = criterion(model, model.teacher_force(features, read), captions)
        if args.region_loss:
            loss = loss + args.region_loss * region_loss(model, features, captions, vocabulary)[0]
        return loss, right, words
    return loss_function


def word_loss(logits, captions):
    """Cross-entropy of logits (..., T, V) against captions (..., T+1) -> (mean loss, right words, words)."""
    targets = captions[..., 1:]
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=0)
    there = targets != 0
    return loss, ((logits.argmax(-1) == targets) & there).sum(), there.sum()


def region_loss(model, features, captions, vocabulary):
    """Multiple-instance loss (Fang et al. 2015) on what regions of features (B, K, C) say by themselves: some region
    should say each word of an image's captions (B, N, L), and none another word. Special tokens aside. Returns (binary
    cross-entropy per word of the captions, words that were said, words)."""
    logits = model.region_logits(features).float()                                     # (B, K, V)
    if model.encoder is None:       # regions that are all zero are padding
        logits = logits.masked_fill((features == 0).all(-1, keepdim=True), -100.0)
    most = logits.amax(1)                                                              # (B, V)
    there = torch.zeros_like(most).scatter_(1, captions.flatten(1), 1)
    ordinary = torch.ones_like(most)
    ordinary[:, [vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end]] = 0
    words = (there * ordinary).sum()
    loss = F.binary_cross_entropy_with_logits(most, there, ordinary, reduction="sum") / words.clamp(min=1)
    return loss, ((most > 0) * there * ordinary).sum(), words


def mix_in_predictions(model, features, captions, probability):
    """Scheduled sampling (Bengio et al. 2015) for all steps at once: a first pass on the true words predicts, then each
    word read is, with this probability, the one sampled there (Mihaylova and Martins 2019)."""
    with torch.no_grad():
        logits = model.output(model.teacher_force(features, captions).hidden)          # (B, N, T, V)
        sampled = torch.distributions.Categorical(logits=logits.float()).sample()
    read = captions[..., 1:-1]
    replace = (torch.rand(read.shape, device=read.device) < probability) & (captions[..., 2:] != 0)
    return torch.cat([captions[..., :1], torch.where(replace, sampled[..., :-1], read), captions[..., -1:]], -1)
