"""Flags of object words that come from language, their threshold, and decoding without them."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import MODELS, make, random_regions, refused

from aoamodel import AOAModel
from captioning import decoding, grounding
from captioning.data.vocabulary import build
from captioning.metrics.object_words import (
    VISIBLE_OBJECTS,
    Objects,
    load_objects,
    read_synonyms,
)

# 12 words with the special ones
WORDS = build([["a", "dog", "puppy", "cat", "red", "runs", "fast", "big"]], 1)
COEFFICIENTS = {"constant": 0.3, "image": 0.2, "absolute_share": 1.5, "log_p": 0.4,
                "log_p_gain": -0.3, "position": -0.2, "frequency": 0.1}
FREQUENCIES = {"dog": 2.0, "cat": 0.5}
OBJECTS = Objects({"dog": "dog", "puppy": "dog", "cat": "cat", "red cat": "cat", "fast": "none"})


def calibration(threshold):
    return grounding.Calibration(threshold, OBJECTS, COEFFICIENTS, FREQUENCIES)


def captions_of(*texts):
    ids = [torch.tensor(WORDS.encode(text.split(), 9)) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def estimate(model, features, caption, t):
    """The estimate for the word at step t, literally, image by image."""
    explanation = model.lrp(features[None], caption[None])
    image = float(explanation.features[0, t].sum())
    start, *previous = explanation.words[0, t].tolist()
    rest = float(explanation.targets[0, t]) - image - start - sum(previous)
    share = image / (abs(image) + abs(start) + abs(sum(previous)) + abs(rest))
    word = caption[t + 1]
    log_p = model(features[None], caption[None])[0, t].log_softmax(-1)[word]
    blank = torch.full_like(features[None], 1e-200)
    without = model(blank, caption[None])[0, t].log_softmax(-1)[word]
    values = {"image": image, "absolute_share": share, "log_p": log_p,
              "log_p_gain": log_p - without, "position": t,
              "frequency": FREQUENCIES.get(WORDS.words[word], 0)}
    log_odds = COEFFICIENTS["constant"]
    for name, value in values.items():
        log_odds += COEFFICIENTS[name] * float(torch.as_tensor(value).detach())
    return 1 / (1 + math.exp(-log_odds))


@MODELS
def test_estimates_and_flags_of_object_words(model_type):
    model, features = make(model_type), random_regions()
    captions = captions_of("a dog runs", "red cat fast dog", "a puppy fast")
    named = [(0, 1), (1, 1), (1, 3), (2, 1)]        # image and step of each object word
    expected = {(b, t): estimate(model, features[b], captions[b], t) for b, t in named}
    explanation = model.lrp(features, captions)
    given = features, explanation, captions, WORDS
    estimates = grounding.presence(model, *given, calibration(0))
    assert set(map(tuple, estimates.isfinite().nonzero().tolist())) == set(named)
    for (b, t), value in expected.items():
        assert float(estimates[b, t]) == pytest.approx(value, abs=1e-6)
    for threshold in sorted(expected.values()):
        flags = grounding.presence(model, *given, calibration(0)) < threshold + 1e-6
        below = {place for place, value in expected.items() if value <= threshold}
        assert set(map(tuple, flags.nonzero().tolist())) == below
    values = grounding.scores(model, features, explanation, captions)["absolute_share"]
    assert not values[captions[:, 1:] == 0].any() and values.abs().max() <= 1


@MODELS
@pytest.mark.parametrize("options", [{"method": "greedy"}, {"beam_size": 3}, {"method": "sample"}])
def test_banned_words(model_type, options):
    model, features = make(model_type), random_regions()
    free = decoding.decode(model, features, WORDS, max_len=6, **options)
    banned = torch.zeros(3, len(WORDS), dtype=torch.bool)
    banned[0, free[0, 0]], banned[1] = True, True
    banned[1, WORDS.end] = False
    torch.manual_seed(0)
    captions = decoding.decode(model, features, WORDS, max_len=6, banned=banned, **options)
    assert not (captions[0] == free[0, 0]).any()
    assert captions[1, 0] == WORDS.end and not captions[1, 1:].any()
    if options.get("method") != "sample":
        assert torch.equal(captions[2][:free.shape[1]], free[2][:captions.shape[1]])


@MODELS
@pytest.mark.parametrize("seed", range(3))
def test_grounded_decoding_equals_decoding_image_by_image(model_type, seed):
    """Up to three times: caption, ban all names of the categories of flagged words."""
    model = make(model_type, seed=seed)
    features = random_regions(seed)
    for name in ("dog", "cat", "puppy"):
        model.W_o.bias.data[WORDS.wordmap[name]] += 3
    threshold = 0.6
    names = {"dog": ("dog", "puppy"), "cat": ("cat",)}
    changed = 0
    captions = grounding.decode_grounded(model, features, WORDS, calibration(threshold), max_len=6)
    for b in range(3):
        banned = torch.zeros(1, len(WORDS), dtype=torch.bool)
        tokens = first = decoding.decode(model, features[b:b + 1], WORDS, max_len=6)
        for _ in range(3):
            caption = decoding.with_start(tokens, WORDS)[0]
            low = [category for t, category in OBJECTS.named(WORDS.decode(tokens[0].tolist()))
                   if estimate(model, features[b], caption, t) < threshold]
            if not low:
                break
            for name in (name for category in low for name in names[category]):
                banned[0, WORDS.wordmap[name]] = True
            tokens = decoding.decode(model, features[b:b + 1], WORDS, max_len=6, banned=banned)
        changed += first.tolist() != tokens.tolist()
        assert WORDS.decode(captions[b].tolist()) == WORDS.decode(tokens[0].tolist())
    assert changed


def table_of_words(count=400, seed=0):
    """Object words whose presence depends on two scores alone"""
    random = np.random.default_rng(seed)
    words = pd.DataFrame({name: random.normal(size=count) * 3 for name in grounding.SCORES[:-1]})
    log_odds = 1 + words.log_p - 0.5 * words.image
    words["present"] = (random.random(count) < 1 / (1 + np.exp(-log_odds))).astype(float)
    words["image_name"] = [f"{n // 2}.png" for n in range(count)]
    words["step"] = np.arange(count) % 2
    words["word"] = [("dog", "cat", "puppy")[n % 3] for n in range(count)]
    return words


def write_table(words, folder):
    """The table of the experiment grounding"""
    scores = [*grounding.SCORES[:-1], "present"]
    rows = words.rename(columns={"image": "image_score", "image_name": "image"}).melt(
        ["image", "step", "word"], var_name="measure")
    rows["measure"] = rows["measure"].replace("image_score", "image")
    rows["method"] = "any"
    assert set(rows["measure"]) == set(scores)
    rows.to_csv(folder / "grounding_words_val.csv", index=False)


def test_calibration_finds_what_presence_depends_on(tmp_path, capsys):
    model, weight = make(AOAModel), tmp_path / "best.pth"
    write_table(table_of_words(), tmp_path)
    grounding.calibrate(weight, model, OBJECTS, tmp_path, [["a dog", "the dog runs"], ["a cat"]])
    found = grounding.load(weight, model)
    assert found.frequencies == pytest.approx({"dog": math.log(3), "cat": math.log(2)})
    assert found.coefficients["log_p"] == pytest.approx(1, abs=0.25)
    assert found.coefficients["image"] == pytest.approx(-0.5, abs=0.2)
    assert abs(found.coefficients["log_p_gain"]) < 0.15
    output = capsys.readouterr().out
    areas = json.loads((tmp_path / "best_grounding.json").read_text())["areas"]
    assert f"all {areas['all']:.3f}" in output
    assert areas["all"] > areas["without image"] + 0.03 > areas["without log_p"] + 0.03
    words = grounding.read_scores(tmp_path, "val")
    estimates = grounding.estimates(words, found)
    kept = (estimates[words.present > 0] >= found.threshold).mean()
    assert kept == pytest.approx(0.95, abs=0.02)


def test_words_of_one_class_permit_no_estimate(tmp_path):
    words = table_of_words()
    words["present"] = 1.0
    write_table(words, tmp_path)
    with refused("too few object words"):
        grounding.calibrate(tmp_path / "best.pth", make(AOAModel), OBJECTS, tmp_path, [["a dog"]])


def test_a_calibration_belongs_to_its_weights(tmp_path):
    model, weight = make(AOAModel), tmp_path / "best.pth"
    assert grounding.load(weight, model) is None
    grounding.save(weight, model, 0.25, 0.125, OBJECTS, COEFFICIENTS, FREQUENCIES, words_correct=3)
    decoder = grounding.decoder(weight, model, True, {})
    assert decoder.keywords["calibration"].threshold == 0.125
    found = grounding.load(weight, model)
    assert found.threshold == 0.25 and found.objects.words == OBJECTS.words
    assert found.coefficients == COEFFICIENTS and found.frequencies == FREQUENCIES
    with refused("other weights"):
        grounding.load(weight, make(AOAModel, seed=1))
    path = tmp_path / "best_grounding.json"
    content = json.loads(path.read_text())
    for key, value in (("threshold", "high"), ("words", ["dog"]), ("threshold", float("nan")),
                       ("coefficients", {"constant": 1}), ("frequencies", {"dog": "often"})):
        path.write_text(json.dumps(content | {key: value}))
        with refused("is damaged or of another kind"):
            grounding.load(weight, model)


def test_visible_objects_are_no_categories_of_coco(tmp_path):
    coco = load_objects(tmp_path, "none", {})
    visible = load_objects(tmp_path, "none", {}, visible=True)
    assert coco.words.items() <= visible.words.items()
    names = [visible.words[word,] for word in ("dress", "dresses", "shirts", "stairs", "waterfall")]
    assert names == ["dress", "dress", "shirt", "stairs", "river"]
    assert visible.named(["a", "woman", "in", "a", "dress"]) == [(1, "person"), (4, "dress")]
    lists = read_synonyms(VISIBLE_OBJECTS)
    phrases = [phrase for name, others in lists.items() for phrase in (name, *others)]
    assert len(phrases) == len(set(phrases))
