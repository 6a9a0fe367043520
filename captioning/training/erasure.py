"""Evidence erasure (docs/method.md, section 7): words are unlearned where their evidence is erased.

Sizes: B images with N captions of T + 1 ids each, from <start> on; K regions; S object words of one
caption."""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from captioning.decoding import uniform
from captioning.explanation.methods import region_relevance
from captioning.training.losses import CrossEntropy, count_words, cross_entropy

EVIDENCE = ("lrp", "gradient", "grad_cam", "attention", "random")
FILL = ("background", "mean", "zero")
DETERMINERS = ("a", "an", "the", "this", "that", "these", "those", "another", "each", "both",
               "some", "several", "many", "one", "two", "three", "four", "five", "six", "his",
               "her", "its", "their")


class Choice(NamedTuple):
    """For each image a caption and its object words; the evidence of the first word is erased."""
    caption: torch.Tensor       # (B, T+1)
    steps: torch.Tensor         # (B, S) the steps that predict these words, in random order
    categories: torch.Tensor    # (B, S) of these words, −1 where a caption has fewer than S
    seeds: torch.Tensor         # (B,) of the images' random numbers
    index: torch.Tensor         # (B,) of the images in the data set


@dataclass(kw_only=True)
class ErasureLoss(CrossEntropy):
    """CE(p, y) − μ log(1 − p'(W)) + κ CE(p', y without w), p' predicted from erased features.

    For each image one of its captions y and one object word w of it are chosen at random; the
    features of the regions that are w's own evidence are replaced. From the erased features no word
    W of w's category should be predicted in the place of w, but the caption without w's noun phrase
    should. Captions that name only one category have no erased image. No gradient flows
    through the choice of the regions.

    The terms of erased images are computed in every N-th step only, with N times the weight (lazy
    regularisation, Karras et al. 2020)."""
    categories: torch.Tensor    # (V,), see `Objects.category_ids`
    weight: float               # μ
    keep_weight: float          # κ
    share: float                # of the regions: at most so many, or one, are erased
    every: int = 1              # N

    # controls
    evidence: str = "lrp"       # the relevance of a region, one of EVIDENCE
    own_evidence: bool = True   # False: what is more relevant for another word is erased as well
    fill: str = "background"    # what replaces regions, one of FILL

    def __post_init__(self):
        self.is_determiner = torch.tensor([word in DETERMINERS for word in self.vocabulary.words],
                                          device=self.categories.device)

    def counts(self, batch):
        """Those of CrossEntropy, then unlearned words, and words of captions without w."""
        unlearned, short = self.targets(choose(batch, self.categories))
        more = torch.stack([unlearned.sum(), count_words(short)])
        return torch.cat([super().counts(batch), more])

    def __call__(self, model, features, batch, counts):
        loss, log = super().__call__(model, features, batch, counts)
        if batch["step"] % self.every:
            return loss, log

        # the images whose caption names objects of two categories
        choice = choose(batch, self.categories)
        used = is_other(choice.categories).any(1)
        if used.any():
            choice = Choice(*(x[used.to(x.device)] for x in choice))
            erased = self.erase(model, features[used], choice)
            loss = loss + self.every * self.erased_loss(model, erased, choice, counts)
        return loss, log

    def targets(self, choice):
        """(B, T) bool: the steps at which words of w's category are unlearned; (B, T+1): the
        captions without w's noun phrase, all zero if they would still name the category."""
        category = choice.categories[:, :1]
        named = self.categories[choice.caption]                                        # (B, T+1)
        used = is_other(choice.categories).any(1, keepdim=True)
        short = without_noun_phrase(choice.caption, choice.steps[:, :1] + 1, named >= 0,
                                    self.is_determiner[choice.caption])
        is_free = (self.categories[short] != category).all(1, keepdim=True)
        return (used & (named == category))[:, 1:], short * (used & is_free)

    def erase(self, model, features, choice):
        """features (B, K, C) in which the evidence for each Choice's first word is replaced."""
        is_region = (features != 0).any(-1)                                # (B, K), without padding
        relevance = self.relevance(model, features, choice).detach() * is_region[:, None]

        # one region at least remains; in float32, 0.53 · 100 is just below 53
        regions = is_region.sum(1, keepdim=True)
        count = (self.share * regions + 1e-4).long().clamp(min=1).clamp(max=regions - 1)
        categories = choice.categories if self.own_evidence else choice.categories[:, :1]
        erased = own_evidence(relevance, categories, count)                            # (B, K)
        filling = self.filling(features, relevance, choice, is_region & ~erased)
        return torch.where(erased[..., None], filling.to(features), features)

    def relevance(self, model, features, choice):
        """(B, S, K) the relevance of the regions for the words of each Choice."""
        if self.evidence == "random":
            shape = (choice.steps.shape[1], features.shape[1])
            return uniform(choice.seeds + 1, shape, features.device).to(features)
        with torch.autocast(features.device.type, enabled=False):
            method = getattr(model, self.evidence)
            explanation = method(features, choice.caption, steps=choice.steps)
            if self.evidence == "grad_cam":     # its map before it is upsampled to pixels
                return torch.einsum("bsc,bkc->bsk", explanation.features.mean(2), features)
        return region_relevance(explanation, self.evidence)

    def filling(self, features, relevance, choice, remains):
        """(B, K, C) what replaces erased regions: for each, a random one of the half of the
        remaining regions that is least relevant for all object words, the mean of the remaining
        regions, or zero, which is padding where regions are detected.

        remains (B, K): the regions that are not erased; relevance (B, S, K): of a Choice's words.
        """
        if self.fill == "zero":
            return torch.zeros_like(features)
        number = remains.sum(1, keepdim=True)
        if self.fill == "mean":
            summed = (features * remains[..., None]).sum(1, keepdim=True)
            return summed / number[..., None].clamp(min=1)
        is_object = (choice.categories >= 0)[..., None]
        largest = (fractions(relevance) * is_object).amax(1)                           # (B, K)
        order = largest.masked_fill(~remains, torch.inf).argsort(dim=1)
        half = (number + 1).div(2, rounding_mode="floor").clamp(min=1)
        numbers = uniform(choice.seeds + 2, largest.shape[1:], features.device)
        chosen = order.gather(1, torch.minimum((numbers * half).long(), half - 1))
        return features.gather(1, chosen[..., None].expand_as(features))

    def erased_loss(self, model, erased, choice, counts):
        """The terms of the erased features (B, K, C), as shares of the mean over the batch."""
        unlearned, short = self.targets(choice)
        captions = torch.stack([choice.caption, short], 1)                             # (B, 2, T+1)
        if not self.keep_weight:
            captions = captions[:, :1]      # without κ, the second costs no time
        trace = model.teacher_force(erased, captions)

        # −log(1 − p'(W)) as a difference of logarithms, which is exact as p' nears 1
        logits = model.output(trace.hidden[:, 0][unlearned]).float()                   # (n, V)
        category = choice.categories[:, :1].expand_as(unlearned)[unlearned]
        synonyms = self.categories == category[:, None]
        others = logits.masked_fill(synonyms, -torch.inf).logsumexp(-1)
        unlikelihood = (logits.logsumexp(-1) - others).sum() / counts[2].clamp(min=1)

        rest, *_ = cross_entropy(model, trace.hidden[:, 1:], captions[:, 1:])
        return self.weight * unlikelihood + self.keep_weight * rest / counts[3].clamp(min=1)


def choose(batch, categories):
    """A random caption of each image, and its object words in random order -> Choice.

    categories (V,): see `Objects.category_ids`."""
    captions = batch["captions"]
    N, T = captions.shape[1], captions.shape[2] - 1
    numbers = uniform(batch["seeds"], (1 + T,), captions.device)
    chosen = (numbers[:, :1] * N).long().clamp(max=N - 1)
    caption = captions.take_along_dim(chosen[..., None], dim=1)[:, 0]
    named = categories[caption[:, 1:]]                                                 # (B, T)
    # object words first, in random order: their numbers are below 1
    order = numbers[:, 1:].masked_fill(named < 0, 2).argsort(dim=1)
    steps = order[:, :max(1, int((named >= 0).sum(1).max()))]
    return Choice(caption, steps, named.gather(1, steps), batch["seeds"], batch["index"])


def is_other(categories):
    """(B, S) bool: which words name an object of another category than the first.

    categories (B, S), −1 for none."""
    first = categories[:, :1]
    return (categories >= 0) & (categories != first) & (first >= 0)


def fractions(relevance):
    """Positive relevance (..., K) as a fraction of its maximum over the regions, if it has one."""
    positive = relevance.clamp(min=0)
    smallest = torch.finfo(positive.dtype).tiny
    return positive / positive.amax(-1, keepdim=True).clamp(min=smallest)


def own_evidence(relevance, categories, count):
    """(B, K) bool: the regions that are the first word's own, at most the `count` most relevant.

    A region is a word's own if its relevance, as a fraction of the word's maximum over all regions,
    is positive and exceeds that of every word of another category. relevance (B, S, K); categories
    (B, S), −1 for none; count: a number, or one per image (B, 1)."""
    share = fractions(relevance)
    largest_other = (share * is_other(categories)[..., None]).amax(1)                  # (B, K)
    own = torch.where(share[:, 0] > largest_other, share[:, 0], 0)
    # the argsort of an argsort is the rank of each entry
    rank = own.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (own > 0) & (rank < count)


def without_noun_phrase(captions, position, named, is_determiner):
    """Captions (B, L) without the noun phrase that ends with the object word at `position` (B, 1).

    If there is another object word before it, all words between the two are removed as well: "a cat
    [with a chair] by a lake". If not, the words up to the next object's noun phrase are removed
    instead: "there is [a cat with] a chair". A noun phrase begins with the last determiner before
    its object word; without one, the first begins with the caption, and another with its object
    word. named, is_determiner (B, L): whether a word names an object, is a determiner."""
    L = captions.shape[1]
    index = torch.arange(L, device=captions.device).expand_as(captions)
    previous = index.masked_fill(~named | (index >= position), -1).amax(1, keepdim=True)
    following = index.masked_fill(~named | (index <= position), L).amin(1, keepdim=True)

    def begin(after, end, default):     # of the noun phrase that ends at `end`: (B, 1)
        outside = ~is_determiner | (index >= end) | (index <= after)
        determiner = index.masked_fill(outside, -1).amax(1, keepdim=True)
        return torch.where(determiner < 0, default, determiner)
    first = begin(previous, position, torch.ones_like(position))
    last = begin(position, following, following)
    removed = torch.where(previous < 0, (index >= first) & (index < last),
                          (index > previous) & (index <= position))
    # the words that stay, in their order, then padding
    order = removed.long().argsort(dim=1, stable=True)
    return captions.gather(1, order).masked_fill(removed.gather(1, order), 0)
