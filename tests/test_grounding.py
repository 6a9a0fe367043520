"""Flags of object words that come from language, their threshold, and decoding without them."""
import json

import pytest
import torch
from helpers import make, random_regions

from aoamodel import AOAModel
from captioning import decoding, grounding
from captioning.data.vocabulary import build
from captioning.errors import InputError
from captioning.metrics.object_words import Objects
from gridTDmodel import GridTDModel

MODELS = pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
# 12 words with the special ones
WORDS = build([["a", "dog", "puppy", "cat", "red", "runs", "fast", "big"]], 1)
OBJECTS = Objects({"dog": "dog", "puppy": "dog", "cat": "cat", "red cat": "cat", "fast": "none"})


def captions_of(*texts):
    ids = [torch.tensor(WORDS.encode(text.split(), 9)) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def share(model, features, caption, t):
    """The image's share in the word at step t, from the relevance itself."""
    explanation = model.lrp(features[None], caption[None])
    image = float(explanation.features[0, t].sum())
    start, *previous = explanation.words[0, t].tolist()
    rest = float(explanation.targets[0, t]) - image - start - sum(previous)
    return image / (abs(image) + abs(start) + abs(sum(previous)) + abs(rest))


@MODELS
def test_flags_are_object_words_with_a_small_share(model_type):
    model, features = make(model_type), random_regions()
    captions = captions_of("a dog runs", "red cat fast dog", "a puppy fast")
    named = [(0, 1), (1, 1), (1, 3), (2, 1)]        # image and step of each object word
    shares = {(b, t): share(model, features[b], captions[b], t) for b, t in named}
    explanation = model.lrp(features, captions)
    for threshold in sorted(shares.values()):
        calibration = grounding.Calibration(threshold + 1e-9, OBJECTS)
        flags = grounding.flags(explanation, captions, WORDS, calibration)
        expected = {place for place, value in shares.items() if value <= threshold}
        assert set(map(tuple, flags.nonzero().tolist())) == expected
    values = grounding.image_share(explanation)
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
    """Literally: caption, ban all names of the categories of flagged words, caption again, up to
    three times."""
    model = make(model_type, seed=seed)
    features = random_regions(seed)
    for name in ("dog", "cat", "puppy"):
        model.W_o.bias.data[WORDS.wordmap[name]] += 3
    calibration = grounding.Calibration(0.3, OBJECTS)
    names = {"dog": ("dog", "puppy"), "cat": ("cat",)}
    changed = 0
    captions = grounding.decode_grounded(model, features, WORDS, calibration, max_len=6)
    for b in range(3):
        banned = torch.zeros(1, len(WORDS), dtype=torch.bool)
        tokens = first = decoding.decode(model, features[b:b + 1], WORDS, max_len=6)
        for _ in range(3):
            caption = decoding.with_start(tokens, WORDS)[0]
            low = [category for t, category in OBJECTS.named(WORDS.decode(tokens[0].tolist()))
                   if share(model, features[b], caption, t) < 0.3]
            if not low:
                break
            for name in (name for category in low for name in names[category]):
                banned[0, WORDS.wordmap[name]] = True
            tokens = decoding.decode(model, features[b:b + 1], WORDS, max_len=6, banned=banned)
        changed += first.tolist() != tokens.tolist()
        assert WORDS.decode(captions[b].tolist()) == WORDS.decode(tokens[0].tolist())
    assert changed


def test_the_threshold_keeps_the_given_share_of_correct_words():
    shares = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    is_present = torch.arange(1000) % 3 > 0
    threshold = grounding.fit_threshold(shares.tolist(), is_present.tolist(), 0.95)
    kept = (shares[is_present] >= threshold).double().mean().item()
    assert kept == pytest.approx(0.95, abs=2e-3)
    with pytest.raises(InputError, match="no object word"):
        grounding.fit_threshold([0.5], [False])


def test_a_calibration_belongs_to_its_weights(tmp_path):
    model, weight = make(AOAModel), tmp_path / "best.pth"
    assert grounding.load(weight, model) is None
    grounding.save(weight, model, 0.25, 0.125, OBJECTS, words_correct=3)
    decoder = grounding.decoder(weight, model, True, {})
    assert decoder.keywords["calibration"].threshold == 0.125
    calibration = grounding.load(weight, model)
    assert calibration.threshold == 0.25 and calibration.objects.words == OBJECTS.words
    with pytest.raises(InputError, match="other weights"):
        grounding.load(weight, make(AOAModel, seed=1))
    path = tmp_path / "best_grounding.json"
    content = json.loads(path.read_text())
    for key, value in (("threshold", "high"), ("words", ["dog"]), ("threshold", float("nan"))):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(InputError, match="is damaged or of another kind"):
            grounding.load(weight, model)
