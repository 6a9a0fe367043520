"""Extreme inputs, ε and weights: explanations are finite, and relevance stays bounded."""
import pytest
import torch
from helpers import FIELDS, MODELS, OWN_METHODS, make, max_pooled, random_regions
from torch import nn

from captioning.explanation.derivatives import ratio
from captioning.explanation.methods import METHODS

# one word; one word without <end>; <end> first; unknown words only; one word up to the maximum
# length; any words
CAPTIONS = torch.tensor([[1, 7, 2, 0, 0, 0, 0, 0], [1, 7, 0, 0, 0, 0, 0, 0],
                         [1, 2, 0, 0, 0, 0, 0, 0], [1, 3, 3, 3, 2, 0, 0, 0],
                         [1, 5, 5, 5, 5, 5, 5, 5], [1, 4, 5, 6, 7, 8, 9, 2]])


def of_one_pixel():
    """An encoder that keeps the size of the image, for images of 1×1 pixels as well."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU())


def extreme_images(side, generator):
    """(6, 3, side, side) normalised: black, white, zero, one colour, noise and strong noise."""
    colours = torch.tensor([-2.1, 2.6, 0]).repeat(3, 1).T
    flat = torch.cat([colours, torch.randn(1, 3, generator=generator)])[..., None, None]
    noise = torch.randn(2, 3, side, side, generator=generator)
    noise[1] *= 100
    return torch.cat([flat.expand(4, 3, side, side), noise])


@MODELS
def test_random_models(model_type, pytestconfig):
    """With and without CNN and biases, with small and large weights, in turn."""
    for number in range(pytestconfig.getoption("models") // 2):
        generator = torch.Generator().manual_seed(number)
        encoder = (max_pooled, of_one_pixel, None)[number % 3]
        biased = number % 4 > 0
        model = make(model_type, encoder, number, biased)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 10 ** torch.empty(()).uniform_(-1, 0.5, generator=generator)
        if encoder:
            images = extreme_images(8 if encoder is max_pooled else 1, generator).double()
        else:
            scales = torch.logspace(-2, 2, 6)[:, None, None]
            images = random_regions(number).repeat(2, 1, 1) * scales
        eps = (0, 0.01, 1e30)[number // 3 % 3]
        method = OWN_METHODS[number % len(OWN_METHODS)]
        explanation = model.lrp(images, CAPTIONS, eps=eps)
        assert_finite(explanation, f"{number}, ε = {eps}")
        assert_bounded(explanation, biased, eps, f"{number}, ε = {eps}")
        single = METHODS[method].explain(model.float(), images.float(), CAPTIONS)
        assert_finite(single, f"{number}, {method}")


def assert_finite(explanation, place):
    for field in FIELDS:
        value = getattr(explanation, field)
        assert value is None or value.isfinite().all(), f"{place}: {field}"


def assert_bounded(explanation, biased, eps, place):
    """Without biases and ε all relevance arrives; a CNN, of shares ≥ 0, adds none."""
    features = explanation.features.abs().sum((-2, -1))
    words = explanation.words.abs().sum(-1)
    if not biased and eps == 0:
        total = features + words + explanation.targets.abs()
        assert (explanation.rest.abs() <= 1e-6 * total).all(), place
    if eps == 1e30:
        assert (features + words <= 1e-9).all(), place
    if explanation.pixels is not None:
        pixels = explanation.pixels.abs().sum((-3, -2, -1))
        assert (pixels <= (1 + 1e-9) * features).all(), place


@pytest.mark.parametrize("eps", [0, 1e-320, 1e-30])
def test_zeros_have_no_relevance_for_any_epsilon(eps):
    assert ratio(torch.tensor([0.0, 1, -2]), eps).tolist() == [0, 1, 1]
