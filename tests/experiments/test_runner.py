"""Scores of explanations against slow literal loops over words, patches and pixels, on small random models."""
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
from captioning.experiments.ablation import patch_ablation, patch_ranks, word_ablation
from captioning.experiments.batch import METHODS, Batch, Study
from captioning.experiments.correctness import THRESHOLDS, correctness
from captioning.experiments.deletion_insertion import deletion_insertion
from captioning.experiments.localisation import Masks, mask_mass, pointing_game
from captioning.experiments.registry import EXPERIMENTS, mean_and_error
from captioning.experiments.runner import measure
from captioning.experiments.sanity import layers_from_the_top, randomise, rank_correlation, sanity
from captioning.experiments.tpfp import auc, average_ranks, roc_curve, statistics, tpfp
from captioning.metrics.object_words import Objects
from gridTDmodel import GridTDModel

S = 32      # pixels of a picture's side: 16 patches
SENTENCES = ["the dog on a big red ball with a small cat", "a cat and the small dog with a ball", "big cat",
             "the big red dog on the big ball"]
WORDS = build([sentence.split() for sentence in SENTENCES], 1)
NAMES = [f"{i}.png" for i in range(len(SENTENCES))]
OBJECTS = Objects({"dog": "dog", "cat": "cat", "ball": "ball"})
BOXES = {name: {"categories": {"dog": 1, "cat": 2}, "shape": [S, S],
                "bbox": {"1": [[2, 3, 20, 17], [15, 1, 31, 30]], "2": [[0, 16, 16, 32]]}} for name in NAMES[:3]}
REFERENCES = [["a dog", "a red ball"], ["a cat"], ["nothing"], ["the dog on the ball"]]


class FixedMasks:
    """The dog stands on the left half, the cat on one row."""

    def has(self, index, category):
        return category in ("dog", "cat")

    def of(self, index, category, size):
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
            parameter.mul_(2)       # so that words and pictures matter

    def decode(features):
        return decoding.decode(model, features, WORDS, "beam_search", 8, beam_size=3)
    return Study(model, WORDS, METHODS, OBJECTS, BOXES, {"dog", "cat", "ball"}, {"a", "the", "on", "with", "and"},
                 FixedMasks(), decode)


def pictures():
    return torch.randn(len(NAMES), 3, S, S, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def make_batch(study, indices=(0, 1, 2, 3), only=None):
    indices = list(indices)
    return Batch(study, indices, [NAMES[i] for i in indices], pictures()[indices],
                 [SENTENCES[i].split() for i in indices], [REFERENCES[i] for i in indices], only)


def probabilities(model, image, words):
    """(T, V) after each of the words read, for one picture."""
    ids = torch.tensor([WORDS.encode(words, len(words))])
    with torch.no_grad():
        return model(image[None], ids)[0].softmax(-1)


def alone(study, method, i):
    """(maps (T, S, S), words (T, T)) of a method for picture i alone."""
    words = SENTENCES[i].split()
    if method == "random":
        maps, relevance = torch.stack([m for _, m in make_batch(study, [i])._random]), None
        return maps[0], make_batch(study, [i])._random[0][0]
    ids = torch.tensor([WORDS.encode(words, len(words))])
    name = "grad_cam" if method == "attention" else method
    found = getattr(study.model, name)(pictures()[i:i + 1], ids)
    if method != "attention":
        return found.pixels[0].sum(1), found.words[0]
    relevance = found.attention[0]
    relevance = relevance.mean(1) if relevance.dim() == 3 else relevance
    return nn.functional.interpolate(relevance.unflatten(1, (8, 8))[None], size=(S, S), mode="bilinear")[0], None


def chosen(mask):
    return mask.nonzero(as_tuple=True)


def by_word(found, key, rows, steps):
    return {(b, t): value for b, t, value in zip(rows.tolist(), steps.tolist(), found[key].tolist(), strict=True)}


def patch_order(heat):
    """Patches (row, column) by falling sum."""
    sums = {(y, x): sum(float(heat[8 * y + i, 8 * x + j]) for i in range(8) for j in range(8))
            for y in range(S // 8) for x in range(S // 8)}
    return sorted(sums, key=lambda place: (-round(sums[place], 12), place))


def without(image, patches):
    image = image.clone()
    for y, x in patches:
        image[:, 8 * y:8 * y + 8, 8 * x:8 * x + 8] = 0
    return image


@pytest.mark.parametrize("method", METHODS)
def test_explanations_are_the_models_own(study, method):
    batch = make_batch(study)
    rows, steps = chosen(batch.object_words)
    assert len(rows) == 9
    maps = batch.maps(method, rows, steps)
    for b, t, heat in zip(rows.tolist(), steps.tolist(), maps, strict=True):
        torch.testing.assert_close(heat, alone(study, method, b)[0][t].to(heat), rtol=1e-9, atol=1e-12)
    if method != "attention":
        relevance = batch.relevance(method, rows, steps)
        for b, t, own in zip(rows.tolist(), steps.tolist(), relevance, strict=True):
            expected = alone(study, method, b)[1][t].to(own)
            torch.testing.assert_close(own[:len(expected)], expected, rtol=1e-9, atol=1e-12)


def test_word_ablation_is_the_literal_loop(study):
    batch = make_batch(study)
    rows, steps = chosen((batch.object_words | batch.stop_words) & (torch.arange(batch.object_words.shape[1]) >= 6))
    found = word_ablation(batch, rows, steps)
    assert {method for method, _ in found} == set(METHODS) - {"attention"}
    seen = set()
    for method in ("lrp", "gradient", "random"):
        drops = {measure: by_word(found, (method, measure), rows, steps)
                 for measure in ("stop_word_drop", "object_word_drop")}
        for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
            words, relevance = SENTENCES[b].split(), alone(study, method, b)[1][t]
            ranked = sorted(range(1, t + 1), key=lambda i: -relevance[i].item())
            rest = [words[i - 1] for i in range(1, t + 1) if i not in ranked[:3]]      # step i reads words[i - 1]
            word, image = WORDS.wordmap[words[t]], pictures()[b]
            drop = (probabilities(study.model, image, words)[t, word]
                    - probabilities(study.model, image, rest)[len(rest), word]).item()
            kind = "object_word_drop" if words[t] in ("dog", "cat", "ball") else "stop_word_drop"
            assert drops[kind][b, t] == pytest.approx(drop, abs=1e-9)
            assert math.isnan(drops[{"object_word_drop": "stop_word_drop"}.get(kind, "object_word_drop")][b, t])
            seen.add(kind)
    assert len(seen) == 2


def test_patch_ablation_is_the_literal_loop(study):
    batch = make_batch(study)
    rows, steps = chosen(batch.object_words)
    with torch.no_grad():
        found = patch_ablation(batch, rows, steps, patches=5)
    gone = []
    for method in ("lrp", "grad_cam", "attention", "random"):
        disappears, drops = (by_word(found, (method, name), rows, steps) for name in ("disappears", "patch_drop"))
        for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
            words, heat, image = SENTENCES[b].split(), alone(study, method, b)[0][t], pictures()[b]
            ablated = without(image, patch_order(heat)[:5])
            new = WORDS.decode(study.decode(study.model.encode(ablated[None]))[0])
            gone.append(words[t] not in new)
            assert disappears[b, t] == float(gone[-1])
            if gone[-1]:
                assert math.isnan(drops[b, t])
            else:
                place, word = new.index(words[t]), WORDS.wordmap[words[t]]
                drop = (probabilities(study.model, image, words)[t, word]
                        - probabilities(study.model, ablated, new)[place, word]).item()
                assert drops[b, t] == pytest.approx(drop, abs=1e-9)
    assert any(gone)


def test_a_word_that_stays_is_scored_at_its_first_new_place(study):
    """Whatever is decoded: here every word, so that none disappears."""
    new = [WORDS.wordmap[word] for word in ["a", "ball", "dog", "cat", "ball", "dog"]]
    everywhere = replace(study, methods=("lrp",), decode=lambda features: torch.tensor([new] * len(features)))
    batch = make_batch(everywhere)
    rows, steps = chosen(batch.object_words)
    with torch.no_grad():
        found = patch_ablation(batch, rows, steps, patches=3)
    assert not found["lrp", "disappears"].any()
    for b, t, drop in zip(rows.tolist(), steps.tolist(), found["lrp", "patch_drop"].tolist(), strict=True):
        words, image = SENTENCES[b].split(), pictures()[b]
        ablated = without(image, patch_order(alone(study, "lrp", b)[0][t])[:3])
        place, word = {"ball": 1, "dog": 2, "cat": 3}[words[t]], WORDS.wordmap[words[t]]
        expected = (probabilities(study.model, image, words)[t, word]
                    - probabilities(study.model, ablated, ["a", "ball", "dog", "cat"])[place, word]).item()
        assert drop == pytest.approx(expected, abs=1e-9)


def test_deletion_and_insertion_are_the_literal_loops(study):
    batch = make_batch(study)
    rows, steps = chosen(batch.object_words)
    with torch.no_grad():
        found = deletion_insertion(batch, rows, steps)
    every = [(y, x) for y in range(4) for x in range(4)]
    for method, (b, t) in itertools.product(("lrp", "guided_grad_cam", "random"),
                                            list(zip(rows.tolist(), steps.tolist(), strict=True))[::3]):
        words, order = SENTENCES[b].split(), patch_order(alone(study, method, b)[0][t])
        areas = {"deletion": 0.0, "insertion": 0.0}
        for name in areas:
            curve = []
            for i in range(11):
                most = order[:round(i / 10 * 16)]
                removed = most if name == "deletion" else [patch for patch in every if patch not in most]
                p = probabilities(study.model, without(pictures()[b], removed), words)[t, WORDS.wordmap[words[t]]]
                curve.append(p.log().item())
                assert by_word(found, (method, f"{name}_{i / 10}"), rows, steps)[b, t] == pytest.approx(curve[-1])
            area = sum(0.1 * (left + right) / 2 for left, right in itertools.pairwise(curve))
            assert by_word(found, (method, name), rows, steps)[b, t] == pytest.approx(area)


def test_patch_ranks_leave_equal_patches_in_their_order():
    heat = torch.zeros(1, 16, 16)
    heat[0, 8:, :8] = 1
    assert patch_ranks(heat).tolist() == [[1, 2, 0, 3]]


def test_correctness_pointing_game_and_mask_mass_are_literal(study):
    batch = make_batch(study)
    rows, steps = chosen(batch.boxed_words)
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
    cover = np.zeros((S, S))
    for x0, y0, x1, y1 in BOXES[NAMES[0]]["bbox"]["1"]:
        cover[y0:y1, x0:x1] = 1
    assert by_word(hits, ("box", "hit"), rows, steps)[0, 1] == pytest.approx(cover.mean())
    assert by_word(masses, ("mask", "inside"), rows, steps)[2, 1] == pytest.approx(1 / S)
    assert len(shares) == len(METHODS) * len(THRESHOLDS) + 1


def test_a_map_without_positive_relevance_neither_hits_nor_has_mass(study):
    batch = make_batch(replace(study, methods=("lrp",)))
    batch._pixels["lrp"] = -torch.ones(len(NAMES), 4, S, S, dtype=torch.float64)
    rows, steps = chosen(batch.boxed_words)
    assert not pointing_game(batch, rows, steps)["lrp", "hit"].any()
    assert not mask_mass(batch, rows, steps)["lrp", "inside"].any()


def test_tpfp_scores_words_by_their_maps(study):
    batch = make_batch(study)
    rows, steps = chosen(batch.frequent_words)
    found = tpfp(batch, rows, steps)
    right = by_word(found, ("reference", "right"), rows, steps)
    assert right == {(b, t): float(any(SENTENCES[b].split()[t] in text.split() for text in REFERENCES[b]))
                     for b, t in zip(rows.tolist(), steps.tolist(), strict=True)}
    assert 0 < sum(right.values()) < len(right)
    for b, t in right:
        heat = alone(study, "lrp", b)[0][t].flatten().tolist()
        expected = {"mean": sum(heat) / len(heat), "positive_mean": sum(max(x, 0) for x in heat) / len(heat),
                    "absolute_mean": sum(map(abs, heat)) / len(heat), "maximum": max(heat),
                    "quantile_0.25": sorted(heat)[round(0.25 * (len(heat) - 1))]}
        for name, value in expected.items():
            assert by_word(found, ("lrp", name), rows, steps)[b, t] == pytest.approx(value)
    if isinstance(study.model, GridTDModel):
        words = SENTENCES[3].split()
        beta = study.model.lrp(pictures()[3:], torch.tensor([WORDS.encode(words, len(words))])).beta
        assert by_word(found, ("sentinel", "1-beta"), rows, steps)[3, 3] == pytest.approx(1 - beta[0, 3].item())
    else:
        assert ("sentinel", "1-beta") not in found
    assert len(statistics(torch.rand(2, 4, 4))) == 9


def test_auc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).double()       # with ties
    right = torch.rand(40, generator=generator) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right].tolist() for b in scores[~right].tolist()]
    area, error = auc(scores, right)
    assert area == pytest.approx(sum(pairs) / len(pairs))
    false, true = roc_curve(scores, right)
    assert np.trapezoid(true, false) == pytest.approx(area) and (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    n, m = int(right.sum()), int((~right).sum())
    q1, q2 = area / (2 - area), 2 * area ** 2 / (1 + area)
    assert error ** 2 == pytest.approx((area * (1 - area) + (n - 1) * (q1 - area ** 2) + (m - 1) * (q2 - area ** 2))
                                       / (n * m))
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([True, False])) == (1, 0)
    assert math.isnan(auc(scores, torch.ones(40, dtype=torch.bool))[0])


def test_average_ranks_share_ties():
    assert average_ranks(torch.tensor([[2.0, 1.0, 2.0, 5.0]])).tolist() == [[1.5, 0, 1.5, 3]]


def test_mean_and_standard_error():
    found = mean_and_error([1.0, 2.0, 6.0])
    assert found == pytest.approx((3, (7 / 3) ** 0.5, 3)) and math.isnan(mean_and_error([2.0]).error)


def test_random_is_a_function_of_the_picture_and_the_seed(study):
    batch, one = make_batch(study), make_batch(study, [3, 0])
    rows, steps = torch.tensor([0, 3]), torch.tensor([1, 3])
    other = one.maps("random", torch.tensor([1, 0]), steps)
    assert torch.equal(batch.maps("random", rows, steps), other)
    again = make_batch(replace(study, seed=2))
    assert not torch.equal(again.maps("random", rows, steps), other) and not torch.equal(other[0], other[1])
    T = len(SENTENCES[3].split()) + 1
    assert torch.equal(batch.relevance("random", rows, steps)[1, :T],
                       one.relevance("random", torch.tensor([0]), torch.tensor([3]))[0, :T])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_one_picture_and_one_word_at_a_time_give_the_same(study, name):
    study = replace(study, methods=("lrp",) if name == "sanity" else ("lrp", "guided_grad_cam", "attention", "random"))
    together = measure(EXPERIMENTS[name], make_batch(study, [1, 3]))
    single = []
    for i in (1, 3):
        T = len(SENTENCES[i].split()) + 1
        for t in range(1, T - 1):       # all but the first word and <end>, neither of which is studied
            single += measure(EXPERIMENTS[name], make_batch(study, [i], (torch.arange(T) == t)[None]))
    assert len(together) == len(single) > 0
    key = {row[:5]: float(row[5]) for row in single}
    assert len(key) == len(single)
    for row in together:
        # among ranks, rounding can swap neighbours
        assert float(row[5]) == pytest.approx(key[row[:5]], abs=1e-3 if name == "sanity" else 1e-6), row


def test_words_that_are_studied(study):
    study = replace(study, methods=("lrp",))
    steps = {name: {(row[0], row[1]) for row in measure(EXPERIMENTS[name], make_batch(study))
                    if row[4] != "disappears" and row[4] != "patch_drop"} for name in ("ablation", "sanity", "tpfp")}
    assert steps["ablation"] == {("0.png", 6), ("0.png", 7), ("0.png", 8), ("0.png", 10), ("1.png", 6), ("1.png", 7),
                                 ("1.png", 8), ("3.png", 7)}
    assert steps["sanity"] == steps["tpfp"]         # no caption begins with an object word


def test_without_objects_the_frequent_words_are_the_object_words(study):
    batch = make_batch(replace(study, objects=Objects({}), boxes={}))
    assert torch.equal(batch.object_words, make_batch(study).object_words) and not batch.boxed_words.any()


def test_an_explanation_of_the_model_changes_with_the_model(study):
    """Adebayo et al. 2018; random noise, which looks at no model, is caught."""
    batch = make_batch(study)
    rows, steps = chosen(batch.object_words)
    found = sanity(batch, rows, steps)
    names = sorted({measure for _, measure in found})
    assert names[0] == "01_W_o" and names[-2:] == [f"{len(names) - 1:02d}_conv2", f"{len(names):02d}_conv1"]
    for method in ("lrp", "gradient", "guided_grad_cam", "grad_cam"):
        assert found[method, names[0]].abs().mean() < 0.9, method
        assert found[method, names[-1]].abs().mean() < 0.5, method
    assert torch.allclose(found["attention", names[0]], torch.ones(len(rows), dtype=torch.float64))     # above it
    assert found["attention", names[-1]].abs().mean() < 0.9
    assert all(torch.allclose(found["random", name], torch.ones(len(rows), dtype=torch.float64)) for name in names)
    assert torch.equal(make_batch(study).log_p, batch.log_p)        # the model itself is as it was


def test_all_weights_are_randomised_once(study):
    import copy
    model = copy.deepcopy(study.model)
    layers = layers_from_the_top(model)
    owned = [id(weight) for _, layer in layers for weight in layer.parameters()]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    for _, layer in layers:
        randomise(layer, torch.Generator().manual_seed(0))
    for (name, weight), before in zip(model.named_parameters(), study.model.parameters(), strict=True):
        constant = before.std(correction=0) == 0        # batch-norm as it starts
        assert torch.equal(weight, before) == bool(constant), name


def test_rank_correlation_is_spearmans():
    a, b = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    expected = []
    for x, y in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        ranks = [[sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
                 for values in (x, y)]
        expected.append(np.corrcoef(ranks)[0, 1])
    assert rank_correlation(a, b).tolist() == pytest.approx(expected)
    assert rank_correlation(a, a.exp()).tolist() == pytest.approx([1] * 3)      # of what grows with it
    assert rank_correlation(a, torch.ones_like(b)).tolist() == [0] * 3


def write_masks(path, masks, things):
    with h5py.File(path, "w") as file:
        file.attrs["categories"] = ["dog", "cat"]
        file["test/masks"], file["test/things"] = np.array(masks, np.uint8), np.array(things, np.uint8)


def test_masks_of_a_file(tmp_path):
    write_masks(tmp_path / "m.hdf5", [[[0, 1], [2, 3]]], [[2, 1, 2]])       # two cats, one dog
    masks = Masks(tmp_path / "m.hdf5", "test", 1)
    assert masks.has(0, "cat") and not masks.has(0, "bird") and not masks.has(0, None)
    assert masks.of(0, "cat", (2, 2)).tolist() == [[False, True], [False, True]]
    assert masks.of(0, "dog", (4, 4)).tolist() == [[False] * 4] * 2 + [[True, True, False, False]] * 2


@pytest.mark.parametrize("split, count, message", [("val", 1, "no masks of the split 'val'"),
                                                   ("test", 2, "masks of 1 pictures")])
def test_masks_that_do_not_fit(tmp_path, split, count, message):
    write_masks(tmp_path / "m.hdf5", [[[0, 1], [2, 3]]], [[2, 1, 2]])
    with pytest.raises(InputError, match=message):
        Masks(tmp_path / "m.hdf5", split, count)
