"""Decoding is exact: batched or not, greedy as a beam of one, a wide beam as exhaustive search."""
import itertools
from collections import Counter

import pytest
import torch
from helpers import MODELS, refused, vocabulary_of

from aoamodel import AOAModel
from captioning import decoding
from gridTDmodel import GridTDModel

VOCABULARY = vocabulary_of("abc")
ALLOWED = [1, 2, 3, VOCABULARY.end]


def toy(seed=0, model_type=GridTDModel, sharp=4.0):
    """A random model of few words, sharpened so that hypotheses differ clearly."""
    torch.manual_seed(seed)
    model = model_type(len(VOCABULARY), 5, 6, encoder=None, feature_dim=4, **(
        {"attention_dim": 5} if model_type is GridTDModel else {"num_head": 2})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharp)
    return model


def features(B=4, seed=1):
    return torch.rand(B, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_probability(model, feature, words):
    """Literal score of one sequence of ids: the log-softmax of each step over allowed words."""
    captions = torch.tensor([[VOCABULARY.start, *words]])
    logits = model(feature[None], captions)[0]
    return sum(logits[t, ALLOWED].log_softmax(0)[ALLOWED.index(word)].item()
               for t, word in enumerate(words))


def all_scores(model, feature, max_len):
    """{words: log-probability} of all sequences of up to max_len ids."""
    rows = list(itertools.product(ALLOWED[:-1], repeat=max_len - 1))
    captions = torch.tensor([[VOCABULARY.start, *words, VOCABULARY.end] for words in rows])
    with torch.no_grad():
        logits = model(feature.expand(len(rows), -1, -1), captions)[..., ALLOWED]
    scores = {(): 0.0}
    for words, steps in zip(rows, logits.log_softmax(-1).tolist(), strict=True):
        for t, step in enumerate(steps):
            for word, value in zip(ALLOWED, step, strict=True):
                scores[(*words[:t], word)] = scores[words[:t]] + value
    return scores


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@MODELS
def test_wide_beam_equals_exhaustive_search(model_type, length_penalty):
    for seed in range(3):
        model, x = toy(seed, model_type), features(2, seed)
        found = decoding.beam_search(model, model.start(x), VOCABULARY, 4, 4**4,
                                     length_penalty=length_penalty)
        for b in range(2):
            scored = {words: score / len(words)**length_penalty
                      for words, score in all_scores(model, x[b], 4).items()
                      if words and (words[-1] == VOCABULARY.end or len(words) == 4)}
            words, score = max(scored.items(), key=lambda item: item[1])
            assert tuple(found.tokens[b, 0][found.tokens[b, 0] != 0].tolist()) == words
            assert found.scores[b, 0].item() == pytest.approx(score, abs=1e-10)


@pytest.mark.parametrize("options", [
    {}, {"length_penalty": 1.0}, {"block_trigrams": True}, {"groups": 2, "diversity": 0.8},
    {"groups": 4, "diversity": 2.0}, "sample"])
def test_batched_equals_one_at_a_time(options):
    """Samples as well: their random numbers belong to the image."""
    def decoded(model, x, seeds):
        context = model.start(x)
        if options == "sample":
            return decoding.sample(model, context, VOCABULARY, 8, seeds, samples=4)
        return decoding.beam_search(model, context, VOCABULARY, 8, 4, **options)

    for seed in range(4):
        model, x = toy(seed), features(5, seed)
        seeds = decoding.image_seeds(range(5), seed)
        together = decoded(model, x, seeds)
        for b in range(5):
            alone = decoded(model, x[b:b + 1], seeds[b:b + 1])
            T = min(alone.tokens.shape[-1], together.tokens.shape[-1])
            assert torch.equal(alone.tokens[0, :, :T], together.tokens[b, :, :T])
            torch.testing.assert_close(alone.scores[0], together.scores[b], rtol=0, atol=1e-10)


@MODELS
def test_beam_of_one_is_greedy(model_type):
    model, x = toy(2, model_type), features()
    greedy = decoding.decode(model, x, VOCABULARY, "greedy", max_len=8)
    found = decoding.beam_search(model, model.start(x), VOCABULARY, 8, 1)
    assert torch.equal(greedy, found.tokens[:, 0])
    coldest = decoding.decode(model, x, VOCABULARY, "sample", max_len=8, temperature=1e-300)
    assert torch.equal(greedy, coldest)
    for b in range(len(x)):     # by definition: the most probable word at every step
        words = []
        while len(words) < greedy.shape[1] and VOCABULARY.end not in words:
            scores = {word: log_probability(model, x[b], [*words, word]) for word in ALLOWED}
            words.append(max(scores, key=scores.get))
        assert greedy[b][greedy[b] != 0].tolist() == words


def test_nothing_follows_end_and_special_tokens_are_never_generated():
    model, x = toy(1, sharp=1.0), features(8)
    for method in decoding.DECODING_METHODS:
        options = {"beam_size": 4} if "beam" in method else {}
        tokens = decoding.decode(model, x, VOCABULARY, method, max_len=10, **options)
        assert not torch.isin(tokens, torch.tensor([VOCABULARY.start, VOCABULARY.unk])).any()
        after = ((tokens == VOCABULARY.end).cumsum(1) - (tokens == VOCABULARY.end).long()) > 0
        assert not tokens[after].any() and (tokens[~after] != 0).all()


def literal_beam_search(scores, groups, width, max_len, diversity=0.0, length_penalty=0.0):
    """Beam search, literally, for one image, with a beam for each group (Vijayakumar et al. 2016):
    [(score, words)], best first. Hypotheses that end leave the beam. scores: of `all_scores`."""
    beams = [[(0.0, ())] for _ in range(groups)]
    found = [[] for _ in range(groups)]
    for length in range(1, max_len + 1):
        said = Counter()
        for g in range(groups):
            candidates = []
            for _, words in beams[g]:
                for word in ALLOWED:
                    total = scores[(*words, word)]
                    candidates.append((total - diversity * said[word], total, (*words, word)))
            candidates.sort(key=lambda candidate: -candidate[0])
            for _, total, words in candidates[:width]:
                if words[-1] == VOCABULARY.end:
                    found[g].append((total / length**length_penalty, words))
            going_on = [candidate[1:] for candidate in candidates
                        if candidate[2][-1] != VOCABULARY.end]
            beams[g] = going_on[:width]
            said.update(words[-1] for _, _, words in candidates[:width])
    result = []
    for g in range(groups):
        cut = [(total / max_len**length_penalty, words) for total, words in beams[g]]
        result += sorted(found[g] + cut, key=lambda hypothesis: -hypothesis[0])[:width]
    return sorted(result, key=lambda hypothesis: -hypothesis[0])


@pytest.mark.parametrize("options", [
    {}, {"length_penalty": 1.0}, {"groups": 2, "diversity": 0.7},
    {"groups": 2, "diversity": 0.7, "length_penalty": 0.6}, {"groups": 4, "diversity": 0.0}])
def test_beam_search_equals_a_literal_one(options):
    """Also where it stops early; in some cases the best hypothesis is not of the first group."""
    groups = options.get("groups", 1)
    later = 0
    for seed in range(8):
        model, x = toy(seed, sharp=2.0), features(4, seed)
        found = decoding.beam_search(model, model.start(x), VOCABULARY, 5, 4, **options)
        for b in range(4):
            scores = all_scores(model, x[b], 5)
            literal = dict(width=4 // groups, max_len=5, **{"groups": 1} | options)
            score, words = literal_beam_search(scores, **literal)[0]
            assert tuple(found.tokens[b, 0][found.tokens[b, 0] != 0].tolist()) == words
            assert found.scores[b, 0].item() == pytest.approx(score, abs=1e-10)
            later += words != literal_beam_search(scores, **literal | {"groups": 1})[0][1]
    assert later > 2 or groups != 2


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_captions_are_as_good_as_those_of_the_literal_search(length_penalty):
    """288 captions, although `decode` stops early."""
    for model_type, seed in itertools.product((GridTDModel, AOAModel), range(12)):
        model, x = toy(seed, model_type, sharp=2.0), features(4, seed)
        scores_of = [all_scores(model, feature, 6) for feature in x]
        for width in (2, 3, 5):
            captions = decoding.decode(model, x, VOCABULARY, "beam_search", max_len=6,
                                       beam_size=width, length_penalty=length_penalty)
            for scores, caption in zip(scores_of, captions, strict=True):
                words = tuple(caption[caption != 0].tolist())
                score = scores[words] / len(words)**length_penalty
                literal = literal_beam_search(scores, 1, width, 6, length_penalty=length_penalty)
                assert score >= literal[0][0] - 1e-9


def test_groups_of_several_hypotheses():
    model, x = toy(3, sharp=2.0), features(4)
    options = {"beam_size": 4, "groups": 2}
    expected = decoding.beam_search(model, model.start(x), VOCABULARY, 6, **options).tokens[:, 0]
    decoded = decoding.decode(model, x, VOCABULARY, "diverse_beam_search", max_len=6, **options)
    assert torch.equal(decoded, expected)


def test_a_caption_that_ended_is_not_lost_when_others_are_better_for_a_while():
    """p = 0.3 of the caption without words; then two others with 0.31, whose best end has 0.155."""
    steps = [{"a": 0.62, "<end>": 0.3, "b": 0.08}, {"b": 0.5, "c": 0.5}, {"a": 0.5, "c": 0.5}]

    class Steps:
        """A model whose next word depends on the number of words alone."""
        def initial_state(self, B, N):
            return (torch.zeros(B, N, 1, dtype=torch.float64),)

        def step(self, words, state, context, predict=None):
            p = steps[int(state[0].max())]
            logits = torch.tensor([p.get(word, 1e-9) for word in VOCABULARY.words]).double().log()
            return logits.expand(*words.shape, -1).clone(), (state[0] + 1,), None

    found = decoding.beam_search(Steps(), (torch.zeros(1),), VOCABULARY, 3, 2)
    assert VOCABULARY.decode(found.tokens[0, 0]) == []
    assert found.scores[0, 0].exp().item() == pytest.approx(0.3, abs=1e-6)


def test_trigrams_are_blocked():
    for seed in range(8):
        model, x = toy(seed, sharp=8.0), features(6, seed)
        tokens = decoding.decode(model, x, VOCABULARY, "beam_search", max_len=20, beam_size=2,
                                 block_trigrams=True)
        for row in tokens.tolist():
            words = [word for word in row if word not in (0, VOCABULARY.end)]
            trigrams = list(zip(words, words[1:], words[2:], strict=False))
            assert len(trigrams) == len(set(trigrams))


def first_words(model, x, count=4000, **options):
    seeds = decoding.image_seeds([7])
    with torch.no_grad():
        found = decoding.sample(model, model.start(x), VOCABULARY, 1, seeds, samples=count,
                                **options)
    return Counter(found.tokens[0, :, 0].tolist())


def test_sampling_follows_the_model():
    model, x = toy(0, sharp=1.5), features(1)
    p = torch.tensor([log_probability(model, x[0], [word]) for word in ALLOWED]).exp()
    counts = first_words(model, x)
    for word, probability in zip(ALLOWED, p.tolist(), strict=True):
        tolerance = 4 * (probability / 4000)**0.5 + 1e-3
        assert counts[word] / 4000 == pytest.approx(probability, abs=tolerance)
    ranked = [ALLOWED[i] for i in p.argsort(descending=True).tolist()]
    assert set(first_words(model, x, top_k=2)) == set(ranked[:2])
    sums = p.sort(descending=True).values.cumsum(0)
    nucleus = next(n for n in range(1, 5) if sums[n - 1] >= 0.6)
    assert set(first_words(model, x, top_p=0.6)) == set(ranked[:nucleus])
    assert set(first_words(model, x, temperature=1e-3)) == {ranked[0]}


def test_random_numbers_belong_to_images():
    """More numbers begin with the same ones, other seeds give others, also in the next integer."""
    seeds, cpu = decoding.image_seeds([3, 5, 3], 1, 0), torch.device("cpu")
    numbers = decoding.uniform(seeds, (40,), cpu)
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[1:2, :7], decoding.uniform(seeds[1:2], (7,), cpu))
    assert torch.equal(numbers.view(3, 4, 10)[:, :2], decoding.uniform(seeds, (2, 10), cpu))
    assert not torch.equal(numbers, decoding.uniform(seeds + 1, (40,), cpu))
    assert not torch.equal(seeds, decoding.image_seeds([3, 5, 3], 1, 1))
    many = decoding.uniform(decoding.image_seeds(range(2000)), (2,), cpu)
    assert ((many >= 0) & (many < 1)).all() and (many.mean(0) - 0.5).abs().max() < 0.03
    assert torch.corrcoef(many.T)[0, 1].abs() < 0.1


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_words_of_probability_zero_are_never_drawn(number):
    numbers = torch.full((2,), number, dtype=torch.float64)
    p = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    expected = {0.0: 2, 0.5: 4}.get(number, 4)
    assert decoding.draw(p, numbers).tolist() == [expected, 1]
    assert decoding.draw(p.double(), numbers).tolist() == [expected, 1]
    decoding.draw(p * torch.nan, numbers)       # reported by the training loop


def test_sample_scores_are_log_probabilities():
    model, x = toy(4, AOAModel), features(2)
    drawn = decoding.sample(model, model.start(x), VOCABULARY, 6, samples=3, temperature=1.3)
    for b, n in itertools.product(range(2), range(3)):
        words = [word for word in drawn.tokens[b, n].tolist() if word]
        expected = log_probability(model, x[b], words)
        assert drawn.scores[b, n].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("method", decoding.DECODING_METHODS)
def test_logits_that_are_not_finite_are_refused(method):
    model, x = toy(), features()
    with torch.no_grad():
        model.W_o.bias.fill_(torch.nan)
    with refused("not finite numbers"):
        decoding.decode(model, x, VOCABULARY, method, max_len=8)
