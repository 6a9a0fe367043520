"""Evidence erasure (docs/method.md, section 7): a word is unlearned where its own evidence is missing from the image.

Sizes: B images with N captions of T + 1 ids each, from <start> on; K regions; S object words of one caption.
"""
from typing import NamedTuple

import torch

from captioning.explanation.methods import region_relevance
from captioning.training.losses import count_words, cross_entropy
from captioning.training.parts import WHOLE

EVIDENCE = ("lrp", "gradient", "grad_cam", "attention", "random")
FILL = ("background", "mean", "zero")
DETERMINERS = ("a", "an", "the", "this", "that", "these", "those", "another", "each", "both", "some", "several", "many",
               "one", "two", "three", "four", "five", "six", "his", "her", "its", "their")


class Choice(NamedTuple):
    """For each image one of its captions, and the object words of this caption; the first of them is to be erased."""
    caption: torch.Tensor       # (B, T+1)
    steps: torch.Tensor         # (B, S) the steps that predict these words, in random order
    categories: torch.Tensor    # (B, S) the categories of these words, −1 where a caption has fewer than S


class ErasureLoss:
    """CE(p, y) − μ log(1 − p'(W)) + κ CE(p', y without w), with p' the prediction for erased features (section 7).

    For each image one of its captions y and one object word w of it are chosen at random; the features of the regions
    that are w's own evidence are replaced. From the erased features none of the words W of w's category must be
    predicted in the place of w, and the caption without w's noun phrase must. Captions that name only one category
    have no erased image. No gradient flows through the choice of the regions.
    With every = N, the terms of erased images are computed in every N-th step only, with N times the weight (lazy
    regularisation, Karras et al. 2020).

    vocabulary: of the captions. categories (V,): see `Objects.category_ids`. weight, keep: μ and κ. share: at most this
    share of the regions, or one region, is erased. every: see above. Controls: evidence, the relevance of a region, one
    of EVIDENCE; own, False if also that of other words is erased; fill, what replaces regions, one of FILL.
    """

    def __init__(self, vocabulary, categories, weight, keep, share, evidence="lrp", own=True, fill="background",
                 every=1):
        self.is_determiner = torch.tensor([word in DETERMINERS for word in vocabulary.words], device=categories.device)
        self.categories, self.weight, self.keep, self.share = categories, weight, keep, share
        self.evidence, self.own, self.fill, self.every = evidence, own, fill, every
        self.assign = own_evidence

    def __call__(self, model, features, all_captions, epoch, part=WHOLE):
        """features (B, K, C) of the part, captions (B, N, T+1) of the whole batch -> (loss, correct words, words);
        `epoch` has no effect."""
        captions = all_captions[part.images]
        loss, *counts = cross_entropy(model, model.teacher_force(features, captions, skip_padding=True), captions,
                                      total=count_words(all_captions))
        if part.step % self.every:
            return loss, *counts
        whole = choose(all_captions, self.categories, part.generator)
        has_other = is_other(whole.categories).any(1)[part.images]
        features, part = features[has_other], part.select(has_other)
        if has_other.any():
            erased = self.erase(model, features, Choice(*(x[part.images] for x in whole)), part)
            loss = loss + self.every * self.erased_loss(model, erased, whole, part)
        return loss, *counts

    def erase(self, model, features, choice, part):
        """features (B, K, C) of the part, in which the evidence for the first word of each Choice is replaced."""
        is_region = (features != 0).any(-1)                                            # (B, K) without padding
        relevance = self.relevance(model, features, choice, part).detach() * is_region[:, None]    # (B, S, K)
        regions = is_region.sum(1, keepdim=True)
        count = (self.share * regions + 1e-4).long()        # in float32, 0.53 · 100 is just below 53
        count = count.clamp(min=1).clamp(max=regions - 1)   # one region at least remains
        amount = self.assign(relevance, choice.categories if self.own else choice.categories[:, :1], count)
        filling = self.filling(features, relevance, choice, is_region & (amount == 0), part)
        return torch.lerp(features, filling.to(features), amount[..., None].to(features))

    def relevance(self, model, features, choice, part):
        """(B, S, K) the relevance of the part's regions for the words of its Choice."""
        if self.evidence == "random":
            return part.exponential(features.new_empty(*choice.steps.shape, features.shape[1]))
        with torch.autocast(features.device.type, enabled=False):
            explanation = getattr(model, self.evidence)(features, choice.caption, steps=choice.steps)
            if self.evidence == "grad_cam":     # its map before it is upsampled to pixels
                return torch.einsum("bsc,bkc->bsk", explanation.features.mean(2), features)
        return region_relevance(explanation, self.evidence)

    def filling(self, features, relevance, choice, remains, part):
        """(B, K, C) what replaces erased regions: for each, a random one of the half of the remaining regions that is
        least relevant for the object words, the mean of the remaining regions, or zero, which is padding where regions
        are detected. remains (B, K): the regions that are not erased; relevance (B, S, K): of the words of a Choice."""
        if self.fill == "zero":
            return torch.zeros_like(features)
        number = remains.sum(1, keepdim=True)
        if self.fill == "mean":
            return (features * remains[..., None]).sum(1, keepdim=True) / number[..., None].clamp(min=1)
        is_object = (choice.categories >= 0)[..., None]
        largest = (fractions(relevance) * is_object).amax(1).masked_fill(~remains, torch.inf)      # (B, K)
        half = (number + 1).div(2, rounding_mode="floor").clamp(min=1)
        uniform = -torch.expm1(-part.exponential(largest))
        rank = torch.minimum((uniform * half).long(), half - 1)
        chosen = largest.argsort(dim=1).gather(1, rank)
        return features.gather(1, chosen[..., None].expand_as(features))

    def erased_loss(self, model, features, choice, part):
        """The terms of erased images, for the part's erased features (B, K, C) and the Choice of the whole batch."""
        category, named = choice.categories[:, :1], self.categories[choice.caption]    # (B, 1), (B, T+1)
        is_used = is_other(choice.categories).any(1, keepdim=True)
        unlearned = (is_used & (named == category))[:, 1:]                             # (B, T)
        short = without_noun_phrase(choice.caption, choice.steps[:, :1] + 1, named >= 0,
                                    self.is_determiner[choice.caption])
        short = short * (is_used & (self.categories[short] != category).all(1, keepdim=True))
        captions = torch.stack([choice.caption, short], 1)                             # (B, 2, T+1)
        captions = captions[part.images, :2 if self.keep else 1]    # without κ, the second costs no time
        trace = model.teacher_force(features, captions, skip_padding=True)
        rows = unlearned[part.images]
        logits = model.output(trace.hidden[:, 0][rows]).float()                        # (n, V) of these words alone
        synonyms = self.categories == category[part.images].expand_as(rows)[rows][:, None]
        log_not_p = logits.masked_fill(synonyms, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)   # exact as p nears 1
        rest_loss, *_ = cross_entropy(model, trace._replace(hidden=trace.hidden[:, 1:]), captions[:, 1:],
                                      total=count_words(short).clamp(min=1))
        unlikelihood = -log_not_p.sum() / unlearned.sum().clamp(min=1)                 # mean over the whole batch
        return self.weight * unlikelihood + self.keep * rest_loss


def choose(captions, categories, generator=None):
    """A random caption of each image, and its object words in random order -> Choice.

    captions (B, N, T+1); categories (V,): see `Objects.category_ids`."""
    B, N, _ = captions.shape
    chosen = torch.randint(N, (B, 1, 1), generator=generator, device=captions.device)
    caption = captions.take_along_dim(chosen, dim=1)[:, 0]
    named = categories[caption[:, 1:]]                                                 # (B, T)
    order = torch.rand(named.shape, generator=generator, device=named.device).masked_fill(named < 0, 2).argsort(dim=1)
    steps = order[:, :max(1, int((named >= 0).sum(1).max()))]
    return Choice(caption, steps, named.gather(1, steps))


def is_other(categories):
    """(B, S) bool: which words name an object of another category than the first; categories (B, S), −1 for none."""
    return (categories >= 0) & (categories != categories[:, :1]) & (categories[:, :1] >= 0)


def fractions(relevance):
    """Positive relevance (..., K) as a fraction of its maximum over the regions; 0 where none is positive."""
    positive = relevance.clamp(min=0)
    return positive / positive.amax(-1, keepdim=True).clamp(min=torch.finfo(positive.dtype).tiny)


def own_evidence(relevance, categories, count):
    """(B, K) bool: the regions that are the first word's own, and of these the most relevant ones, at most `count`.

    A region is a word's own if its relevance, as a fraction of the word's maximum over all regions, is positive and
    exceeds that of every word of another category. relevance (B, S, K); categories (B, S), −1 for none; count: a
    number, or one per image (B, 1)."""
    share = fractions(relevance)
    largest_other = (share * is_other(categories)[..., None]).amax(1)                  # (B, K)
    own = torch.where(share[:, 0] > largest_other, share[:, 0], 0)
    rank = own.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (own > 0) & (rank < count)


def without_noun_phrase(captions, position, named, is_determiner):
    """Captions (B, L) without the noun phrase that ends with the object word at `position` (B, 1), padded with zeros.

    If there is another object word before it, all words between the two are removed as well: "a cat [with a chair] by a
    lake". If not, the words up to the next object's noun phrase are removed instead: "there is [a cat with] a chair". A
    noun phrase begins with the last determiner before its object word; without one, the first begins with the caption,
    and another with its object word. named, is_determiner (B, L): whether a word names an object, is a determiner."""
    index = torch.arange(captions.shape[1], device=captions.device).expand_as(captions)
    previous = index.masked_fill(~named | (index >= position), -1).amax(1, keepdim=True)
    following = index.masked_fill(~named | (index <= position), captions.shape[1]).amin(1, keepdim=True)

    def begin(after, end, default):     # of the noun phrase that ends at `end`: (B, 1)
        determiner = index.masked_fill(~is_determiner | (index >= end) | (index <= after), -1).amax(1, keepdim=True)
        return torch.where(determiner < 0, default, determiner)
    first, last = begin(previous, position, torch.ones_like(position)), begin(position, following, following)
    removed = torch.where(previous < 0, (index >= first) & (index < last), (index > previous) & (index <= position))
    order = removed.long().argsort(dim=1, stable=True)
    return captions.gather(1, order).masked_fill(removed.gather(1, order), 0)
