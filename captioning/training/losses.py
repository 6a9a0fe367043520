"""Losses on reference captions: cross-entropy with teacher forcing, also of LRP-inference.

A loss is called with the images that one process computes in one pass, and returns their share of
the mean over the whole batch, so that the shares of all passes and processes add up to that mean:
    loss.counts(batch) -> (n,) what its sums are divided by; the loop adds those of the whole batch
    loss(model, features, batch, counts) -> the share, and (correct words, words), as scalar tensors
    loss.measure: what the ratio of these two is called in log.csv
batch: a dictionary of "captions" (B, N, T+1), ids from <start> on, zero-padded; "index" (B,) in the
data set; "seeds" (B,) of `decoding.image_seeds`; "epoch" and "step", the number of steps before it.
"""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from captioning.data.vocabulary import Vocabulary
from captioning.decoding import draw, uniform, without_special
from captioning.device import without_gradient
from captioning.explanation.lrp_inference import weighted_hidden


def count_words(captions):
    """Number of words to predict in captions (..., T+1), <end> included."""
    return (captions[..., 1:] != 0).sum()


def word_rows(captions):
    """Indices (n,) into B·N·T of the positions of captions (..., T+1) that predict a word.

    The product with W_o is computed for these alone. On other devices than a CPU, where reading
    their number would wait for the device, a slice of all positions."""
    if captions.device.type != "cpu":
        return slice(None)
    return captions[..., 1:].flatten().nonzero().squeeze(1)


def word_loss(logits, targets, label_smoothing=0.0):
    """Summed cross-entropy of logits (n, V) against targets (n,), correct words, words.

    <pad> does not count. label_smoothing: share of the target probability that is spread over all
    V words (Szegedy et al. 2016)."""
    is_word = targets != 0
    loss = F.cross_entropy(logits.float(), targets, ignore_index=0, reduction="sum",
                           label_smoothing=label_smoothing)
    return loss, ((logits.argmax(-1) == targets) & is_word).sum(), is_word.sum()


def cross_entropy(model, hidden, captions, label_smoothing=0.0):
    """`word_loss` of captions (B, N, T+1), teacher-forced; hidden (B, N, T, d): a Trace's."""
    rows = word_rows(captions)
    logits = model.output(hidden.flatten(0, -2)[rows])
    return word_loss(logits, captions[..., 1:].flatten()[rows], label_smoothing)


@dataclass
class CrossEntropy:
    """CE(p, y) with teacher forcing, optionally with scheduled sampling and the region loss."""
    vocabulary: Vocabulary
    ss_prob: float = 0.0            # probability of scheduled sampling
    region_weight: float = 0.0      # of the region loss
    region_epochs: int = 0          # number of first epochs that train on the region loss alone
    label_smoothing: float = 0.0
    measure = "accuracy"

    def counts(self, batch):
        """Words, and distinct words of the images."""
        captions = batch["captions"]
        return torch.stack([count_words(captions), present_words(captions, self.vocabulary).sum()])

    def __call__(self, model, features, batch, counts):
        captions = batch["captions"]
        if batch["epoch"] < self.region_epochs:
            loss, *log = region_loss(model, features, captions, self.vocabulary)
            return loss / counts[1].clamp(min=1), log

        inputs = captions
        if self.ss_prob:
            inputs = mix_in_predictions(model, features, captions, self.ss_prob, self.vocabulary,
                                        batch["seeds"])
        loss, *log = self.word_loss(model, model.teacher_force(features, inputs), captions)
        loss = loss / counts[0]
        if self.region_weight:
            regions, *_ = region_loss(model, features, captions, self.vocabulary)
            loss = loss + self.region_weight * regions / counts[1].clamp(min=1)
        return loss, log

    def word_loss(self, model, trace, captions):
        """Summed loss of the words of captions (B, N, T+1), correct words, words."""
        return cross_entropy(model, trace.hidden, captions, self.label_smoothing)


@dataclass(kw_only=True)
class LRPInferenceLoss(CrossEntropy):
    """CE(p, y) + weight · CE(p̃, y) (docs/method.md, section 7).

    Where ω is 1, p̃ equals p: the second product with W_o is computed for the other words only."""
    stop: torch.Tensor      # (V,) bool: words whose ω is 1
    weight: float = 1.0

    def word_loss(self, model, trace, captions):
        rows = word_rows(captions)
        c_hat, h, hidden = (x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h, trace.hidden))
        targets = captions[..., 1:].flatten()[rows]                                    # (n,)
        is_word = targets != 0

        # p and p̃ have the same dropout mask
        mask = model.dropout(torch.ones_like(hidden))
        logits = model.W_o(mask * hidden)                                              # (n, V)
        predicted = logits.argmax(-1)
        losses = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=0)

        other = is_word & ~self.stop[predicted]
        hidden = weighted_hidden(model, c_hat[other], h[other], predicted[other], self.stop)
        logits = model.W_o(mask[other] * hidden)
        loss = (losses * torch.where(other, 1, 1 + self.weight)).sum()
        loss = loss + self.weight * F.cross_entropy(logits.float(), targets[other], reduction="sum")
        return loss, ((predicted == targets) & is_word).sum(), is_word.sum()


def present_words(captions, vocabulary):
    """(B, V) 1 for the words of an image's captions (B, N, L), without special tokens; else 0."""
    present = torch.zeros(len(captions), len(vocabulary), device=captions.device)
    present.scatter_(1, captions.flatten(1), 1)
    present[:, vocabulary.special] = 0
    return present


def region_loss(model, features, captions, vocabulary):
    """Multiple-instance loss of the words that single regions predict, after Fang et al. (2015).

    Every word in an image's captions (B, N, L) should be predicted from at least one region of
    features (B, K, C) alone, and all other words from none: the maximum over regions replaces their
    noisy-OR. Special tokens do not count. Returns the summed binary cross-entropy, predicted words,
    and distinct words of the images."""
    logits = model.region_logits(features).float()                                     # (B, K, V)
    mask = model.region_mask(features)
    if mask is not None:
        logits = logits.masked_fill(~mask[..., None], -100.0)
    highest = logits.amax(1)                                                           # (B, V)
    words = present_words(captions, vocabulary)
    losses = F.binary_cross_entropy_with_logits(highest, words, reduction="none")
    losses = losses.index_fill(1, torch.tensor(vocabulary.special, device=losses.device), 0)
    return losses.sum(), ((highest > 0) * words).sum(), words.sum()


def mix_in_predictions(model, features, captions, probability, vocabulary, seeds):
    """Scheduled sampling (Bengio et al. 2015) of all steps at once (Mihaylova and Martins 2019).

    Returns captions (B, N, T+1) in which each word between <start> and <end> is replaced, with this
    probability, by a word drawn from the model's prediction at that step with teacher forcing."""
    N, T = captions.shape[1], captions.shape[2] - 1
    # the steps come first, so that their number does not change the numbers of each
    numbers = uniform(seeds, (T, N, 2), captions.device).transpose(1, 2)            # (B, N, T, 2)
    with without_gradient():
        logits = model.output(model.teacher_force(features, captions).hidden).float()
        p = without_special(logits, vocabulary).softmax(-1)                         # (B, N, T, V)
        drawn = draw(p, numbers[..., 0])
    words = captions[..., 1:-1]
    replace = (numbers[..., :-1, 1] < probability) & (captions[..., 2:] != 0)
    mixed = torch.where(replace, drawn[..., :-1], words)
    return torch.cat([captions[..., :1], mixed, captions[..., -1:]], -1)
