"""LRP of each word minus the mean of LRP of the other words, against loops over single words."""
from statistics import fmean

import pytest
import torch
from helpers import CAPTIONS, ENCODERS, MODELS, T, assert_close, inputs_of, make, random_regions

from aoamodel import AOAModel
from captioning.explanation.methods import SPLIT


def others_of(caption, t):
    """The steps at which the caption has another word than at step t."""
    return [s for s in range(len(caption) - 1) if caption[s + 1] not in (0, caption[t + 1])]


@MODELS
@ENCODERS
@pytest.mark.parametrize("options", [{}, {"contrast": 8, "eps": 0.1}])
def test_literal_loop_over_words(model_type, encoder, options):
    model, images = make(model_type, encoder), inputs_of(encoder)
    explanation = model.lrp_specific(images, CAPTIONS, **options)
    lrp = model.lrp(images, CAPTIONS, **options)
    names = ["targets", "words", "features", "image", "start", *(["pixels"] if encoder else [])]
    for b, t in (CAPTIONS[:, 1:] != 0).nonzero().tolist():
        others = others_of(CAPTIONS[b].tolist(), t)
        for name in names:
            values = getattr(lrp, name)[b]
            expected = values[t].clone()
            for s in others:
                expected -= values[s] / len(others)
            if name == "words":
                expected[t + 1:] = 0        # read after the step
            assert_close(getattr(explanation, name)[b, t], expected)
    assert encoder or explanation.pixels is None
    assert (explanation.features - lrp.features).abs().max() > 1e-3
    assert torch.equal(explanation.logits, lrp.logits)


@MODELS
@ENCODERS
@pytest.mark.parametrize("steps", [None, torch.tensor([[4, 0], [1, 3], [0, 4]])])
def test_the_parts_add_up_to_the_difference_of_the_targets(model_type, encoder, steps):
    model, images = make(model_type, encoder), inputs_of(encoder)
    explanation = model.lrp_specific(images, CAPTIONS, steps=steps)
    logits = model(images, CAPTIONS).detach()
    chosen = torch.arange(T).expand(3, T) if steps is None else steps
    for b, caption in enumerate(CAPTIONS.tolist()):
        target = [logits[b, s, caption[s + 1]].item() for s in range(T)]
        for position, t in enumerate(chosen[b].tolist()):
            words = explanation.words[b, position]
            parts = [explanation.features[b, position].sum(), words[0], words[1:t + 1].sum(),
                     explanation.rest[b, position]]
            is_padding = caption[t + 1] == 0
            means = [target[s] for s in others_of(caption, t)] or [0]
            expected = 0 if is_padding else target[t] - fmean(means)
            assert sum(parts).item() == pytest.approx(expected, abs=1e-12)
            for name, part in zip(SPLIT, parts, strict=True):
                assert_close(getattr(explanation, name)[b, position], part)
                assert not (is_padding and part)


@MODELS
@pytest.mark.parametrize("caption", [[1, 5], [1, 3, 3]])        # one word, and one word twice
def test_a_caption_without_other_words(model_type, caption):
    model, images = make(model_type), random_regions()
    captions = torch.tensor(caption).expand(3, -1)
    specific, lrp = model.lrp_specific(images, captions), model.lrp(images, captions)
    for name in ("targets", "words", "features", *SPLIT):
        assert_close(getattr(specific, name), getattr(lrp, name), 1e-14)


@pytest.mark.parametrize("method", ["lrp", "lrp_specific"])
def test_an_attention_head_that_does_not_exist(method):
    with pytest.raises(ValueError, match="head 2 is not one of this model's 0 … 1"):
        getattr(make(AOAModel), method)(random_regions(), CAPTIONS, head=2)
