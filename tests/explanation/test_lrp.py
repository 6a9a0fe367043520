"""Layer-wise relevance propagation of both models against literal loops (oracle.py)."""

import numpy as np
import oracle
import pytest
import torch
from helpers import (
    CAPTIONS,
    ENCODERS,
    MODEL_TYPES,
    MODELS,
    T,
    assert_close,
    inputs_of,
    make,
    max_pooled,
    random_images,
    random_regions,
)
from torch import nn

from aoamodel import AOAModel
from gridTDmodel import GridTDModel

PARTS = ("words", "features", "pixels")


def average_pooled():
    """An encoder of 8×8 pixels to 4×4 regions: strides, no bias, an average over padding."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.ReLU(),
                         nn.AvgPool2d(2, stride=1, padding=1), nn.Conv2d(4, 5, 2), nn.ReLU())


def overlapping():
    """8×8 pixels to 2×4 regions: oblong kernels, overlapping windows, pooling before the ReLU."""
    return nn.Sequential(nn.Conv2d(3, 3, (3, 5), stride=(2, 1), padding=(1, 2)),
                         nn.MaxPool2d(3, 2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 1))


def assert_agrees(model, images, captions=CAPTIONS, **options):
    """The explanation equals the oracle's -> (explanation, the oracle's dict for each image)."""
    explanation = model.lrp(images, captions, **options)
    results = []
    for b, (image, caption) in enumerate(zip(images, captions, strict=True)):
        expected = oracle.explain(model, image, caption, **options)
        is_word = (caption[1:] != 0).numpy()
        np.testing.assert_allclose(explanation.logits[b].numpy()[is_word],
                                   expected["logits"][is_word], atol=1e-9)
        for name in (*PARTS, "attention"):
            actual = getattr(explanation, name)
            if expected[name] is None:
                assert actual is None
                continue
            largest = np.abs(expected[name]).max()
            assert largest > 1e-4       # otherwise agreement would be meaningless
            np.testing.assert_allclose(actual[b].numpy(), expected[name], rtol=0,
                                       atol=1e-9 * min(1, largest), err_msg=f"{name} {b}")
        results.append(expected)
    return explanation, results


def assert_same(actual, expected, tolerance=1e-12):
    """The relevance of two explanations is equal, relative to the largest of each field."""
    for name in PARTS:
        a = getattr(actual, name)
        b = getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a.double(), b.double(), tolerance * b.abs().max().item())


# -- the oracle ------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("encoder", [max_pooled, average_pooled, overlapping])
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_images(model_type, encoder, eps):
    assert_agrees(make(model_type, encoder, seed=1), random_images(1), eps=eps)


@MODELS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_regions(model_type, seed, eps):
    assert_agrees(make(model_type, seed=seed), random_regions(seed), eps=eps)


@pytest.mark.parametrize(("encoder", "seed", "regions"), [
    (None, 0, 6), (None, 1, 6), (max_pooled, 0, 16)])
def test_query_per_region(encoder, seed, regions):
    model = make(GridTDModel, encoder, seed, query_per_region=True, attention_dim=regions)
    assert_agrees(model, inputs_of(encoder))


@ENCODERS
@pytest.mark.parametrize(("heads", "head"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_one_head(encoder, heads, head):
    """Relevance of words does not depend on the head."""
    model = make(AOAModel, encoder, num_head=heads)
    explanation, _ = assert_agrees(model, inputs_of(encoder)[:2], CAPTIONS[:2], head=head)
    expected = model.lrp(inputs_of(encoder)[:2], CAPTIONS[:2])
    assert_close(explanation.words, expected.words)
    assert heads == 1 or (explanation.features - expected.features).abs().max() > 1e-3


def test_first_maximum_wins():
    model = make(AOAModel, lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 5, 1), nn.ReLU()))
    assert_agrees(model, random_images().round())       # many equal values


@pytest.mark.parametrize(("padding", "mode"), [
    ("same", "zeros"), ("valid", "zeros"), (1, "reflect")])
def test_paddings_of_convolutions(padding, mode):
    conv = nn.Conv2d(3, 5, 3, padding=padding, padding_mode=mode)
    model = make(GridTDModel, lambda: nn.Sequential(conv, nn.ReLU()))
    image = random_images()[:1]
    captions = CAPTIONS[:1]
    explanation = model.lrp(image, captions)
    torch.testing.assert_close(explanation.logits, model(image, captions).detach())
    if mode == "zeros":
        conv.padding = {"same": 1, "valid": 0}[padding]
        assert_same(explanation, assert_agrees(model, image, captions)[0])


@MODELS
def test_contrast_explains_a_difference_of_logits(model_type):
    """A model whose rows of W_o are differences has logits which are these differences."""
    model, shifted = make(model_type, max_pooled), make(model_type, max_pooled)
    for parameter in shifted.W_o.parameters():
        parameter.data -= parameter.data[8].clone()
    images = random_images()
    expected, _ = assert_agrees(shifted, images)
    for contrast in (8, torch.full((3, T), 8)):
        explanation = model.lrp(images, CAPTIONS, contrast=contrast)
        assert_same(explanation, expected)
        torch.testing.assert_close(explanation.targets, expected.targets)
    for method in ("gradient", "grad_cam", "guided_backprop", "guided_grad_cam"):
        assert_same(getattr(model, method)(images, CAPTIONS, contrast=8),
                    getattr(shifted, method)(images, CAPTIONS))


# -- conservation ----------------------------------------------------------------------------------


@MODELS
@ENCODERS
@pytest.mark.parametrize("seed", range(3))
def test_relevance_is_conserved_without_biases_and_eps(model_type, encoder, seed):
    model = make(model_type, encoder, seed, biased=False)
    images = random_images(seed) if encoder else random_regions(seed)
    explanation = model.lrp(images, CAPTIONS, eps=0)
    assert_close(explanation.conservation, (CAPTIONS[:, 1:] != 0).double(), 1e-9)
    assert explanation.rest.abs().max() < 1e-9
    if encoder:
        assert_close(explanation.pixels.sum((2, 3, 4)), explanation.image, 1e-9)


@pytest.mark.parametrize(("model_type", "options"), [
    *((model_type, options) for model_type in MODEL_TYPES for options in (
        {}, {"contrast": 8}, {"steps": torch.tensor([[4, 0], [1, 3], [0, 4]])},
        {"eps": 0, "pixels": False})),
    (AOAModel, {"head": 1})])
@ENCODERS
def test_the_split_adds_up_to_the_target(model_type, encoder, options):
    explanation = make(model_type, encoder).lrp(inputs_of(encoder), CAPTIONS, **options)
    assert torch.equal(explanation.image, explanation.features.sum((2, 3)))
    assert torch.equal(explanation.start, explanation.words[..., 0])
    assert torch.equal(explanation.previous, explanation.words[..., 1:].sum(2))
    parts = explanation.image, explanation.start, explanation.previous, explanation.rest
    assert_close(sum(parts), explanation.targets)
    padding = explanation.targets == 0
    for part in parts:
        assert part.shape == padding.shape and part.abs().max() > 1e-3 and not part[padding].any()


@MODELS
@ENCODERS
@pytest.mark.parametrize("fused", [False, True])
def test_updated_weights_take_effect(model_type, encoder, fused):
    model, images = make(model_type, encoder), inputs_of(encoder)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=fused)
    model(images, CAPTIONS).square().sum().backward()
    optimizer.step()
    assert_agrees(model, images[:1], CAPTIONS[:1])
