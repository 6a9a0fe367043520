"""The experiments against literal loops over words, patches and pixels, on small random models."""
import copy
import itertools
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from aoamodel import AOAModel
from captioning import decoding
from captioning.data.vocabulary import build
from captioning.errors import InputError
from captioning.experiments import runner
from captioning.experiments.ablation import grey_out, patch_ablation, patch_ranks, word_ablation
from captioning.experiments.batch import RANDOM, Batch, Study
from captioning.experiments.correctness import THRESHOLDS, correctness
from captioning.experiments.deletion_insertion import deletion_insertion
from captioning.experiments.grounding import areas, cross_validated, fit_logistic, grounding
from captioning.experiments.localisation import Masks, mask_mass, pointing_game
from captioning.experiments.registry import EXPERIMENTS, mean_and_error
from captioning.experiments.runner import measure, run_experiments
from captioning.experiments.sanity import layers_from_the_top, randomise, rank_correlation, sanity
from captioning.experiments.tpfp import auc, average_ranks, roc_curve, statistics, tpfp
from captioning.explanation import methods
from captioning.metrics.object_words import Objects
from gridTDmodel import GridTDModel

METHODS = (*methods.METHODS, RANDOM)
S = 32      # side of an image in pixels: 16 patches
SENTENCES = ["the dog on a big red ball with a small cat", "a cat and the small dog with a ball", "big cat",
             "the big red dog on the big ball"]
WORDS = build([sentence.split() for sentence in SENTENCES], 1)
NAMES = [f"{i}.png" for i in range(len(SENTENCES))]
OBJECTS = Objects({"dog": "dog", "cat": "cat", "ball": "ball"})
BOXES = {name: {"categories": {"dog": 1, "cat": 2}, "shape": [S, S],
                "bbox": {"1": [[2, 3, 20, 17], [15, 1, 31, 30]], "2": [[0, 16, 16, 32]]}} for name in NAMES[:3]}
REFERENCES = [["a dog", "a red ball"], ["a cat"], ["nothing"], ["the dog on the ball"]]


class FixedMasks:
    """Masks of the dog, the left half of the image, and of the cat, one row."""

    def has(self, index, category):
        return category in ("dog", "cat")

    def mask(self, index, category, size):
        mask = torch.zeros(size, dtype=torch.bool)
        if category == "dog":
            mask[:, :S // 2] = True
        else:
            mask[5 + index] = True
        return mask


@pytest.fixture(scope="module", params=["gridtd", "aoa"])
def study(request):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Conv2d(4, 5, 3, 1, 1), nn.ReLU())
    sizes = {"vocab_size": len(WORDS), "embed_dim": 6, "hidden_dim": 8, "encoder": encoder}
    model = GridTDModel(**sizes, attention_dim=5) if request.param == "gridtd" else AOAModel(**sizes, num_head=2)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)       # so that predictions depend on words and images

    def decode(features):
        return decoding.decode(model, features, WORDS, "beam_search", 8, beam_size=3)
    return Study(model, WORDS, METHODS, OBJECTS, BOXES, {"dog", "cat", "ball"}, {"a", "the", "on", "with", "and"},
                 FixedMasks(), decode)


def random_images():
    return torch.randn(len(NAMES), 3, S, S, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def make_batch(study, indices=(0, 1, 2, 3), only=None):
    indices = list(indices)
    return Batch(study, indices, [NAMES[i] for i in indices], random_images()[indices],
                 [SENTENCES[i].split() for i in indices], [REFERENCES[i] for i in indices], only)


def probabilities(model, image, words):
    """(T, V): probabilities after each of the words read, for one image."""
    ids = torch.tensor([WORDS.encode(words, len(words))])
    with torch.no_grad():
        return model(image[None], ids)[0].softmax(-1)


def alone(study, method, i):
    """(maps (T, S, S), words (T, T)) of a method for image i in a batch of its own."""
    words = SENTENCES[i].split()
    if method == "random":
        maps, relevance = torch.stack([m for _, m in make_batch(study, [i])._random]), None
        return maps[0], make_batch(study, [i])._random[0][0]
    ids = torch.tensor([WORDS.encode(words, len(words))])
    name = "grad_cam" if method == "attention" else method
    explanation = getattr(study.model, name)(random_images()[i:i + 1], ids)
    if method != "attention":
        return explanation.pixels[0].sum(1), explanation.words[0]
    relevance = explanation.attention[0]
    relevance = relevance.mean(1) if relevance.dim() == 3 else relevance
    return nn.functional.interpolate(relevance.unflatten(1, (8, 8))[None], size=(S, S), mode="bilinear")[0], None


def indices_of(mask):
    return mask.nonzero(as_tuple=True)


def by_word(values, key, rows, steps):
    return {(b, t): value for b, t, value in zip(rows.tolist(), steps.tolist(), values[key].tolist(), strict=True)}


def patch_order(heat):
    """Patches (row, column) in descending order of their sums."""
    sums = {(y, x): sum(float(heat[8 * y + i, 8 * x + j]) for i in range(8) for j in range(8))
            for y in range(heat.shape[0] // 8) for x in range(heat.shape[1] // 8)}
    return sorted(sums, key=lambda patch: (-round(sums[patch], 12), patch))


def without(image, patches):
    image = image.clone()
    for y, x in patches:
        image[:, 8 * y:8 * y + 8, 8 * x:8 * x + 8] = 0
    return image


@pytest.mark.parametrize("method", METHODS)
def test_explanations_of_a_batch_equal_those_of_each_image(study, method):
    batch = make_batch(study)
    rows, steps = indices_of(batch.object_words)
    assert len(rows) == 9
    maps = batch.maps(method, rows, steps)
    for b, t, heat in zip(rows.tolist(), steps.tolist(), maps, strict=True):
        torch.testing.assert_close(heat, alone(study, method, b)[0][t].to(heat), rtol=1e-9, atol=1e-12)
    if method != "attention":
        relevance = batch.relevance(method, rows, steps)
        for b, t, word_relevance in zip(rows.tolist(), steps.tolist(), relevance, strict=True):
            expected = alone(study, method, b)[1][t].to(word_relevance)
            torch.testing.assert_close(word_relevance[:len(expected)], expected, rtol=1e-9, atol=1e-12)


def test_word_ablation_equals_a_literal_loop(study):
    batch = make_batch(study)
    rows, steps = indices_of((batch.object_words | batch.stop_words) & (torch.arange(batch.object_words.shape[1]) >= 6))
    values = word_ablation(batch, rows, steps)
    assert {method for method, _ in values} == set(METHODS) - {"attention"}
    tested_kinds = set()
    for method in ("lrp", "gradient", "random"):
        drops = {measure: by_word(values, (method, measure), rows, steps)
                 for measure in ("stop_word_drop", "object_word_drop")}
        for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
            words, relevance = SENTENCES[b].split(), alone(study, method, b)[1][t]
            ranked = sorted(range(1, t + 1), key=lambda i: -relevance[i].item())
            remaining = [words[i - 1] for i in range(1, t + 1) if i not in ranked[:3]]     # step i reads words[i - 1]
            word, image = WORDS.wordmap[words[t]], random_images()[b]
            drop = (probabilities(study.model, image, words)[t, word]
                    - probabilities(study.model, image, remaining)[len(remaining), word]).item()
            kind = "object_word_drop" if words[t] in ("dog", "cat", "ball") else "stop_word_drop"
            assert drops[kind][b, t] == pytest.approx(drop, abs=1e-9)
            assert math.isnan(drops[{"object_word_drop": "stop_word_drop"}.get(kind, "object_word_drop")][b, t])
            tested_kinds.add(kind)
    assert len(tested_kinds) == 2


def test_patch_ablation_equals_a_literal_loop(study):
    batch = make_batch(study)
    rows, steps = indices_of(batch.object_words)
    with torch.no_grad():
        values = patch_ablation(batch, rows, steps, patches=5)
    all_disappear = []
    for method in ("lrp", "grad_cam", "attention", "random"):
        disappears, drops = (by_word(values, (method, name), rows, steps) for name in ("disappears", "patch_drop"))
        for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
            words, heat, image = SENTENCES[b].split(), alone(study, method, b)[0][t], random_images()[b]
            ablated = without(image, patch_order(heat)[:5])
            new = WORDS.decode(study.decode(study.model.encode(ablated[None]))[0])
            all_disappear.append(words[t] not in new)
            assert disappears[b, t] == float(all_disappear[-1])
            if all_disappear[-1]:
                assert math.isnan(drops[b, t])
            else:
                position, word = new.index(words[t]), WORDS.wordmap[words[t]]
                drop = (probabilities(study.model, image, words)[t, word]
                        - probabilities(study.model, ablated, new)[position, word]).item()
                assert drops[b, t] == pytest.approx(drop, abs=1e-9)
    assert any(all_disappear)


def test_a_remaining_word_is_scored_at_its_first_position_in_the_new_caption(study):
    """The decoded caption contains every object word, so that none disappears."""
    new = [WORDS.wordmap[word] for word in ["a", "ball", "dog", "cat", "ball", "dog"]]
    fixed_caption = replace(study, methods=("lrp",), decode=lambda features: torch.tensor([new] * len(features)))
    batch = make_batch(fixed_caption)
    rows, steps = indices_of(batch.object_words)
    with torch.no_grad():
        values = patch_ablation(batch, rows, steps, patches=3)
    assert not values["lrp", "disappears"].any()
    for b, t, drop in zip(rows.tolist(), steps.tolist(), values["lrp", "patch_drop"].tolist(), strict=True):
        words, image = SENTENCES[b].split(), random_images()[b]
        ablated = without(image, patch_order(alone(study, "lrp", b)[0][t])[:3])
        position, word = {"ball": 1, "dog": 2, "cat": 3}[words[t]], WORDS.wordmap[words[t]]
        expected = (probabilities(study.model, image, words)[t, word]
                    - probabilities(study.model, ablated, ["a", "ball", "dog", "cat"])[position, word]).item()
        assert drop == pytest.approx(expected, abs=1e-9)


def test_deletion_and_insertion_equal_literal_loops(study):
    batch = make_batch(study)
    rows, steps = indices_of(batch.object_words)
    with torch.no_grad():
        values = deletion_insertion(batch, rows, steps)
    patches = [(y, x) for y in range(4) for x in range(4)]
    for method, (b, t) in itertools.product(("lrp", "guided_grad_cam", "random"),
                                            list(zip(rows.tolist(), steps.tolist(), strict=True))[::3]):
        words, order = SENTENCES[b].split(), patch_order(alone(study, method, b)[0][t])
        areas = {"deletion": 0.0, "insertion": 0.0}
        for name in areas:
            curve = []
            for i in range(11):
                most_relevant = order[:round(i / 10 * 16)]
                others = [patch for patch in patches if patch not in most_relevant]
                hidden = most_relevant if name == "deletion" else others
                p = probabilities(study.model, without(random_images()[b], hidden), words)[t, WORDS.wordmap[words[t]]]
                curve.append(p.log().item())
                assert by_word(values, (method, f"{name}_{i / 10}"), rows, steps)[b, t] == pytest.approx(curve[-1])
            area = sum(0.1 * (left + right) / 2 for left, right in itertools.pairwise(curve))
            assert by_word(values, (method, name), rows, steps)[b, t] == pytest.approx(area)


def test_images_that_are_not_square(study):
    """Every experiment on images of 4×6 patches; deletion against a literal loop."""
    study = replace(study, methods=("lrp", "attention", "random"), masks=FixedMasks())
    images = torch.randn(2, 3, S, S + 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    batch = Batch(study, [0, 1], NAMES[:2], images, [SENTENCES[i].split() for i in (0, 1)], REFERENCES[:2])
    for name, experiment in EXPERIMENTS.items():
        assert measure(experiment, batch), name
    rows, steps = indices_of(batch.object_words)
    maps = batch.maps("attention", rows, steps)
    assert maps.shape == (len(rows), S, S + 16)
    with torch.no_grad():
        deletion = deletion_insertion(batch, rows, steps)["attention", "deletion_0.5"]
    for b, t, heat, log_p in zip(rows.tolist(), steps.tolist(), maps, deletion.tolist(), strict=True):
        words = SENTENCES[b].split()
        hidden = without(images[b], patch_order(heat)[:12])
        expected = probabilities(study.model, hidden, words)[t, WORDS.wordmap[words[t]]].log().item()
        assert log_p == pytest.approx(expected)


def test_images_that_cannot_be_divided_into_patches_are_rejected():
    message = "images of 20×16 pixels cannot be divided into patches of 8×8 pixels"
    with pytest.raises(InputError, match=message):
        patch_ranks(torch.zeros(1, 16, 20))
    with pytest.raises(InputError, match=message):
        grey_out(torch.zeros(1, 3, 16, 20), torch.ones(1, 4, dtype=torch.bool))


def test_patch_ranks_keep_the_order_of_ties():
    heat = torch.zeros(1, 16, 16)
    heat[0, 8:, :8] = 1
    assert patch_ranks(heat).tolist() == [[1, 2, 0, 3]]


def test_correctness_pointing_game_and_mask_mass_equal_their_definitions(study):
    batch = make_batch(study)
    rows, steps = indices_of(batch.words_with_box)
    assert {(0, 1), (0, 10), (1, 1), (1, 5), (2, 1)} == set(zip(rows.tolist(), steps.tolist(), strict=True))
    shares, hits, masses = (function(batch, rows, steps) for function in (correctness, pointing_game, mask_mass))
    for method in METHODS:
        for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
            heat = alone(study, method, b)[0][t].clamp(min=0)
            category = SENTENCES[b].split()[t]
            boxes = BOXES[NAMES[b]]["bbox"]["1" if category == "dog" else "2"]
            total = heat.sum().clamp(min=1e-300)        # Grad-CAM can be zero everywhere
            best = max(heat[y0:y1, x0:x1].sum() for x0, y0, x1, y1 in boxes) / total
            assert by_word(shares, (method, "0.0"), rows, steps)[b, t] == pytest.approx(best.item())
            y, x = divmod(heat.argmax().item(), S)
            hit = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
            assert by_word(hits, (method, "hit"), rows, steps)[b, t] == float(hit and heat.max() > 0)
            inside = heat[:, :S // 2].sum() if category == "dog" else heat[5 + b].sum()
            assert by_word(masses, (method, "inside"), rows, steps)[b, t] == pytest.approx((inside / total).item())
    covered = np.zeros((S, S))
    for x0, y0, x1, y1 in BOXES[NAMES[0]]["bbox"]["1"]:
        covered[y0:y1, x0:x1] = 1
    assert by_word(hits, ("box", "hit"), rows, steps)[0, 1] == pytest.approx(covered.mean())
    assert by_word(masses, ("mask", "inside"), rows, steps)[2, 1] == pytest.approx(1 / S)
    assert len(shares) == len(METHODS) * len(THRESHOLDS) + 1


def test_a_map_without_positive_relevance_scores_zero(study):
    batch = make_batch(replace(study, methods=("lrp",)))
    batch._pixels["lrp"] = -torch.ones(len(NAMES), 4, S, S, dtype=torch.float64)
    rows, steps = indices_of(batch.words_with_box)
    assert not pointing_game(batch, rows, steps)["lrp", "hit"].any()
    assert not mask_mass(batch, rows, steps)["lrp", "inside"].any()


def test_tpfp_scores_are_statistics_of_the_maps(study):
    batch = make_batch(study)
    rows, steps = indices_of(batch.frequent_words)
    values = tpfp(batch, rows, steps)
    is_correct = by_word(values, ("reference", "right"), rows, steps)
    assert is_correct == {(b, t): float(any(SENTENCES[b].split()[t] in text.split() for text in REFERENCES[b]))
                     for b, t in zip(rows.tolist(), steps.tolist(), strict=True)}
    assert 0 < sum(is_correct.values()) < len(is_correct)
    for b, t in is_correct:
        heat = alone(study, "lrp", b)[0][t].flatten().tolist()
        expected = {"mean": sum(heat) / len(heat), "positive_mean": sum(max(x, 0) for x in heat) / len(heat),
                    "absolute_mean": sum(map(abs, heat)) / len(heat), "maximum": max(heat),
                    "quantile_0.25": sorted(heat)[round(0.25 * (len(heat) - 1))]}
        for name, value in expected.items():
            assert by_word(values, ("lrp", name), rows, steps)[b, t] == pytest.approx(value)
    if isinstance(study.model, GridTDModel):
        words = SENTENCES[3].split()
        beta = study.model.lrp(random_images()[3:], torch.tensor([WORDS.encode(words, len(words))])).beta
        assert by_word(values, ("sentinel", "1-beta"), rows, steps)[3, 3] == pytest.approx(1 - beta[0, 3].item())
    else:
        assert ("sentinel", "1-beta") not in values
    assert len(statistics(torch.rand(2, 4, 4))) == 9


def test_grounding_scores_equal_their_definitions(study):
    batch = make_batch(study)
    rows, steps = indices_of(batch.object_words)
    values = grounding(batch, rows, steps)
    for name, expected in (("present", lambda b, word: word in BOXES.get(NAMES[b], {"categories": ()})["categories"]
                            or any(word in text.split() for text in REFERENCES[b])), ("image", lambda b, word: b)):
        assert by_word(values, ("reference", name), rows, steps) == {
            (b, t): float(expected(b, SENTENCES[b].split()[t]))
            for b, t in zip(rows.tolist(), steps.tolist(), strict=True)}
    blank = copy.deepcopy(study.model)      # a model that sees no features
    for name, parameter in blank.named_parameters():
        if name in ("W_v.weight", "W_g.weight"):
            parameter.data.zero_()
    for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
        words = SENTENCES[b].split()
        word = WORDS.wordmap[words[t]]
        explanation = study.model.lrp(random_images()[b:b + 1], torch.tensor([WORDS.encode(words, len(words))]))
        image, logit = explanation.features[0, t].sum().item(), explanation.targets[0, t].item()
        parts = [getattr(explanation, part)[0, t].item() for part in ("image", "start", "previous", "rest")]
        log_p = [probabilities(model, random_images()[b], words)[t, word].log().item()
                 for model in (study.model, blank)]
        expected = {("lrp", "image"): image, ("lrp", "share"): image / logit,
                    ("lrp", "absolute_share"): image / sum(map(abs, parts)), ("model", "log_p"): log_p[0],
                    ("model", "log_p_gain"): log_p[0] - log_p[1]}
        for key, value in expected.items():
            assert by_word(values, key, rows, steps)[b, t] == pytest.approx(value, rel=1e-6)


def test_areas_of_scores_pairs_and_flags():
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(300, generator=generator) < 0.7
    image, log_p = (present + torch.randn(300, generator=generator) for _ in range(2))
    flagged = image < 0
    values = {("reference", "present"): present, ("reference", "biased"): torch.arange(300) % 2,
              ("reference", "image"): torch.arange(300) // 3, ("reference", "flagged"): flagged,
              ("lrp", "image"): image, ("model", "log_p"): log_p}
    table = areas({key: value.double().tolist() for key, value in values.items()})
    assert table["image", "all objects"][0] == pytest.approx(auc(image, present)[0])
    assert table["image", "biased objects"] == pytest.approx((*auc(image[1::2], present[1::2]), 150))
    assert table["image + log_p", "all objects"][0] > max(auc(image, present)[0], auc(log_p, present)[0])
    assert table["flagged", "precision"][0] == pytest.approx((flagged & ~present).sum().item() / flagged.sum().item())
    assert table["flagged", "recall"][0] == pytest.approx((flagged & ~present).sum().item() / (~present).sum().item())


def test_logistic_regression():
    x, y = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(400).double()
    y[torch.rand(400, generator=torch.Generator().manual_seed(1)) < (2 * x[:, 0] - x[:, 1] + 0.5).sigmoid()] = 1
    weights = fit_logistic(x, y).requires_grad_()
    logits = x @ weights[:2] + weights[2]
    loss = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") + weights.square().sum() / 2
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-9         # the minimum
    # each fold is predicted by the others: changing a fold's labels leaves its own predictions unchanged
    fold = torch.arange(400) % 5
    changed = torch.where(fold == 2, 1 - y, y)
    before, after = cross_validated(x, y, fold), cross_validated(x, changed, fold)
    assert torch.equal(before[fold == 2], after[fold == 2]) and not torch.equal(before[fold == 1], after[fold == 1])


def test_auc_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).double()       # with ties
    is_correct = torch.rand(40, generator=generator) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[is_correct].tolist() for b in scores[~is_correct].tolist()]
    area, error = auc(scores, is_correct)
    assert area == pytest.approx(sum(pairs) / len(pairs))
    false, true = roc_curve(scores, is_correct)
    assert torch.trapezoid(*map(torch.as_tensor, (true, false))).item() == pytest.approx(area)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    n, m = int(is_correct.sum()), int((~is_correct).sum())
    q1, q2 = area / (2 - area), 2 * area ** 2 / (1 + area)
    assert error ** 2 == pytest.approx((area * (1 - area) + (n - 1) * (q1 - area ** 2) + (m - 1) * (q2 - area ** 2))
                                       / (n * m))
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([True, False])) == (1, 0)
    assert math.isnan(auc(scores, torch.ones(40, dtype=torch.bool))[0])


def test_ties_get_their_average_rank():
    assert average_ranks(torch.tensor([[2.0, 1.0, 2.0, 5.0]])).tolist() == [[1.5, 0, 1.5, 3]]


def test_mean_and_standard_error():
    score = mean_and_error([1.0, 2.0, 6.0])
    assert score == pytest.approx((3, (7 / 3) ** 0.5, 3)) and math.isnan(mean_and_error([2.0]).error)


def test_random_maps_depend_on_the_file_name_and_the_seed_only(study):
    batch, reordered = make_batch(study), make_batch(study, [3, 0])
    rows, steps = torch.tensor([0, 3]), torch.tensor([1, 3])
    maps = reordered.maps("random", torch.tensor([1, 0]), steps)
    assert torch.equal(batch.maps("random", rows, steps), maps)
    other_seed = make_batch(replace(study, seed=2))
    assert not torch.equal(other_seed.maps("random", rows, steps), maps) and not torch.equal(maps[0], maps[1])
    T = len(SENTENCES[3].split()) + 1
    assert torch.equal(batch.relevance("random", rows, steps)[1, :T],
                       reordered.relevance("random", torch.tensor([0]), torch.tensor([3]))[0, :T])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_do_not_depend_on_the_batch(study, name):
    study = replace(study, methods=("lrp",) if name == "sanity" else ("lrp", "guided_grad_cam", "attention", "random"))
    batched = measure(EXPERIMENTS[name], make_batch(study, [1, 3]))
    single = []
    for i in (1, 3):
        T = len(SENTENCES[i].split()) + 1
        for t in range(1, T - 1):       # without the first word and <end>, which are not measured
            single += measure(EXPERIMENTS[name], make_batch(study, [i], (torch.arange(T) == t)[None]))
    assert len(batched) == len(single) > 0
    values = {row[:5]: float(row[5]) for row in single}
    assert len(values) == len(single)
    for row in batched:
        # rounding can swap neighbouring ranks
        assert float(row[5]) == pytest.approx(values[row[:5]], abs=1e-3 if name == "sanity" else 1e-6), row


class Split:
    """The data set of run_experiments: the four images and their references."""
    names, references = NAMES, REFERENCES

    def __len__(self):
        return len(NAMES)

    def __getitems__(self, indices):
        return {"images": random_images()[indices]}


def run(study, folder, names=("ablation", "pointing_game")):
    return run_experiments(study, Split(), SENTENCES, names, None, 2, 0, torch.device("cpu"), folder, ["test"])


def test_word_ablation_without_a_method_that_applies(study, tmp_path):
    """Attention assigns no relevance to words: only the measures of patch ablation remain."""
    table = run(replace(study, methods=("attention",)), tmp_path, ["ablation"])["ablation"]
    assert {measure_name for _, measure_name in table} <= {"disappears", "patch_drop"}
    assert ("attention", "disappears") in table and (tmp_path / "ablation_test.png").exists()


def test_an_experiment_without_any_result_writes_no_table(study, tmp_path, capsys, monkeypatch):
    word_part = EXPERIMENTS["ablation"]._replace(parts=EXPERIMENTS["ablation"].parts[:1])
    monkeypatch.setitem(EXPERIMENTS, "ablation", word_part)
    assert run(replace(study, methods=("attention",)), tmp_path, ["ablation"]) == {"ablation": {}}
    assert "ablation: the captions have no word that it measures" in capsys.readouterr().out
    assert not (tmp_path / "ablation_test.csv").exists()


def test_part_files_are_kept_until_all_tables_are_written(study, tmp_path, monkeypatch):
    """An interrupted run keeps its part files and resumes; after success their folder is removed."""
    study = replace(study, methods=("random",))
    tables = run(study, tmp_path / "uninterrupted")
    conclude, measured = runner.conclude, []

    def measure_and_record(experiment, batch):
        measured.append((batch.names[0], experiment))
        return measure(experiment, batch)

    def interrupt(name, *arguments):
        if name == "pointing_game":
            raise KeyboardInterrupt
        return conclude(name, *arguments)
    monkeypatch.setattr(runner, "measure", measure_and_record)
    monkeypatch.setattr(runner, "conclude", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "resumed")
    assert len(list((tmp_path / "resumed").glob("parts_*/*.csv"))) == len(measured) == 4
    other_run = tmp_path / "resumed" / "parts_of_another_run"
    other_run.mkdir()
    monkeypatch.setattr(runner, "conclude", conclude)
    assert run(study, tmp_path / "resumed") == tables and len(measured) == 4
    assert [path for path in (tmp_path / "resumed").iterdir() if path.is_dir()] == [other_run]
    names = {path.name for path in (tmp_path / "uninterrupted").iterdir()}
    assert names == {f"{name}{suffix}" for name in ("ablation", "pointing_game")
                     for suffix in ("_test.csv", "_test.png", "_words_test.csv")}


def test_which_words_are_measured(study):
    study = replace(study, methods=("lrp",))
    steps = {name: {(row[0], row[1]) for row in measure(EXPERIMENTS[name], make_batch(study))
                    if row[4] != "disappears" and row[4] != "patch_drop"} for name in ("ablation", "sanity", "tpfp")}
    assert steps["ablation"] == {("0.png", 6), ("0.png", 7), ("0.png", 8), ("0.png", 10), ("1.png", 6), ("1.png", 7),
                                 ("1.png", 8), ("3.png", 7)}
    assert steps["sanity"] == steps["tpfp"]         # no caption begins with an object word


def test_without_objects_frequent_words_are_object_words(study):
    batch = make_batch(replace(study, objects=Objects({}), boxes={}))
    assert torch.equal(batch.object_words, make_batch(study).object_words) and not batch.words_with_box.any()


def test_explanations_change_when_weights_are_randomised(study):
    """Noise, which does not depend on the model, keeps a correlation of 1."""
    batch = make_batch(study)
    rows, steps = indices_of(batch.object_words)
    values = sanity(batch, rows, steps)
    names = sorted({measure for _, measure in values})
    assert names[0] == "01_W_o" and names[-2:] == [f"{len(names) - 1:02d}_conv2", f"{len(names):02d}_conv1"]
    for method in ("lrp", "gradient", "guided_grad_cam", "grad_cam"):
        assert values[method, names[0]].abs().mean() < 0.9, method
        assert values[method, names[-1]].abs().mean() < 0.5, method
    assert torch.allclose(values["attention", names[0]], torch.ones(len(rows), dtype=torch.float64))     # precedes W_o
    assert values["attention", names[-1]].abs().mean() < 0.9
    assert all(torch.allclose(values["random", name], torch.ones(len(rows), dtype=torch.float64)) for name in names)
    assert torch.equal(make_batch(study).log_p, batch.log_p)        # the model itself is unchanged


def test_all_weights_are_randomised_exactly_once(study):
    model = copy.deepcopy(study.model)
    layers = layers_from_the_top(model)
    layer_weights = [id(weight) for _, layer in layers for weight in layer.parameters()]
    assert sorted(layer_weights) == sorted(map(id, model.parameters()))
    for _, layer in layers:
        randomise(layer, torch.Generator().manual_seed(0))
    for (name, weight), before in zip(model.named_parameters(), study.model.parameters(), strict=True):
        constant = before.std(correction=0) == 0        # batch-norm at its initial values
        assert torch.equal(weight, before) == bool(constant), name


def test_rank_correlation_is_spearmans_coefficient():
    a, b = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    expected = []
    for x, y in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        ranks = [[sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
                 for values in (x, y)]
        expected.append(np.corrcoef(ranks)[0, 1])
    assert rank_correlation(a, b).tolist() == pytest.approx(expected)
    assert rank_correlation(a, a.exp()).tolist() == pytest.approx([1] * 3)      # of a monotonically increasing function
    assert rank_correlation(a, torch.ones_like(b)).tolist() == [0] * 3


def write_masks(path, masks, things):
    with h5py.File(path, "w") as file:
        file.attrs["categories"] = ["dog", "cat"]
        file["test/masks"], file["test/things"] = np.array(masks, np.uint8), np.array(things, np.uint8)


def test_masks_are_read_from_a_file(tmp_path):
    write_masks(tmp_path / "m.hdf5", [[[0, 1], [2, 3]]], [[2, 1, 2]])       # two cats, one dog
    masks = Masks(tmp_path / "m.hdf5", "test", 1)
    assert masks.has(0, "cat") and not masks.has(0, "bird") and not masks.has(0, None)
    assert masks.mask(0, "cat", (2, 2)).tolist() == [[False, True], [False, True]]
    assert masks.mask(0, "dog", (4, 4)).tolist() == [[False] * 4] * 2 + [[True, True, False, False]] * 2


@pytest.mark.parametrize("split, count, message", [("val", 1, "no dataset 'val/masks'"),
                                                   ("test", 2, "'test/masks' is empty or of another form")])
def test_masks_of_another_split_or_size_are_rejected(tmp_path, split, count, message):
    write_masks(tmp_path / "m.hdf5", [[[0, 1], [2, 3]]], [[2, 1, 2]])
    with pytest.raises(InputError, match=message):
        Masks(tmp_path / "m.hdf5", split, count)
