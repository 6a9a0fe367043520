"""Flags of object words that come from language, their threshold, and decoding without flagged words."""
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
WORDS = build([["a", "dog", "puppy", "cat", "red", "runs", "fast", "big"]], 1)       # 12 words with the special ones
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
    named = [[1], [1, 3], [1]]
    shares = {(b, t): share(model, features[b], captions[b], t) for b, steps in enumerate(named) for t in steps}
    explanation = model.lrp(features, captions)
    for threshold in sorted(shares.values()):
        flags = grounding.flags(explanation, captions, WORDS, grounding.Calibration(threshold + 1e-9, OBJECTS))
        assert set(map(tuple, flags.nonzero().tolist())) == {key for key, s in shares.items() if s <= threshold}
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
    assert not (captions[0] == free[0, 0]).any() and captions[1].tolist() == [WORDS.end] + [0] * (captions.shape[1] - 1)
    if options.get("method") != "sample":
        assert torch.equal(captions[2][:free.shape[1]], free[2][:captions.shape[1]])


@MODELS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("replace", [True, False])
def test_grounded_decoding_equals_decoding_image_by_image(model_type, seed, replace):
    """Literally: caption, ban all names of the categories of flagged words (without replacement: of all categories that
    are not named without a flag), caption again, up to three times."""
    model, features = make(model_type, seed=seed), random_regions(seed)
    for name in ("dog", "cat", "puppy"):
        model.W_o.bias.data[WORDS.wordmap[name]] += 3
    calibration = grounding.Calibration(0.3, OBJECTS)
    names = {"dog": ("dog", "puppy"), "cat": ("cat",)}
    changed = 0
    captions = grounding.decode_grounded(model, features, WORDS, calibration, max_len=6, replace=replace)
    for b in range(3):
        banned = torch.zeros(1, len(WORDS), dtype=torch.bool)
        tokens = first = decoding.decode(model, features[b:b + 1], WORDS, max_len=6)
        for _ in range(3):
            words = WORDS.decode(tokens[0].tolist())
            caption = decoding.with_start(tokens, WORDS)[0]
            shares = [(share(model, features[b], caption, t), category) for t, category in OBJECTS.named(words)]
            low = [category for value, category in shares if value < 0.3]
            if not low:
                break
            if not replace:
                low = set(low) | (set(names) - {category for value, category in shares if value >= 0.3})
            for name in (name for category in low for name in names[category]):
                banned[0, WORDS.wordmap[name]] = True
            tokens = decoding.decode(model, features[b:b + 1], WORDS, max_len=6, banned=banned)
        changed += first.tolist() != tokens.tolist()
        assert WORDS.decode(captions[b].tolist()) == WORDS.decode(tokens[0].tolist())
    assert changed


def test_the_threshold_keeps_the_given_share_of_correct_words():
    shares = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    is_present = [i % 3 > 0 for i in range(1000)]
    threshold = grounding.fit_threshold(shares, is_present, 0.95)
    correct = [value for value, is_true in zip(shares, is_present, strict=True) if is_true]
    assert sum(value >= threshold for value in correct) / len(correct) == pytest.approx(0.95, abs=2e-3)
    with pytest.raises(InputError, match="no object word"):
        grounding.fit_threshold([0.5], [False])


def test_a_calibration_belongs_to_its_weights(tmp_path):
    model, weight = make(AOAModel), tmp_path / "best.pth"
    assert grounding.load(weight, model) is None
    grounding.save(weight, model, 0.25, 0.125, OBJECTS, words_correct=3)
    assert grounding.load_for_decoding(weight, model).threshold == 0.125
    calibration = grounding.load(weight, model)
    assert calibration.threshold == 0.25 and calibration.objects.words == OBJECTS.words
    with pytest.raises(InputError, match="other weights"):
        grounding.load(weight, make(AOAModel, seed=1))
    path = tmp_path / "best_grounding.json"
    content = json.loads(path.read_text())
    for key, value in (("threshold", "high"), ("words", ["dog"]), ("threshold", float("nan"))):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(InputError, match="must contain a number|is not a number"):
            grounding.load(weight, model)
