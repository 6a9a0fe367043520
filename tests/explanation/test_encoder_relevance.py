"""Relevance through the encoder, from features to pixels: against zennit and literal loops (oracle.py)."""
import numpy as np
import oracle
import pytest
import torch
from torch import nn

from captioning.explanation import encoders
from captioning.explanation.encoders import Residual
from captioning.explanation.rules import LRP


def vgg_like():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
                         nn.ReLU())


def strided():
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.MaxPool2d(3, 2, padding=1), nn.ReLU(),
                         nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=2, dilation=2))


def signed_groups():
    """No ReLU between the convolutions: the second, of two groups, sees both signs"""
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), nn.ReLU())


def average_pooled():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
                         nn.AvgPool2d(3, stride=2, padding=1))


def residual(channels=4):
    """A block as in ResNet, its shortcut a convolution or the identity"""
    def block(shortcut, stride):
        body = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, stride, 1), nn.ReLU(),
                             nn.Conv2d(3, channels, 3, padding=1))
        return Residual(body, shortcut)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         block(nn.Sequential(nn.Conv2d(channels, channels, 1, stride=2)), 2), nn.ReLU(),
                         block(nn.Sequential(), 1), nn.ReLU())


def make(architecture, seed=0, biased=True):
    torch.manual_seed(seed)
    encoder = architecture().double()
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, 0, 0.2 if biased else 0)
    return encoder


def inputs(encoder, seed=0, side=16):
    """Images, features and a relevance for them, of both signs and zero where the features are"""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
    features = encoder(images).detach()
    return images, features, features * torch.randn(features.shape, generator=generator, dtype=torch.float64)


def to_pixels(encoder, images, relevance, eps=0.01):
    """R = x r(x): the rules' derivatives take r = R / features to the pixels"""
    images = images.clone().requires_grad_()
    with LRP(eps):
        features = encoder(images)
    r = torch.where(features == 0, 0, relevance / features).detach()
    return images.detach() * torch.autograd.grad(features, images, r)[0]


# -- zennit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [vgg_like, strided, signed_groups, average_pooled])
@pytest.mark.parametrize("seed", range(3))
def test_zennit_agrees(architecture, seed):
    """zennit's ZPlus treats negative inputs as docs/method.md, section 5 (W⁻x⁻ beside W⁺x⁺); the positive part of the
    bias, which it adds to the denominator, and its stabiliser are 0. Its Norm is the sum rule of average-pooling."""
    pytest.importorskip("zennit")
    from zennit.composites import LayerMapComposite
    from zennit.rules import Norm, Pass, ZPlus

    encoder = make(architecture, seed)
    images, features, relevance = inputs(encoder, seed)
    composite = LayerMapComposite([
        (nn.Conv2d, ZPlus(stabilizer=lambda z: torch.where(z == 0, torch.inf, z), zero_params="bias")),
        (nn.ReLU, Pass()), (nn.AvgPool2d, Norm(stabilizer=0.01))])
    with composite.context(encoder) as changed:
        leaf = images.clone().requires_grad_()
        expected, = torch.autograd.grad(changed(leaf), leaf, relevance)
    actual = to_pixels(encoder, images, relevance)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * max(1, expected.abs().max().item()))


# -- residual blocks -----------------------------------------------------------------------------------------------


def forward_written_out(layers, x):
    """The inputs of every layer, and last the output; of a residual block, body(x) + shortcut(x)"""
    trace = [x]
    for layer in layers:
        if isinstance(layer, Residual):
            x = forward_written_out(layer.body, x)[-1] + forward_written_out(layer.shortcut, x)[-1]
        else:
            x = oracle.encoder_forward([layer], x)[-1]
        trace.append(x)
    return trace


def rule_written_out(layers, trace, relevance, eps):
    """The sum rule at the shortcut, y = body(x) + shortcut(x), each part on to x; the oracle's rules elsewhere"""
    for layer, x, y in reversed(list(zip(layers, trace[:-1], trace[1:], strict=True))):
        if isinstance(layer, Residual):
            arrived = np.zeros_like(x)
            for branch in (layer.body, layer.shortcut):
                inner = forward_written_out(branch, x)
                part = np.zeros_like(y)
                for where in np.ndindex(y.shape):
                    part[where] = oracle.share(inner[-1][where], y[where], eps) * relevance[where]
                arrived += rule_written_out(branch, inner, part, eps)
            relevance = arrived
        else:
            relevance = oracle.encoder_rule([layer], [x, y], relevance, eps)
    return relevance


@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_residual_blocks_follow_the_sum_rule(eps):
    encoder = make(residual, seed=2)
    images, features, relevance = inputs(encoder, side=8)
    actual = to_pixels(encoder, images, relevance, eps)
    for b in range(2):
        trace = forward_written_out(encoder, images[b].numpy())
        np.testing.assert_allclose(trace[-1], features[b].numpy(), rtol=0, atol=1e-12)
        expected = rule_written_out(encoder, trace, relevance[b].numpy(), eps)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(actual[b].numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("architecture", "biased"), [(vgg_like, False), (strided, False), (average_pooled, False),
                                                     (residual, False), (vgg_like, True), (average_pooled, True)])
def test_relevance_is_conserved_without_eps(architecture, biased):
    """Biases take nothing in the z⁺ rule, unless z = 0 (as in the others' few channels), and ε nothing when it is 0"""
    encoder = make(architecture, seed=1, biased=biased)
    images, _, relevance = inputs(encoder)
    for eps, tolerance in ((0, 1e-9), (1e-9, 1e-4)):
        pixels = to_pixels(encoder, images, relevance, eps)
        torch.testing.assert_close(pixels.sum((1, 2, 3)), relevance.sum((1, 2, 3)), rtol=0, atol=tolerance)


def test_no_relevance_passes_where_only_the_bias_contributes():
    """z = 0 with y = b: a kernel without positive weights after a ReLU"""
    conv = nn.Conv2d(2, 2, 1).double()
    with torch.no_grad():
        conv.weight[:] = torch.tensor([[[[-1.0]], [[-2.0]]], [[[1.0]], [[-3.0]]]])
        conv.bias[:] = torch.tensor([50.0, 0.5])
    encoder = nn.Sequential(nn.ReLU(), conv, nn.ReLU())
    images = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    relevance = torch.where(encoder(images) > 0, 1.0, 0.0).double()
    assert (relevance[:, 0] == 1).all() and relevance[:, 1].any()
    pixels = to_pixels(encoder, images, relevance)
    torch.testing.assert_close(pixels[:, 0], relevance[:, 1], rtol=0, atol=1e-12)
    assert not pixels[:, 1].any()


# -- the named encoders --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_resnet_with_batch_norm_folded_equals_torchvision():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet50(weights=None).double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        expected = stage(expected)
    encoder = encoders._plain_sequence(model).eval()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@torch.no_grad()
def test_vgg16_equals_torchvision():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.vgg16(weights=None, init_weights=False).eval()
    images = torch.randn(1, 3, 64, 64)
    encoder = encoders._plain_sequence(model)
    expected = model.features[:-1](images)
    assert expected.shape == (1, 512, 4, 4) and encoders.feature_dim(encoder) == 512
    torch.testing.assert_close(encoder(images), expected)
