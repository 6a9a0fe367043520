"""What all explanation methods have in common: chosen steps, options, modes; and adding one."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CAPTIONS,
    ENCODERS,
    FIELDS,
    MODELS,
    OWN_METHODS,
    T,
    assert_close,
    assert_same,
    inputs_of,
    make,
    max_pooled,
    random_images,
)
from torch import nn
from torch.nn import functional as F

from captioning.explanation import attribution
from captioning.explanation.methods import METHODS, pixel_maps, region_relevance
from captioning.explanation.rules import Gamma

EVERY_METHOD = pytest.mark.parametrize("method", OWN_METHODS)


@MODELS
@EVERY_METHOD
@ENCODERS
def test_chosen_steps_change_every_field_alike(model_type, method, encoder):
    explain = partial(METHODS[method].explain, make(model_type, encoder))
    steps = torch.tensor([[4, 0, 2], [1, 3, 2], [0, 4, 1]])
    every = explain(inputs_of(encoder), CAPTIONS)
    expected = dict.fromkeys(FIELDS)
    for field in FIELDS:
        if getattr(every, field) is not None:
            expected[field] = torch.stack([
                values[own] for values, own in zip(getattr(every, field), steps, strict=True)])
    chosen = explain(inputs_of(encoder), CAPTIONS, steps=steps)
    assert_same(chosen, SimpleNamespace(**expected))


@MODELS
@EVERY_METHOD
@ENCODERS
def test_batch_padding_mode_and_context_do_not_matter(model_type, method, encoder):
    """Alone, with more padding, a model in training explains an image as in a batch."""
    model, images = make(model_type, encoder), inputs_of(encoder)
    explain = partial(METHODS[method].explain, model)
    batch = explain(images, CAPTIONS)
    model.train()
    model.embedding.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    for b, length in enumerate((CAPTIONS[:, 1:] != 0).sum(1)):
        with torch.no_grad():
            alone = explain(images[b:b + 1], F.pad(CAPTIONS[b:b + 1], (0, 2)))
            assert not torch.is_grad_enabled()
        for field in FIELDS:
            value, expected = getattr(alone, field), getattr(batch, field)
            if field == "words" and value is not None:
                assert not value.triu(1).any()
                value = value[..., :T]
            if value is not None:
                assert_close(value[0, :length], expected[b, :length])
                assert field == "logits" or not (value[0, length:].any()
                                                 or expected[b, length:].any())
                assert not value.requires_grad
    assert all(module.training for module in model.modules()) and not images.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


@MODELS
@EVERY_METHOD
def test_every_method_takes_every_option(model_type, method):
    """Also in inference mode; stopping at the encoder changes nothing above it."""
    explain = partial(METHODS[method].explain, make(model_type, max_pooled))
    images = random_images()
    plain = explain(images, CAPTIONS, contrast=4)
    lrp = METHODS["lrp"].explain(make(model_type, max_pooled), images, CAPTIONS)
    assert plain.grid == (4, 4)
    assert_close(plain.attention, lrp.attention)
    assert_same(explain(images, CAPTIONS, contrast=4, chunk=2), plain)
    above = explain(images, CAPTIONS, contrast=4, pixels=False)
    assert above.pixels is None
    assert_same(above, plain, "pixels")
    with torch.inference_mode():
        assert_same(explain(random_images(), CAPTIONS.clone(), contrast=4), plain)


@MODELS
@pytest.mark.parametrize("order", [OWN_METHODS, OWN_METHODS[::-1]])
def test_shared_passes_change_nothing(model_type, order, monkeypatch):
    """Of eight methods, four rules need pixels: LRP, γ, gradient and guided backpropagation."""
    model, images = make(model_type, max_pooled), random_images()
    expected = {method: METHODS[method].explain(model, images, CAPTIONS, contrast=4)
                for method in order}
    passes = []
    through_encoder = attribution.through_encoder
    monkeypatch.setattr(attribution, "through_encoder",
                        lambda *args: passes.append(0) or through_encoder(*args))
    shared = {}
    for method in order:
        actual = METHODS[method].explain(model, images, CAPTIONS, contrast=4, shared=shared)
        assert_same(actual, expected[method])
    assert len(passes) == 4 or order != OWN_METHODS


@MODELS
def test_attention_needs_no_backward_pass(model_type, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("attention took a derivative")
    model, images = make(model_type, max_pooled), random_images()
    expected = model.grad_cam(images, CAPTIONS)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    explanation = model.attention(images, CAPTIONS)
    assert explanation.words is explanation.features is explanation.pixels is None
    assert_same(explanation, expected, "words", "features", "pixels")


@MODELS
@EVERY_METHOD
def test_images_that_are_not_square(model_type, method):
    model = make(model_type, max_pooled)
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    explanation = METHODS[method].explain(model, images, CAPTIONS)
    assert explanation.grid == (4, 6)
    maps = pixel_maps(explanation, method, (8, 12))
    assert maps.shape == (3, T, 8, 12)
    if method == "attention":       # one row per image row: the corner belongs to the first region
        weights = region_relevance(explanation, method)
        torch.testing.assert_close(maps[..., [0, -1]][..., 0, :], weights[..., [0, 5]])


def test_maps_are_sums_over_channels_and_means_over_heads():
    heads = torch.rand(2, 3, 4, 9)
    one = SimpleNamespace(attention=heads, grid=(3, 3), pixels=torch.randn(2, 3, 3, 4, 4),
                          features=torch.randn(2, 3, 4, 5))
    other = SimpleNamespace(attention=heads.mean(2), grid=(3, 3))
    assert torch.equal(*(pixel_maps(x, "attention", (6, 6)) for x in (one, other)))
    assert torch.equal(region_relevance(one, "attention"), heads.mean(2))
    assert torch.equal(pixel_maps(one, "lrp", (4, 4)), one.pixels.sum(2))
    assert torch.equal(region_relevance(one, "lrp"), one.features.sum(-1))


@pytest.mark.parametrize("signed", [False, True])
def test_gamma_rule(signed):
    """R_i = Σ_j c_ji / (z_j + ε sign z_j) R_j, z_j = Σ_i c_ji + b_j, as one dense matrix; c_ji is
    W_ji x_i, times 1 + γ if it has the sign of y_j"""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    x = (x if signed else x.abs()).requires_grad_()
    with Gamma(0.25, eps=0.01):
        y = layer(x)
    assert_close(y, layer(x))
    r = torch.randn_like(y)
    relevance = x * torch.autograd.grad(y, x, r)[0]
    unit = torch.eye(32, dtype=torch.float64).view(32, 2, 4, 4)
    matrix = F.conv2d(unit, layer.weight, padding=1).flatten(1)         # (inputs, outputs)
    products = x.detach().flatten()[:, None] * matrix
    products = torch.where(products * y.detach().flatten() > 0, 1.25 * products, products)
    z = products.sum(0) + layer.bias.repeat_interleave(16)
    shares = products / (z + 0.01 * torch.where(z >= 0, 1.0, -1.0))
    torch.testing.assert_close(relevance.flatten(), shares @ (r * y).detach().flatten())


def test_gamma_rule_of_outputs_that_are_zero():
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    with Gamma(0.25, eps=0):
        y = F.conv2d(x, torch.randn(3, 2, 3, 3))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@MODELS
def test_the_gamma_rule_changes_pixels_alone(model_type):
    model, images = make(model_type, max_pooled), random_images()
    explain = METHODS["lrp_gamma"].explain
    gamma, lrp = explain(model, images, CAPTIONS, eps=0.1), model.lrp(images, CAPTIONS, eps=0.1)
    assert gamma.pixels.isfinite().all() and not torch.allclose(gamma.pixels, lrp.pixels)
    assert_same(gamma, lrp, "pixels")
    assert not torch.allclose(gamma.words, explain(model, images, CAPTIONS, eps=0.5).words)
