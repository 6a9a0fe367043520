"""Decoding, batched over images: greedy, beam search, diverse beam search and sampling.

All use a model's start / initial_state / step with N hypotheses per image, stored as tensors
(B, N, …).
"""
from typing import NamedTuple

import torch

from captioning.device import autocast
from captioning.errors import InputError
from captioning.files import fingerprint

DECODING_METHODS = ("greedy", "beam_search", "diverse_beam_search", "sample")


class Decoded(NamedTuple):
    """Hypotheses of each image, best first (samples: in the order of sampling)."""
    tokens: torch.Tensor     # (B, N, T) ids after <start>, up to and including <end>, zero-padded
    scores: torch.Tensor     # (B, N) log-probability, divided by length**length_penalty


def decode(model, features, vocabulary, method="beam_search", max_len=50, seeds=None, **options):
    """Captions (B, T) of features (B, K, C): the best hypothesis of the method, or one sample.

    method: one of DECODING_METHODS. seeds: of `sample`, which alone uses them. options: those of
    `beam_search` or `sample`; diverse beam search has as many groups as hypotheses by default.
    InputError if the model's logits are not finite numbers.
    """
    if hasattr(model, "caption"):       # a model of transformers has decoding methods of its own
        return model.caption(features, method, max_len, seeds, **options)
    with torch.no_grad():
        context = model.start(features)
        if method == "greedy":
            options |= {"beam_size": 1}
        if method == "diverse_beam_search":
            options = {"groups": options.get("beam_size", 3)} | options
        if method == "sample":
            found = sample(model, context, vocabulary, max_len, seeds=seeds, **options)
        else:
            found = beam_search(model, context, vocabulary, max_len, **options)
    if not found.scores[:, 0].isfinite().all():
        raise InputError("the model's logits are not finite numbers, so that it cannot caption "
                         "images: use another checkpoint")
    return found.tokens[:, 0]


def beam_search(model, context, vocabulary, max_len, beam_size=3, groups=1, diversity=0.5,
                length_penalty=0.0, block_trigrams=False, banned=None):
    """Beam search -> Decoded with N = 1, the best hypothesis; groups > 1: diverse beam search.

    Hypotheses that end leave the beam, so that all its places belong to hypotheses that go on. They
    are compared by log-probability / length**length_penalty, length including <end>; those that
    max_len cuts off count as well. In diverse beam search (Vijayakumar et al. 2016), each group has
    beam_size / groups hypotheses. diversity: penalty of a word for each hypothesis of an earlier
    group that chose it at the same step; the returned score excludes it. beam_size 1 and no
    length_penalty are greedy decoding. block_trigrams: never completes a trigram twice. banned (B,
    V) bool: words that an image's caption must not contain.
    """
    B = len(context[0])
    width = beam_size // groups
    beam = _Beam(model, vocabulary, B, beam_size, max_len, block_trigrams, banned)
    best = Decoded(beam.tokens[:, :1], torch.full_like(beam.scores[:, :1], -torch.inf))

    # all hypotheses of a group are equal at first: only one may be extended at the first step
    beam.scores[:, torch.arange(beam_size) % width != 0] = -torch.inf

    for t in range(max_len):
        log_p, state = beam.step(context, t)                                           # (B, N, V)
        total = beam.scores[..., None] + log_p
        V = total.shape[-1]

        # twice as many candidates as places, since each hypothesis has one that ends; one group
        # after the other: each avoids the words that earlier groups chose. A candidate is one
        # number: the index of its hypothesis · V + its word
        candidates = []
        used = total.new_zeros(B, V)
        for g, rank in enumerate(total.split(width, 1)):                               # (B, W, V)
            if g:
                rank = rank - diversity * used[:, None]
            chosen = rank.flatten(1).topk(2 * width).indices                           # (B, 2W)
            used.scatter_add_(1, chosen[:, :width] % V, used.new_ones(B, width))
            candidates.append(chosen + g * width * V)
        candidates = torch.stack(candidates, 1)                                        # (B, G, 2W)

        # one that ends counts only if it is among the `width` best of its group
        placed = candidates[..., :width].flatten(1)                                    # (B, N)
        tokens = beam.tokens.take_along_dim((placed // V)[..., None], 1)
        tokens[..., t] = vocabulary.end
        scores = total.flatten(1).gather(1, placed) / (t + 1)**length_penalty
        scores = scores.masked_fill(placed % V != vocabulary.end, -torch.inf)
        best = _best(best, tokens, scores)

        # the best of the others go on
        order = (candidates % V == vocabulary.end).long().argsort(dim=2, stable=True)
        others = candidates.gather(2, order[..., :width]).flatten(1)                   # (B, N)
        beam.advance(others // V, others % V, total, state, t)

        # what the hypotheses in the beam can reach: log-probabilities never increase
        limit = beam.scores.amax(1, keepdim=True) / max_len**length_penalty
        if (best.scores >= limit).all():
            break

    # those that max_len cut off
    best = _best(best, beam.tokens, beam.scores / (t + 1)**length_penalty)
    return Decoded(best.tokens[..., :t + 1], best.scores)


def _best(best, tokens, scores):
    """The best hypothesis of each image: `best`, or one of others (B, N, max_len)."""
    tokens = torch.cat([best.tokens, tokens], 1)
    scores, index = torch.cat([best.scores, scores], 1).max(1, keepdim=True)
    return Decoded(tokens.take_along_dim(index[..., None], 1), scores)


def sample(model, context, vocabulary, max_len, seeds=None, temperature=1.0, top_k=0, top_p=1.0,
           samples=1, block_trigrams=False, greedy_first=False, predict=None, banned=None):
    """Samples captions word by word -> Decoded with N = samples, scored by their log-probability.

    Words are drawn from the softmax of logits / temperature, restricted to the top_k most probable
    words (0: all) and to the fewest words whose probabilities sum to top_p (nucleus sampling,
    Holtzman et al. 2020). seeds (B,): of `image_seeds`, which make samples reproducible; by default
    random. greedy_first: the first sample is decoded greedily instead. predict: as in the models'
    `step`. block_trigrams, banned: as in `beam_search`.
    """
    B = len(context[0])
    beam = _Beam(model, vocabulary, B, samples, max_len, block_trigrams, banned, predict)
    device = beam.scores.device
    parents = torch.arange(samples, device=device).expand(B, -1)
    if seeds is None:
        seeds = torch.randint(2**62, (B,))
    numbers = uniform(seeds, (samples, max_len), device)

    for t in range(max_len):
        log_p, state = beam.step(context, t)                                           # (B, N, V)
        # relative to the most probable word, since a low temperature divides by nearly 0
        scaled = (log_p - log_p.amax(-1, keepdim=True)) / max(temperature, 1e-30)
        p = _filtered(scaled, top_k, top_p).softmax(-1)
        words = draw(p, numbers[..., t])                                               # (B, N)
        if greedy_first:
            words[:, 0] = log_p[:, 0].argmax(-1)
        beam.advance(parents, words, beam.scores[..., None] + log_p, state, t)
        if beam.finished.all():
            break
    return Decoded(beam.tokens[..., :t + 1], beam.scores)


def image_seeds(indices, *run):
    """Seeds (B,) of the images with these indices in the data set; run: such as seed and epoch.

    Whatever is drawn from them does not depend on how images are split into batches and processes.
    """
    return torch.tensor([int(fingerprint([*run, index]), 16) % 2**62 for index in indices])


def uniform(seeds, shape, device):
    """Random numbers (B, *shape) in [0, 1), those of image b a function of seeds[b] alone.

    Arrays with a longer first dimension begin with the same numbers; seeds + 1, seeds + 2, … give
    others."""
    rows = [torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds.tolist()]
    numbers = torch.stack(rows)
    if device.type == "mps":        # has no float64
        numbers = numbers.float()
    return numbers.to(device)


def draw(p, numbers):
    """Words (...) drawn from probabilities p (..., V) with one uniform number (...) each.

    The word is the first one at which the cumulative sum of p exceeds the number."""
    cumulative = p.to(numbers.dtype).cumsum(-1)
    thresholds = (numbers * cumulative[..., -1]).contiguous()
    words = torch.searchsorted(cumulative, thresholds[..., None], right=True)
    words = words.clamp(max=p.shape[-1] - 1)
    # rounding must never choose a word of probability 0; p may also be NaN, which training reports
    possible = p.gather(-1, words) > 0
    return torch.where(possible, words, p.argmax(-1, keepdim=True)).squeeze(-1)


class _Beam:
    """N hypotheses for each of B images: tokens (B, N, max_len), scores, the model's state.

    A finished hypothesis is continued by <pad> with log-probability 0."""

    def __init__(self, model, vocabulary, B, N, max_len, block_trigrams, banned, predict=None):
        self.model = model
        self.vocabulary = vocabulary
        self.block_trigrams = block_trigrams
        self.banned = banned
        self.predict = predict
        self.state = model.initial_state(B, N)
        like = self.state[0]
        self.tokens = torch.zeros(B, N, max_len, dtype=torch.long, device=like.device)
        self.words = torch.full((B, N), vocabulary.start, device=like.device)
        self.scores = like.new_zeros(B, N, dtype=torch.promote_types(like.dtype, torch.float32))
        self.finished = torch.zeros(B, N, dtype=torch.bool, device=like.device)

    def step(self, context, t):
        """Log-probabilities (B, N, V) of the next word, and the state after reading the last."""
        logits, state, _ = self.model.step(self.words, self.state, context, self.predict)
        log_p = without_special(logits.to(self.scores.dtype), self.vocabulary).log_softmax(-1)
        # after the softmax, so that scores remain the model's log-probabilities
        if self.block_trigrams and t >= 2:
            log_p = log_p.masked_fill(self.repeated_trigrams(t, log_p.shape[-1]), -torch.inf)
        if self.banned is not None:
            log_p = log_p.masked_fill(self.banned[:, None], -torch.inf)
        over = torch.full_like(log_p[0, 0], -torch.inf)
        over[self.vocabulary.pad] = 0
        return torch.where(self.finished[..., None], over, log_p), state

    def repeated_trigrams(self, t, V):
        """(B, N, V) bool: words that would complete a trigram that the hypothesis contains."""
        past = self.tokens[..., :t]
        same = past[..., :-2] == past[..., -2, None]                                   # (B, N, t-2)
        same &= past[..., 1:-1] == past[..., -1, None]
        seen = torch.zeros(*past.shape[:2], V, dtype=torch.long, device=past.device)
        seen = seen.scatter_add(2, past[..., 2:], same.long()) > 0
        seen[..., self.vocabulary.end] = False      # a hypothesis may always end
        return seen

    def advance(self, parents, words, total, state, t):
        """Replaces each hypothesis by that of index parents (B, N), extended by words (B, N).

        total (B, N, V): the scores of all extensions; state: the one that `step` returned."""
        def follow(x):
            return x.take_along_dim(parents.view(*parents.shape, *[1] * (x.dim() - 2)), 1)
        self.scores = total.flatten(1).gather(1, parents * total.shape[-1] + words)
        self.state = tuple(follow(part) for part in state)
        self.tokens = follow(self.tokens)
        self.tokens[..., t] = words
        self.finished = follow(self.finished) | (words == self.vocabulary.end)
        self.words = words


def with_start(tokens, vocabulary):
    """Captions (..., T+1) of tokens (..., T), as models read them: with <start> before them."""
    return torch.cat([torch.full_like(tokens[..., :1], vocabulary.start), tokens], -1)


def trimmed(captions):
    """Captions (B, T), zero-padded, without the columns in which all are padding."""
    return captions[:, :int((captions != 0).any(0).sum())]


def without_special(logits, vocabulary):
    """Sets logits (..., V), in place, to -inf for <pad>, <start> and <unk>: never generated."""
    logits[..., [vocabulary.pad, vocabulary.start, vocabulary.unk]] = -torch.inf
    return logits


def _filtered(logits, top_k, top_p):
    """Logits (B, N, V) with -inf outside the top_k words and outside the nucleus."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # the most probable word always stays
        outside = ordered.cumsum(-1) - ordered >= top_p
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def caption_batch(model, images, vocabulary, amp, device, decode=decode, **options):
    """Captions, as strings, for images (B, 3, S, S) or region features (B, K, C).

    amp: mixed precision. decode: a function like `decode`; options: its options."""
    model.eval()
    with torch.no_grad(), autocast(device, amp):
        tokens = decode(model, model.encode(images), vocabulary, **options)
    return [" ".join(vocabulary.decode(ids)) for ids in tokens.tolist()]
