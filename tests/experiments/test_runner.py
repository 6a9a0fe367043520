"""The experiments against literal loops over words, patches and pixels, on small random models."""
import copy
import itertools
import math
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import OWN_METHODS, refused
from torch import nn

from aoamodel import AOAModel
from captioning import decoding
from captioning.data.vocabulary import build
from captioning.experiments import runner
from captioning.experiments.ablation import grey_out, patch_ablation, patch_ranks, word_ablation
from captioning.experiments.batch import RANDOM, Batch, Study, from_step
from captioning.experiments.correctness import THRESHOLDS, correctness
from captioning.experiments.deletion_insertion import deletion_insertion
from captioning.experiments.experiment import mean_table
from captioning.experiments.mask_mass import Masks, mask_mass
from captioning.experiments.pointing_game import pointing_game
from captioning.experiments.presence import area_table, cross_validated, presence
from captioning.experiments.registry import EXPERIMENTS
from captioning.experiments.runner import measure, run_experiments
from captioning.experiments.sanity import layers_from_the_top, randomise, rank_correlation, sanity
from captioning.experiments.tpfp import auc, statistics, tpfp
from captioning.explanation import methods
from captioning.metrics.object_words import Objects
from gridTDmodel import GridTDModel

METHODS = (*OWN_METHODS, RANDOM)
S = 32      # side of an image in pixels: 16 patches
SENTENCES = ["the dog on a big red ball with a small cat", "a cat and the small dog with a ball",
             "big cat", "the big red dog on the big ball"]
WORDS = build([sentence.split() for sentence in SENTENCES], 1)
NAMES = [f"{i}.png" for i in range(len(SENTENCES))]
OBJECTS = Objects({"dog": "dog", "cat": "cat", "ball": "ball"})
ENTRY = {"categories": {"dog": 1, "cat": 2}, "shape": [S, S],
         "bbox": {"1": [[2, 3, 20, 17], [15, 1, 31, 30]], "2": [[0, 16, 16, 32]]}}
BOXES = dict.fromkeys(NAMES[:3], ENTRY)
REFERENCES = [["a dog", "a red ball"], ["a cat"], ["nothing"], ["the dog on the ball"]]


class FixedMasks:
    """Masks of the dog, the left half of the image, and of the cat, one row."""
    content_hash = ""

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
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
                            nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, 1, 1), nn.ReLU())
    sizes = {"vocab_size": len(WORDS), "embed_dim": 6, "hidden_dim": 8, "encoder": encoder}
    if request.param == "gridtd":
        model = GridTDModel(**sizes, attention_dim=5).double().eval()
    else:
        model = AOAModel(**sizes, num_head=2).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)       # so that predictions depend on words and images

    def decode(features):
        return decoding.decode(model, features, WORDS, "beam_search", 8, beam_size=3)
    stop_words = {"a", "the", "on", "with", "and"}
    return Study(model, WORDS, METHODS, OBJECTS, BOXES, {"dog", "cat", "ball"}, stop_words,
                 FixedMasks(), decode)


def random_images():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(NAMES), 3, S, S, generator=generator, dtype=torch.float64)


def make_batch(study, indices=(0, 1, 2, 3)):
    indices = list(indices)
    return Batch(study, indices, [NAMES[i] for i in indices], random_images()[indices],
                 [SENTENCES[i].split() for i in indices], [REFERENCES[i] for i in indices])


@torch.no_grad()
def probability(model, image, words, t, word):
    """Of a word after words[:t], for one image."""
    ids = torch.tensor([WORDS.encode(words, len(words))])
    return model(image[None], ids)[0, t].softmax(-1)[WORDS.wordmap[word]].item()


def alone(study, method, i):
    """(maps (T, S, S), words (T, T)) of a method for image i in a batch of its own."""
    words = SENTENCES[i].split()
    if method == RANDOM:
        relevance, maps = make_batch(study, [i])._noise
        return maps[0], relevance[0]
    ids = torch.tensor([WORDS.encode(words, len(words))])
    explanation = methods.METHODS[method].explain(study.model, random_images()[i:i + 1], ids)
    if method != "attention":
        return explanation.pixels[0].sum(1), explanation.words[0]
    weights = explanation.attention[0]
    weights = weights.mean(1) if weights.dim() == 3 else weights
    maps = weights.unflatten(1, (8, 8))[None]
    return nn.functional.interpolate(maps, size=(S, S), mode="bilinear")[0], None


def measured(function, batch, words, **options):
    """The numbers {(method, measure): {(row, step): number}} of the words, (B, T) bool."""
    rows, steps = words.nonzero(as_tuple=True)
    keys = list(zip(rows.tolist(), steps.tolist(), strict=True))
    with torch.no_grad():
        values = function(batch, rows, steps, **options)
    return {key: dict(zip(keys, numbers.tolist(), strict=True)) for key, numbers in values.items()}


def patch_order(heat):
    """Patches (row, column) in descending order of their sums."""
    sums = {}
    for y, x in itertools.product(range(heat.shape[0] // 8), range(heat.shape[1] // 8)):
        pixels = itertools.product(range(8 * y, 8 * y + 8), range(8 * x, 8 * x + 8))
        sums[y, x] = sum(float(heat[pixel]) for pixel in pixels)
    return sorted(sums, key=lambda patch: (-round(sums[patch], 12), patch))


def without(image, patches):
    image = image.clone()
    for y, x in patches:
        image[:, 8 * y:8 * y + 8, 8 * x:8 * x + 8] = 0
    return image


# -- explanations of a batch -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_explanations_of_a_batch_equal_those_of_each_image(study, method):
    batch = make_batch(study)
    rows, steps = batch.object_words.nonzero(as_tuple=True)
    assert len(rows) == 9
    for k, (b, t) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
        maps, words = alone(study, method, b)
        heat = batch.maps(method, rows, steps)[k]
        torch.testing.assert_close(heat, maps[t], rtol=1e-9, atol=1e-12)
        if words is not None:
            relevance = batch.relevance(method, rows, steps)[k, :len(words)]
            torch.testing.assert_close(relevance, words[t], rtol=1e-9, atol=1e-12)


def test_random_maps_depend_on_the_file_name_and_the_seed_only(study):
    batch, reordered = make_batch(study), make_batch(study, [3, 0])
    rows, steps = torch.tensor([0, 3]), torch.tensor([1, 3])
    maps = reordered.maps(RANDOM, torch.tensor([1, 0]), steps)
    assert torch.equal(batch.maps(RANDOM, rows, steps), maps)
    other_seed = make_batch(replace(study, seed=2))
    assert not torch.equal(other_seed.maps(RANDOM, rows, steps), maps)
    assert not torch.equal(maps[0], maps[1])


def test_boxes_are_fractions_of_the_image(study):
    entry = {"categories": {"dog": 18}, "bbox": {"18": [[20, 10, 100, 50], [0, 0, 200, 100]]},
             "shape": [200, 100]}
    batch = make_batch(replace(study, boxes={NAMES[0]: entry}))
    assert batch.words_with_box().nonzero().tolist() == [[0, 1]]
    boxes = batch.boxes(torch.tensor([0]), torch.tensor([1]))
    expected = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]]])
    torch.testing.assert_close(boxes, expected.double(), rtol=1e-6, atol=0)


def test_without_objects_frequent_words_are_object_words(study):
    batch = make_batch(replace(study, objects=Objects({}), boxes={}))
    assert torch.equal(batch.object_words, make_batch(study).object_words)
    assert not batch.words_with_box().any()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_do_not_depend_on_the_batch(study, name):
    """Those of words in a batch equal those of each word in a batch of its image alone."""
    few = ("lrp",) if name == "sanity" else ("lrp", "guided_grad_cam", "attention", "random")
    study = replace(study, methods=few)
    # rounding can swap neighbouring ranks
    tolerance = 1e-3 if name == "sanity" else 1e-6
    for part in EXPERIMENTS[name].parts:
        batch = make_batch(study, [1, 3])
        values = measured(part.measure, batch, part.words(batch))
        for b, t in next(iter(values.values())):
            single = make_batch(study, [(1, 3)[b]])
            with torch.no_grad():
                expected = part.measure(single, torch.tensor([0]), torch.tensor([t]))
            for key, numbers in values.items():
                assert numbers[b, t] == pytest.approx(
                    expected[key].item(), abs=tolerance, nan_ok=True), key


def test_a_method_that_is_registered_at_run_time_works_in_every_experiment(study, monkeypatch):
    """Its values are those of the method that it calls."""
    def explain(model, images, captions, **options):
        return model.gradient(images, captions, **options)
    monkeypatch.setitem(methods.METHODS, "mine", methods.Method(explain, "The gradient."))
    study = replace(study, methods=("gradient", "mine"))
    for name, experiment in EXPERIMENTS.items():
        rows = measure(experiment, make_batch(study))
        values = {method: rows["value"][rows["method"] == method].tolist()
                  for method in study.methods}
        assert values["mine"] == values["gradient"]
        assert values["mine"] or name == "grounding"        # which explains by LRP


# -- the experiments against literal loops -----------------------------------------------------


def test_word_ablation_equals_a_literal_loop(study):
    batch = make_batch(study)
    stop_words = batch.words_where(lambda b, t, word: word in study.stop_words)
    values = measured(word_ablation, batch, from_step(batch.object_words | stop_words, 6))
    assert {method for method, _ in values} == set(METHODS) - {"attention"}
    tested_kinds = set()
    for method in ("lrp", "gradient", "random"):
        for b, t in values[method, "stop_word_drop"]:
            words, image = SENTENCES[b].split(), random_images()[b]
            relevance = alone(study, method, b)[1][t]
            ranked = sorted(range(1, t + 1), key=lambda i: -relevance[i].item())
            # step i reads words[i - 1]
            remaining = [words[i - 1] for i in range(1, t + 1) if i not in ranked[:3]]
            drop = (probability(study.model, image, words, t, words[t])
                    - probability(study.model, image, remaining, len(remaining), words[t]))
            kind, other = "stop_word_drop", "object_word_drop"
            if words[t] in ("dog", "cat", "ball"):
                kind, other = other, kind
            assert values[method, kind][b, t] == pytest.approx(drop, abs=1e-9)
            assert math.isnan(values[method, other][b, t])
            tested_kinds.add(kind)
    assert len(tested_kinds) == 2


@pytest.mark.parametrize("new_caption", [None, ["a", "ball", "dog", "cat", "ball", "dog"]])
def test_patch_ablation_equals_a_literal_loop(study, new_caption):
    """The decoded caption, or one that contains every object word, so that none disappears."""
    if new_caption:
        ids = [WORDS.wordmap[word] for word in new_caption]
        study = replace(study, decode=lambda x: torch.tensor([ids] * len(x)))
    batch = make_batch(study)
    values = measured(patch_ablation, batch, batch.object_words, patches=5)
    all_disappear = []
    for method in ("lrp", "grad_cam", "attention", "random"):
        for (b, t), disappears in values[method, "disappears"].items():
            words, image = SENTENCES[b].split(), random_images()[b]
            ablated = without(image, patch_order(alone(study, method, b)[0][t])[:5])
            new = WORDS.decode(study.decode(study.model.encode(ablated[None]))[0])
            all_disappear.append(words[t] not in new)
            assert disappears == float(all_disappear[-1])
            drop = values[method, "patch_drop"][b, t]
            if disappears:
                assert math.isnan(drop)
            else:
                after = probability(study.model, ablated, new, new.index(words[t]), words[t])
                before = probability(study.model, image, words, t, words[t])
                assert drop == pytest.approx(before - after, abs=1e-9)
    assert any(all_disappear) != bool(new_caption)


def test_deletion_and_insertion_equal_literal_loops(study):
    batch = make_batch(study)
    values = measured(deletion_insertion, batch, batch.object_words)
    patches = list(itertools.product(range(4), range(4)))
    every_third = list(values["lrp", "deletion"])[::3]
    for method, (b, t) in itertools.product(("lrp", "guided_grad_cam", "random"), every_third):
        words, order = SENTENCES[b].split(), patch_order(alone(study, method, b)[0][t])
        for name in ("deletion", "insertion"):
            curve = []
            for i in range(11):
                hidden = order[:round(i / 10 * 16)]
                if name == "insertion":
                    hidden = [patch for patch in patches if patch not in hidden]
                image = without(random_images()[b], hidden)
                curve.append(math.log(probability(study.model, image, words, t, words[t])))
                assert values[method, f"{name}_{i / 10}"][b, t] == pytest.approx(curve[-1])
            area = sum(0.1 * (left + right) / 2 for left, right in itertools.pairwise(curve))
            assert values[method, name][b, t] == pytest.approx(area)


def test_images_that_are_not_square(study):
    """Every experiment on images of 4×6 patches; deletion against a literal loop."""
    study = replace(study, methods=("lrp", "attention", "random"))
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, 3, S, S + 16, generator=generator, dtype=torch.float64)
    sentences = [sentence.split() for sentence in SENTENCES[:2]]
    batch = Batch(study, [0, 1], NAMES[:2], images, sentences, REFERENCES[:2])
    for name, experiment in EXPERIMENTS.items():
        assert len(measure(experiment, batch)), name
    deletion = measured(deletion_insertion, batch, batch.object_words)
    for (b, t), log_p in deletion["attention", "deletion_0.5"].items():
        heat = batch.maps("attention", torch.tensor([b]), torch.tensor([t]))[0]
        assert heat.shape == (S, S + 16)
        hidden = without(images[b], patch_order(heat)[:12])
        expected = probability(study.model, hidden, sentences[b], t, sentences[b][t])
        assert log_p == pytest.approx(math.log(expected))


def test_patches():
    heat = torch.zeros(1, 16, 16)
    heat[0, 8:, :8] = 1
    assert patch_ranks(heat).tolist() == [[1, 2, 0, 3]]     # ties keep their order
    message = "images of 20×16 pixels cannot be divided into patches of 8×8 pixels"
    with refused(message):
        patch_ranks(torch.zeros(1, 16, 20))
    with refused(message):
        grey_out(torch.zeros(1, 3, 16, 20), torch.ones(1, 4, dtype=torch.bool))


def test_correctness_pointing_game_and_mask_mass_equal_their_definitions(study):
    batch = make_batch(study)
    shares, hits, masses = (measured(function, batch, batch.words_with_box())
                            for function in (correctness, pointing_game, mask_mass))
    assert hits["lrp", "hit"].keys() == {(0, 1), (0, 10), (1, 1), (1, 5), (2, 1)}
    assert len(shares) == len(METHODS) * len(THRESHOLDS) + 1
    for method, word in itertools.product(METHODS, hits["lrp", "hit"]):
        b, t = word
        heat = alone(study, method, b)[0][t].clamp(min=0)
        category = SENTENCES[b].split()[t]
        boxes = ENTRY["bbox"]["1" if category == "dog" else "2"]
        total = heat.sum().clamp(min=1e-300)        # Grad-CAM can be zero everywhere
        best = max(heat[y0:y1, x0:x1].sum() for x0, y0, x1, y1 in boxes) / total
        assert shares[method, "0.0"][word] == pytest.approx(best.item())
        y, x = divmod(heat.argmax().item(), S)
        hit = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
        assert hits[method, "hit"][word] == float(hit and heat.max() > 0)
        inside = heat[:, :S // 2].sum() if category == "dog" else heat[5 + b].sum()
        assert masses[method, "inside"][word] == pytest.approx((inside / total).item())
    covered = np.zeros((S, S))
    for x0, y0, x1, y1 in ENTRY["bbox"]["1"]:
        covered[y0:y1, x0:x1] = 1
    assert hits["box", "hit"][0, 1] == pytest.approx(covered.mean())
    assert masses["mask", "inside"][2, 1] == pytest.approx(1 / S)


def test_a_map_without_positive_relevance_scores_zero(study):
    batch = make_batch(replace(study, methods=("lrp",)))
    batch._pixel_maps["lrp"] = -torch.ones(len(NAMES), 4, S, S, dtype=torch.float64)
    for function in (pointing_game, mask_mass):
        values = measured(function, batch, batch.words_with_box())
        assert not any(next(iter(values.values())).values())


def test_tpfp_equals_its_definition(study):
    batch = make_batch(study)
    values = measured(tpfp, batch, batch.frequent_words)
    assert len(statistics(torch.rand(2, 4, 4))) == 9
    for (b, t), right in values["reference", "right"].items():
        word = SENTENCES[b].split()[t]
        assert right == any(word in text.split() for text in REFERENCES[b])
        heat = alone(study, "lrp", b)[0][t].flatten().tolist()
        expected = {"mean": sum(heat) / len(heat), "maximum": max(heat),
                    "positive_mean": sum(max(x, 0) for x in heat) / len(heat),
                    "absolute_mean": sum(map(abs, heat)) / len(heat),
                    "quantile_0.25": sorted(heat)[round(0.25 * (len(heat) - 1))]}
        for name, value in expected.items():
            assert values["lrp", name][b, t] == pytest.approx(value)
    if isinstance(study.model, GridTDModel):
        ids = torch.tensor([WORDS.encode(SENTENCES[3].split(), 8)])
        beta = study.model.lrp(random_images()[3:], ids).beta
        assert values["sentinel", "1-beta"][3, 3] == pytest.approx(1 - beta[0, 3].item())
    else:
        assert ("sentinel", "1-beta") not in values


def test_presence_scores_equal_their_definitions(study):
    batch = make_batch(study)
    values = measured(presence, batch, batch.object_words)
    blank = copy.deepcopy(study.model)      # a model that sees no features
    for name, parameter in blank.named_parameters():
        if name in ("W_v.weight", "W_g.weight"):
            parameter.data.zero_()
    for (b, t), present in values["reference", "present"].items():
        words, image = SENTENCES[b].split(), random_images()[b]
        has_box = words[t] in BOXES.get(NAMES[b], {"categories": ()})["categories"]
        assert present == (has_box or any(words[t] in text.split() for text in REFERENCES[b]))
        assert values["reference", "image"][b, t] == b
        ids = torch.tensor([WORDS.encode(words, len(words))])
        explanation = study.model.lrp(image[None], ids)
        relevance, logit = explanation.features[0, t].sum().item(), explanation.targets[0, t].item()
        split = [getattr(explanation, name)[0, t].item() for name in methods.SPLIT]
        log_p = math.log(probability(study.model, image, words, t, words[t]))
        without_image = math.log(probability(blank, image, words, t, words[t]))
        expected = {("lrp", "image"): relevance, ("lrp", "share"): relevance / logit,
                    ("lrp", "absolute_share"): relevance / sum(map(abs, split)),
                    ("model", "log_p"): log_p, ("model", "log_p_gain"): log_p - without_image}
        for key, value in expected.items():
            assert values[key][b, t] == pytest.approx(value, rel=1e-6)


def test_explanations_change_when_weights_are_randomised(study):
    """Noise, which does not depend on the model, keeps a correlation of 1."""
    batch = make_batch(study)
    rows, steps = batch.object_words.nonzero(as_tuple=True)
    values = sanity(batch, rows, steps)
    names = sorted({measure for _, measure in values})
    n = len(names)
    assert names[0] == "01_W_o" and names[-2:] == [f"{n - 1:02d}_conv2", f"{n:02d}_conv1"]
    for method in ("lrp", "gradient", "guided_grad_cam", "grad_cam"):
        assert values[method, names[0]].abs().mean() < 0.9, method
        assert values[method, names[-1]].abs().mean() < 0.5, method
    ones = torch.ones(len(rows), dtype=torch.float64)
    assert torch.allclose(values["attention", names[0]], ones)      # it precedes W_o
    assert values["attention", names[-1]].abs().mean() < 0.9
    assert all(torch.allclose(values["random", name], ones) for name in names)
    assert torch.equal(make_batch(study).log_p, batch.log_p)        # the model itself is unchanged


def test_all_weights_are_randomised_exactly_once(study):
    model = copy.deepcopy(study.model)
    layers = layers_from_the_top(model)
    layer_weights = [id(weight) for _, layer in layers for weight in layer.parameters()]
    assert sorted(layer_weights) == sorted(map(id, model.parameters()))
    for _, layer in layers:
        randomise(layer, torch.Generator().manual_seed(0))
    for weight, before in zip(model.parameters(), study.model.parameters(), strict=True):
        is_constant = before.std(correction=0) == 0     # batch-norm at its initial values
        assert torch.equal(weight, before) == bool(is_constant)


# -- statistics and tables ---------------------------------------------------------------------


def test_areas_of_scores_pairs_and_flags():
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(300, generator=generator) < 0.7
    image = present + torch.randn(300, generator=generator)
    log_p = present + torch.randn(300, generator=generator)
    number = torch.arange(300)
    flagged = image < 0
    columns = {("reference", "present"): present, ("reference", "biased"): number % 2,
               ("reference", "image"): number // 3, ("reference", "flagged"): flagged,
               ("lrp", "image"): image, ("model", "log_p"): log_p}
    values = pd.concat([pd.DataFrame({
        "image": [f"{i // 3}" for i in range(300)], "step": number % 3, "method": method,
        "measure": name, "value": column.double()}) for (method, name), column in columns.items()])
    table = area_table(values)
    area = auc(image.double(), present)[0]
    assert table["mean"]["image", "all objects"] == pytest.approx(area)
    biased = tuple(table.loc[("image", "biased objects")])
    assert biased == pytest.approx(auc(image[1::2], present[1::2]))
    both = table["mean"]["image + log_p", "all objects"]
    assert both > max(area, auc(log_p, present)[0])
    found = (flagged & ~present).sum().item()
    assert table["mean"]["flagged", "precision"] == pytest.approx(found / flagged.sum().item())
    assert table["mean"]["flagged", "recall"] == pytest.approx(found / (~present).sum().item())


def test_logistic_regression():
    """Against its definition; the labels of a fold have no influence on its own predictions."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
    p = (2 * x[:, 0] - x[:, 1] + 0.5).sigmoid()
    y = (torch.rand(400, generator=torch.Generator().manual_seed(1)) < p).double()
    fold = torch.arange(400) % 5
    frame, labels, folds = pd.DataFrame(x), pd.Series(y), pd.Series(fold)
    predicted = cross_validated(frame, labels, folds)
    others = nn.functional.pad((x - x.mean(0)) / x.std(0), (0, 1), value=1)
    inside = fold == 2
    weights = torch.linalg.lstsq(others[inside], torch.tensor(predicted)[inside, None])[0][:, 0]
    weights.requires_grad_()
    loss = weights.square().sum() / 2 + nn.functional.binary_cross_entropy_with_logits(
        others[~inside] @ weights, y[~inside], reduction="sum")
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-3         # the minimum
    changed = cross_validated(frame, labels.where(folds != 2, 1 - labels), folds)
    assert (changed == predicted)[inside].all() and not (changed == predicted)[~inside].any()
    assert cross_validated(frame, labels.where(folds == 2, 1), folds) is None


def test_auc_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).double()       # with ties
    is_correct = torch.rand(40, generator=generator) < 0.6
    pairs = itertools.product(scores[is_correct].tolist(), scores[~is_correct].tolist())
    ordered = [(a > b) + 0.5 * (a == b) for a, b in pairs]
    area, error, count = auc(scores, is_correct)
    assert area == pytest.approx(sum(ordered) / len(ordered)) and count == 40
    n, m = int(is_correct.sum()), int((~is_correct).sum())
    q1, q2 = area / (2 - area), 2 * area ** 2 / (1 + area)
    variance = area * (1 - area) + (n - 1) * (q1 - area ** 2) + (m - 1) * (q2 - area ** 2)
    assert error ** 2 == pytest.approx(variance / (n * m))
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([True, False])) == (1, 0, 2)
    assert math.isnan(auc(scores, torch.ones(40, dtype=torch.bool))[0])


def test_rank_correlation_is_spearmans_coefficient():
    a, b = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    expected = []
    for maps in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        ranks = [pd.Series(values).rank() for values in maps]       # ties with their average rank
        expected.append(np.corrcoef(ranks)[0, 1])
    assert rank_correlation(a, b).tolist() == pytest.approx(expected)
    assert rank_correlation(a, a.exp()).tolist() == pytest.approx([1] * 3)      # monotonic
    assert rank_correlation(a, torch.ones_like(b)).tolist() == [0] * 3


def test_mean_and_standard_error():
    values = pd.DataFrame({"method": list("aaab"), "measure": "m", "value": [1.0, 2.0, 6.0, 2.0]})
    table = mean_table(values)
    assert tuple(table.loc[("a", "m")]) == pytest.approx((3, (7 / 3) ** 0.5, 3))
    assert math.isnan(table.loc[("b", "m"), "standard_error"])


# -- the run -----------------------------------------------------------------------------------


class Split:
    """The data set of run_experiments: the four images and their references."""
    names, references = NAMES, REFERENCES

    def __getitems__(self, indices):
        return {"images": random_images()[indices]}

    def content_hash(self, index):
        return str(index)


def run(study, folder, names=("ablation", "pointing_game")):
    return run_experiments(study, Split(), SENTENCES, names, None, 2, 0, torch.device("cpu"),
                           folder, ["test"])


def test_word_ablation_without_a_method_that_applies(study, tmp_path, capsys, monkeypatch):
    """Attention assigns no relevance to words: the measures of patch ablation remain, or none."""
    study = replace(study, methods=("attention",))
    table = run(study, tmp_path, ["ablation"])["ablation"]
    assert set(table.index) <= {("attention", "disappears"), ("attention", "patch_drop")}
    assert ("attention", "disappears") in table.index and (tmp_path / "ablation_test.png").exists()
    word_part = replace(EXPERIMENTS["ablation"], parts=EXPERIMENTS["ablation"].parts[:1])
    monkeypatch.setitem(EXPERIMENTS, "ablation", word_part)
    assert run(study, tmp_path / "words", ["ablation"]) == {"ablation": {}}
    assert "ablation: the captions have no word that it measures" in capsys.readouterr().out
    assert not (tmp_path / "words" / "ablation_test.csv").exists()


def test_the_rows_of_batches_are_kept_until_all_tables_are_written(study, tmp_path, monkeypatch):
    """An interrupted run keeps them and resumes; after success their folder is removed."""
    study = replace(study, methods=("random",))
    tables = run(study, tmp_path / "uninterrupted")
    conclude, measured_batches = runner.conclude, []

    def measure_and_record(experiment, batch):
        measured_batches.append((batch.names[0], experiment))
        return measure(experiment, batch)

    def interrupt(name, *arguments):
        if name == "pointing_game":
            raise KeyboardInterrupt
        return conclude(name, *arguments)
    monkeypatch.setattr(runner, "measure", measure_and_record)
    monkeypatch.setattr(runner, "conclude", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "resumed")
    first, *parts = (tmp_path / "resumed").glob("parts_*/*.csv")
    assert len([first, *parts]) == len(measured_batches) == 4
    content = first.read_text()
    first.write_text("test_00000.png,1,dog,lrp,mean\n")
    with refused(f"{first.name} is damaged"):
        run(study, tmp_path / "resumed")
    first.write_text(content)
    other_run = tmp_path / "resumed" / "parts_of_another_run"
    other_run.mkdir()
    monkeypatch.setattr(runner, "conclude", conclude)
    with monkeypatch.context() as patch:    # other images: nothing is reused
        patch.setattr(Split, "content_hash", lambda data, index: "changed")
        run(study, tmp_path / "resumed")
    assert len(measured_batches) == 8
    resumed = run(study, tmp_path / "resumed")
    assert len(measured_batches) == 8
    for name in tables:
        pd.testing.assert_frame_equal(resumed[name], tables[name])
    assert [path for path in (tmp_path / "resumed").iterdir() if path.is_dir()] == [other_run]
    names = {path.name for path in (tmp_path / "uninterrupted").iterdir()}
    assert names == {f"{name}{suffix}" for name in ("ablation", "pointing_game")
                     for suffix in ("_test.csv", "_test.png", "_words_test.csv")}


def test_which_words_are_measured(study):
    batch = make_batch(study)
    words_of = {name: EXPERIMENTS[name].parts[0].words(batch).nonzero().tolist()
                for name in ("ablation", "sanity", "tpfp")}
    assert words_of["ablation"] == [[0, 6], [0, 7], [0, 8], [0, 10], [1, 6], [1, 7], [1, 8], [3, 7]]
    assert words_of["sanity"] == words_of["tpfp"]       # no caption begins with an object word


def test_masks_are_read_from_a_file(tmp_path):
    with h5py.File(tmp_path / "m.hdf5", "w") as file:
        file.attrs["categories"] = ["dog", "cat"]
        file["test/masks"] = np.array([[[0, 1], [2, 3]]], np.uint8)
        file["test/things"] = np.array([[2, 1, 2]], np.uint8)       # two cats, one dog
    masks = Masks(tmp_path / "m.hdf5", "test", 1)
    assert masks.has(0, "cat") and not masks.has(0, "bird") and not masks.has(0, None)
    assert masks.mask(0, "cat", (2, 2)).tolist() == [[False, True], [False, True]]
    enlarged = masks.mask(0, "dog", (4, 4)).tolist()
    assert enlarged == [[False] * 4] * 2 + [[True, True, False, False]] * 2
    for split, count, message in (("val", 1, "val/masks"), ("test", 2, "test/masks")):
        with refused(message):
            Masks(tmp_path / "m.hdf5", split, count)
