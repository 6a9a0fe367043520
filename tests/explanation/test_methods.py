"""What all explanation methods have in common: shapes, chosen steps, options, inference mode; and adding a rule."""
from types import SimpleNamespace

import pytest
import torch
from helpers import CAPTIONS, T, make, max_pooled, random_images, random_regions
from torch import nn
from torch.nn import functional as F

from aoamodel import AOAModel
from captioning.explanation import attribution
from captioning.explanation.methods import METHODS, SPLIT, Method, pixel_maps, region_relevance
from captioning.explanation.rules import Gamma
from gridTDmodel import GridTDModel

MODELS = pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
FIELDS = ("logits", "targets", "words", "features", "pixels", "attention", "beta", *SPLIT)


@MODELS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inputs", [random_images, random_regions])
def test_chosen_steps_change_every_field_alike(model_type, method, inputs):
    model = make(model_type, max_pooled if inputs is random_images else None)
    steps = torch.tensor([[4, 0, 2], [1, 3, 2], [0, 4, 1]])
    explain = getattr(model, method)
    every, chosen = explain(inputs(), CAPTIONS), explain(inputs(), CAPTIONS, steps=steps)
    for field in FIELDS:
        whole, part = getattr(every, field), getattr(chosen, field)
        assert (whole is None) == (part is None)
        if whole is not None:
            expected = torch.stack([values[own] for values, own in zip(whole, steps, strict=True)])
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)


@MODELS
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_option(model_type, method):
    model, images = make(model_type, max_pooled), random_images()
    explain = getattr(model, method)
    plain, other = explain(images, CAPTIONS, contrast=4), explain(images, CAPTIONS, contrast=4, chunk=2)
    assert explain(images, CAPTIONS, contrast=4, pixels=False).pixels is None
    assert plain.grid == (4, 4)
    for field in FIELDS:
        if getattr(plain, field) is not None:
            torch.testing.assert_close(getattr(plain, field), getattr(other, field))


@MODELS
@pytest.mark.parametrize("order", [list(METHODS), list(METHODS)[::-1]])
def test_shared_passes_change_nothing(model_type, order, monkeypatch):
    """Of seven methods, three rules need derivatives with respect to pixels: LRP, gradient and guided backpropagation.
    """
    model, images, shared, passes = make(model_type, max_pooled), random_images(), {}, []
    expected = {method: getattr(model, method)(images, CAPTIONS, contrast=4) for method in order}
    through_encoder = attribution.through_encoder
    monkeypatch.setattr(attribution, "through_encoder", lambda *args: passes.append(0) or through_encoder(*args))
    for method in order:
        actual = getattr(model, method)(images, CAPTIONS, contrast=4, shared=shared)
        for field in FIELDS:
            one, other = getattr(actual, field), getattr(expected[method], field)
            assert (one is None) == (other is None), (method, field)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=f"{method}, {field}")
    assert len(passes) == 3 or order != list(METHODS)


@MODELS
def test_attention_needs_no_backward_pass(model_type, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("attention took a derivative")
    model, images = make(model_type, max_pooled), random_images()
    expected = model.grad_cam(images, CAPTIONS)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    explanation = model.attention(images, CAPTIONS)
    for name in ("attention", "logits"):
        torch.testing.assert_close(getattr(explanation, name), getattr(expected, name), rtol=0, atol=1e-12)
    assert explanation.words is explanation.features is explanation.pixels is None


@MODELS
@pytest.mark.parametrize("method", METHODS)
def test_inference_mode(model_type, method):
    model = make(model_type, max_pooled)
    expected = getattr(model, method)(random_images(), CAPTIONS)
    with torch.inference_mode():
        explanation = getattr(model, method)(random_images(), CAPTIONS.clone())
    for field in FIELDS:
        if getattr(expected, field) is not None:
            assert torch.equal(getattr(explanation, field), getattr(expected, field))


@MODELS
def test_a_model_made_in_inference_mode_says_so(model_type):
    with torch.inference_mode():
        model = make(model_type, max_pooled)
        with pytest.raises(ValueError, match="create it outside"):
            model.lrp(random_images(), CAPTIONS)


@MODELS
@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_not_square(model_type, method):
    model, images = make(model_type, max_pooled), torch.randn(3, 3, 8, 12, dtype=torch.float64)
    explanation = getattr(model, method)(images, CAPTIONS)
    assert explanation.grid == (4, 6)
    maps = pixel_maps(explanation, method, (8, 12))
    assert maps.shape == (3, T, 8, 12)
    if method == "attention":           # one row per image row: the corner belongs to the first region
        weights = explanation.attention if model_type is GridTDModel else explanation.attention.mean(2)
        torch.testing.assert_close(maps[..., 0, 0], weights[..., 0])
        torch.testing.assert_close(maps[..., 0, -1], weights[..., 5])


def test_attention_is_upsampled_bilinearly_row_by_row():
    attention = torch.zeros(1, 1, 4)
    attention[0, 0, 1] = 1                                              # second column of the first row
    maps = pixel_maps(SimpleNamespace(attention=attention, grid=(2, 2)), "attention", (8, 8))
    assert maps.shape == (1, 1, 8, 8)
    assert maps[0, 0, 0, 7] == 1 and maps[0, 0, 7, 0] == 0 and 0 < maps[0, 0, 3, 4] < 1


def test_attention_is_the_mean_over_heads():
    heads = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    one, other = (SimpleNamespace(attention=weights, grid=(3, 3)) for weights in (heads, heads.mean(2)))
    assert torch.equal(pixel_maps(one, "attention", (6, 6)), pixel_maps(other, "attention", (6, 6)))
    assert torch.equal(region_relevance(one, "attention"), heads.mean(2))


def test_maps_sum_over_channels():
    pixels, features = torch.randn(2, 3, 3, 4, 4), torch.randn(2, 3, 4, 5)
    explanation = SimpleNamespace(pixels=pixels, features=features)
    assert torch.equal(pixel_maps(explanation, "lrp", (4, 4)), pixels.sum(2))
    assert torch.equal(region_relevance(explanation, "lrp"), features.sum(-1))


@MODELS
@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].has_words])
def test_stopping_at_the_encoder_changes_nothing_above_it(model_type, method):
    model, images = make(model_type, max_pooled), random_images()
    expected, explanation = (getattr(model, method)(images, CAPTIONS, pixels=wanted) for wanted in (True, False))
    for field in ("logits", "targets", "words", "features", "attention"):
        assert torch.equal(getattr(explanation, field), getattr(expected, field))


def test_gamma_rule():
    """The γ-rule against its definition, R_i = Σ_j x_i (W + γW⁺)_ji / (z_j + ε sign z_j) R_j, as one dense matrix."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    with Gamma(0.25, eps=0.01):
        y = layer(x).relu()
    assert torch.equal(y, layer(x).relu())
    r = torch.randn_like(y)
    relevance = x * torch.autograd.grad(y, x, r)[0]
    unit = torch.eye(32, dtype=torch.float64).view(32, 2, 4, 4)
    weight = layer.weight + 0.25 * layer.weight.clamp(min=0)
    matrix = F.conv2d(unit, weight, padding=1).flatten(1)                              # (inputs, outputs)
    z = x.detach().flatten() @ matrix
    shares = x.detach().flatten()[:, None] * matrix / (z + 0.01 * torch.where(z >= 0, 1, -1))
    expected = shares @ (r * y).detach().flatten()
    torch.testing.assert_close(relevance.flatten(), expected)


@MODELS
def test_a_method_registered_at_run_time(model_type, monkeypatch):
    """As the docstring of methods.py shows it: LRP with another rule, which takes the same options."""
    monkeypatch.setitem(METHODS, "lrp_gamma", Method(
        lambda model, images, captions, **options: model.lrp(
            images, captions, rule=Gamma(0.25, options["eps"]), **options),
        "LRP with the γ-rule in the convolutions.", additive=True))
    model, images = make(model_type, max_pooled), random_images()
    explain = METHODS["lrp_gamma"].explain
    gamma, lrp = explain(model, images, CAPTIONS, eps=0.1), model.lrp(images, CAPTIONS, eps=0.1)
    assert gamma.pixels.isfinite().all() and gamma.pixels[0].any()
    assert not torch.allclose(gamma.pixels, lrp.pixels)
    for field in ("features", "words", "targets", *SPLIT):
        assert torch.equal(getattr(gamma, field), getattr(lrp, field))
    assert not torch.allclose(gamma.words, explain(model, images, CAPTIONS, eps=0.5).words)
    parts = gamma.image + gamma.start + gamma.previous + gamma.rest
    torch.testing.assert_close(parts, gamma.targets, rtol=0, atol=1e-12)
