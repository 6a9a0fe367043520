"""Decoding for both models, batched over images: greedy, beam search, diverse beam search and sampling.

All use a model's start / initial_state / step with N hypotheses per image, stored as tensors (B, N, …). A finished
hypothesis is continued by <pad> with log-probability 0, so that it competes with its final score.
"""
from typing import NamedTuple

import torch

from captioning.device import autocast
from captioning.errors import InputError

METHODS = ("greedy", "beam_search", "diverse_beam_search", "sample")


class Decoded(NamedTuple):
    """Hypotheses of each image, best first (samples: in the order of sampling)."""
    tokens: torch.Tensor     # (B, N, T) ids after <start>, up to and including <end>, zero-padded
    scores: torch.Tensor     # (B, N) log-probability, divided by length**length_penalty


def decode(model, features, vocabulary, method="beam_search", max_len=50, **options):
    """Captions (B, T) of features (B, K, C), ids as in Decoded: the best hypothesis of `method`, or one sample.

    method: one of METHODS. options: those of `beam_search` or `sample`; diverse beam search has as many groups as
    hypotheses by default. banned (B, V) bool, an option of all: words that an image's caption must not contain.
    """
    with torch.no_grad():
        context = model.start(features)
        if method == "sample":
            return sample(model, context, vocabulary, max_len, **options).tokens[:, 0]
        if method == "greedy":
            options |= {"beam_size": 1}
        if method == "diverse_beam_search":
            options = {"groups": options.get("beam_size", 3)} | options
        return beam_search(model, context, vocabulary, max_len, best_only=True, **options).tokens[:, 0]


def beam_search(model, context, vocabulary, max_len, beam_size=3, groups=1, diversity=0.5, length_penalty=0.0,
                block_trigrams=False, best_only=False, banned=None):
    """Beam search; with groups > 1 diverse beam search (Vijayakumar et al. 2016) of beam_size / groups hypotheses each.

    model, context: a captioning model and its `start`. diversity: penalty of a word for each hypothesis of an earlier
    group that chose it at the same step (Hamming diversity); the returned scores exclude it. Hypotheses are compared
    by log-probability / length**length_penalty, length including <end>. beam_size 1 is greedy decoding.
    block_trigrams: never completes a trigram twice. best_only: stops as soon as every image's best hypothesis is final.
    Returns Decoded with N = beam_size; InputError if beam_size is not a multiple of groups.
    """
    if beam_size < 1 or groups < 1 or beam_size % groups:
        raise InputError(f"a beam width of {beam_size} cannot be split into {groups} equal groups: change one of them")
    B, N, width = len(context[0]), beam_size, beam_size // groups
    beam = _Beam(model, vocabulary, B, N, max_len, banned=banned)
    # all hypotheses of a group are equal at first: only one may be extended at the first step
    beam.scores[:, torch.arange(N) % width != 0] = -torch.inf
    for t in range(max_len):
        log_p, state = beam.step(context, t, block_trigrams)                           # (B, N, V)
        total = beam.scores[..., None] + log_p
        V, chosen, parents = total.shape[-1], [], []
        used = total.new_zeros(B, V)
        for g in range(groups):
            group = slice(g * width, (g + 1) * width)
            lengths = beam.lengths[:, group, None] + (~beam.finished[:, group, None]).to(total.dtype)
            rank = total[:, group] / lengths**length_penalty - diversity * used[:, None] * (groups > 1)
            best = rank.flatten(1).topk(width).indices                                 # (B, width)
            parents.append(best // V + g * width)
            chosen.append(best % V)
            used.scatter_add_(1, chosen[-1], (chosen[-1] != vocabulary.pad).to(used.dtype))
        beam.advance(torch.cat(parents, 1), torch.cat(chosen, 1), total, state, t)
        if beam.finished.all() or (best_only and not length_penalty and beam.settled()):
            break
    return beam.best_first(length_penalty, t + 1)


def sample(model, context, vocabulary, max_len, temperature=1.0, top_k=0, top_p=1.0, samples=1, generator=None,
           block_trigrams=False, greedy_first=False, predict=None, banned=None, draw=None):
    """Samples captions word by word -> Decoded with N = samples, whose scores are the model's log-probabilities.

    Words are sampled from the softmax of logits / temperature, restricted to the top_k most probable words (0: all)
    and to the fewest words whose probabilities sum to top_p (nucleus sampling, Holtzman et al. 2020). greedy_first:
    the first sample is decoded greedily instead. predict: as in the models' `step`. draw(p): exponentially
    distributed random numbers like p, in place of the generator's. InputError for invalid values."""
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise InputError("sampling needs a temperature above 0, top_p in (0, 1] and top_k of at least 0")
    beam = _Beam(model, vocabulary, len(context[0]), samples, max_len, predict, banned)
    parents = torch.arange(samples, device=beam.scores.device).expand(len(context[0]), -1)
    for t in range(max_len):
        log_p, state = beam.step(context, t, block_trigrams)
        p = _filtered(log_p / temperature, top_k, top_p).softmax(-1)                   # (B, N, V)
        # exponential races sample like torch.multinomial, which fails on NaN
        draws = draw(p) if draw else torch.empty_like(p).exponential_(generator=generator)
        draws = draws.clamp(min=torch.finfo(p.dtype).tiny)
        words = (p / draws).argmax(-1)                                                 # (B, N)
        if greedy_first:
            words[:, 0] = log_p[:, 0].argmax(-1)
        beam.advance(parents, words, beam.scores[..., None] + log_p, state, t)
        if beam.finished.all():
            break
    return Decoded(beam.tokens[..., :t + 1], beam.scores)


class _Beam:
    """N hypotheses for each of B images: tokens (B, N, max_len), scores, lengths, and the model's state."""

    def __init__(self, model, vocabulary, B, N, max_len, predict=None, banned=None):
        self.model, self.vocabulary, self.predict, self.banned = model, vocabulary, predict, banned
        self.state = model.initial_state(B, N)
        like = self.state[0]
        self.tokens = torch.zeros(B, N, max_len, dtype=torch.long, device=like.device)
        self.words = torch.full((B, N), vocabulary.start, device=like.device)
        self.scores = like.new_zeros(B, N, dtype=torch.promote_types(like.dtype, torch.float32))
        self.lengths = torch.zeros_like(self.scores)
        self.finished = torch.zeros(B, N, dtype=torch.bool, device=like.device)

    def step(self, context, t, block_trigrams):
        """Log-probabilities (B, N, V) of the next word, and the model's state after reading the last one."""
        logits, state, _ = self.model.step(self.words, self.state, context, self.predict)
        log_p = without_special(logits.to(self.scores.dtype), self.vocabulary).log_softmax(-1)
        if block_trigrams and t >= 2:
            log_p = log_p.masked_fill(self.repeated_trigrams(t, log_p.shape[-1]), -torch.inf)
        if self.banned is not None:     # after the softmax: scores remain the model's log-probabilities
            log_p = log_p.masked_fill(self.banned[:, None], -torch.inf)
        over = torch.full_like(log_p[0, 0], -torch.inf)
        over[self.vocabulary.pad] = 0
        return torch.where(self.finished[..., None], over, log_p), state

    def repeated_trigrams(self, t, V):
        """(B, N, V) bool: words that would complete a trigram that the hypothesis already contains."""
        past = self.tokens[..., :t]
        same = (past[..., :-2] == past[..., -2, None]) & (past[..., 1:-1] == past[..., -1, None])  # (B, N, t-2)
        seen = torch.zeros(*past.shape[:2], V, dtype=torch.long, device=past.device)
        seen = seen.scatter_add(2, past[..., 2:], same.long()) > 0
        seen[..., self.vocabulary.end] = False      # a hypothesis may always end
        return seen

    def advance(self, parents, words, total, state, t):
        """Replaces the hypotheses by parents (B, N), indices of hypotheses, extended by words (B, N)."""
        def follow(x):
            return x.gather(1, parents.view(*parents.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
        self.scores = follow(total).gather(2, words[..., None]).squeeze(2)
        self.state = tuple(follow(part) for part in state)
        self.tokens, self.lengths, self.finished = follow(self.tokens), follow(self.lengths), follow(self.finished)
        self.tokens[..., t] = words
        self.lengths = self.lengths + (~self.finished).to(self.lengths.dtype)
        self.finished = self.finished | (words == self.vocabulary.end)
        self.words = words

    def settled(self):
        """Whether each image's best hypothesis is finished: scores never increase, so it remains the best."""
        return self.finished.gather(1, self.scores.argmax(1, keepdim=True)).all()

    def best_first(self, length_penalty, T):
        """Decoded: the hypotheses of each image sorted by score, their first T tokens."""
        scores = self.scores / self.lengths.clamp(min=1)**length_penalty
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return Decoded(self.tokens.gather(1, order[..., None].expand_as(self.tokens))[..., :T], scores)


def with_start(tokens, vocabulary):
    """Captions (B, T+1) of tokens (B, T), as models read them: with <start> before them."""
    return torch.cat([tokens.new_full((len(tokens), 1), vocabulary.start), tokens], dim=1)


def trimmed(captions):
    """Captions (B, T), zero-padded, without the columns in which all are padding."""
    return captions[:, :int((captions != 0).any(0).sum())]


def without_special(logits, vocabulary):
    """Sets logits (..., V), in place, to -inf for <pad>, <start> and <unk>, which are never generated."""
    logits[..., [vocabulary.pad, vocabulary.start, vocabulary.unk]] = -torch.inf
    return logits


def _filtered(logits, top_k, top_p):
    """Logits (B, N, V) with -inf outside the top_k words and outside the nucleus."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p                                # keeps the most probable word
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def caption_batch(model, images, vocabulary, amp, device, method="greedy", decode=decode, **options):
    """Captions, as a list of strings, for images (B, 3, S, S) or region features (B, K, C). amp: mixed precision;
    decode: `decode`, or a function like it; options: those of `decode`."""
    model.eval()
    with torch.no_grad(), autocast(device, amp):
        tokens = decode(model, model.encode(images), vocabulary, method=method, **{"max_len": 50} | options)
    return [" ".join(vocabulary.decode(ids)) for ids in tokens.tolist()]
