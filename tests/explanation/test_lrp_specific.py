"""LRP of each word minus the mean of LRP of the caption's other words, against loops over LRP of single words."""
from statistics import fmean

import pytest
import torch
from helpers import CAPTIONS, T, make, max_pooled, random_images, random_regions

from aoamodel import AOAModel
from captioning.explanation.methods import SPLIT
from gridTDmodel import GridTDModel

MODELS = pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
ENCODERS = pytest.mark.parametrize("encoder", [None, max_pooled])


def inputs(encoder):
    return random_images() if encoder else random_regions()


def others_of(caption, t):
    """The steps at which the caption has another word than at step t."""
    return [s for s in range(len(caption) - 1) if caption[s + 1] not in (0, caption[t + 1])]


@MODELS
@ENCODERS
@pytest.mark.parametrize("options", [{}, {"contrast": 8, "eps": 0.1}])
def test_literal_loop_over_words(model_type, encoder, options):
    model, images = make(model_type, encoder), inputs(encoder)
    explanation, lrp = (method(images, CAPTIONS, **options) for method in (model.lrp_specific, model.lrp))
    for b, caption in enumerate(CAPTIONS.tolist()):
        for t in range(T):
            if caption[t + 1] == 0:
                continue
            others = others_of(caption, t)
            for name in ("targets", "words", "features", "pixels", "image", "start"):
                if getattr(lrp, name) is None:
                    assert name == "pixels" and explanation.pixels is None
                    continue
                values = getattr(lrp, name)[b]
                expected = values[t].clone()
                for s in others:
                    expected -= values[s] / len(others)
                if name == "words":
                    expected[t + 1:] = 0        # read after the step
                torch.testing.assert_close(getattr(explanation, name)[b, t], expected, rtol=0, atol=1e-12)
    assert (explanation.features - lrp.features).abs().max() > 1e-3
    assert torch.equal(explanation.logits, lrp.logits)


@MODELS
@ENCODERS
@pytest.mark.parametrize("steps", [None, torch.tensor([[4, 0], [1, 3], [0, 4]])])
def test_the_parts_add_up_to_the_difference_of_the_targets(model_type, encoder, steps):
    model, images = make(model_type, encoder), inputs(encoder)
    explanation, logits = model.lrp_specific(images, CAPTIONS, steps=steps), model(images, CAPTIONS).detach()
    chosen = torch.arange(T).expand(3, T) if steps is None else steps
    for b, caption in enumerate(CAPTIONS.tolist()):
        target = [logits[b, s, caption[s + 1]].item() for s in range(T)]
        for position, t in enumerate(chosen[b].tolist()):
            parts = [explanation.features[b, position].sum(), explanation.words[b, position, 0],
                     explanation.words[b, position, 1:t + 1].sum(), explanation.rest[b, position]]
            is_padding = caption[t + 1] == 0
            means = [target[s] for s in others_of(caption, t)] or [0]
            assert sum(parts).item() == pytest.approx(0 if is_padding else target[t] - fmean(means), abs=1e-12)
            for name, part in zip(SPLIT, parts, strict=True):
                assert getattr(explanation, name)[b, position].item() == pytest.approx(part.item(), abs=1e-12)
                assert not (is_padding and part)


@MODELS
def test_a_batch_equals_its_items_and_padding_changes_nothing(model_type):
    model, images = make(model_type, max_pooled), random_images()
    batch = model.lrp_specific(images, CAPTIONS)
    for b in range(3):
        length = int((CAPTIONS[b] != 0).sum())
        alone = model.lrp_specific(images[b:b + 1], CAPTIONS[b:b + 1, :length])
        for name in ("targets", "features", "pixels", *SPLIT):
            actual = getattr(batch, name)[b]
            torch.testing.assert_close(actual[:length - 1], getattr(alone, name)[0], rtol=0, atol=1e-12)
            assert not actual[length - 1:].any()
        torch.testing.assert_close(batch.words[b, :length - 1, :length - 1], alone.words[0], rtol=0, atol=1e-12)


@MODELS
def test_a_caption_without_other_words(model_type):
    model, images = make(model_type), random_regions()
    for captions in ([[1, 5]], [[1, 3, 3]]):        # one word, and one word twice
        captions = torch.tensor(captions).expand(3, -1)
        specific, lrp = model.lrp_specific(images, captions), model.lrp(images, captions)
        for name in ("targets", "words", "features", *SPLIT):
            torch.testing.assert_close(getattr(specific, name), getattr(lrp, name), rtol=0, atol=1e-14)


def test_an_attention_head_that_does_not_exist():
    for method in ("lrp", "lrp_specific"):
        with pytest.raises(ValueError, match="head 2 is not one of this model's 0 … 1"):
            getattr(make(AOAModel), method)(random_regions(), CAPTIONS, head=2)
