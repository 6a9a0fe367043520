"""Encoders: relevance from features to pixels, against zennit and literal loops; their weights."""
import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close
from torch import nn
from torchvision import models

from captioning.errors import InputError
from captioning.explanation import encoders
from captioning.explanation.encoders import Residual
from captioning.explanation.rules import LRP


def conv(channels_in, channels, kernel=3, stride=1, padding=1, **options):
    return nn.Conv2d(channels_in, channels, kernel, stride, padding, **options)


def vgg_like():
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6), nn.ReLU(), nn.MaxPool2d(2),
                         conv(6, 8), nn.ReLU(), conv(8, 8), nn.ReLU())


def strided():
    return nn.Sequential(conv(3, 6, 5, 2, 2), nn.MaxPool2d(3, 2, padding=1), nn.ReLU(),
                         conv(6, 6, groups=2), nn.ReLU(), conv(6, 8, padding=2, dilation=2))


def signed_groups():
    """No ReLU between the convolutions: the second, of two groups, sees both signs"""
    return nn.Sequential(conv(3, 6), conv(6, 8, stride=2, groups=2), nn.ReLU())


def average_pooled():
    return nn.Sequential(conv(3, 6), nn.AvgPool2d(2), conv(6, 6), nn.ReLU(),
                         nn.AvgPool2d(3, stride=2, padding=1))


def residual():
    """Blocks as in ResNet, their shortcut a convolution or the identity"""
    def block(shortcut, stride):
        return Residual(nn.Sequential(conv(4, 3, 1, padding=0), nn.ReLU(), conv(3, 3, 3, stride),
                                      nn.ReLU(), conv(3, 4)), nn.Sequential(*shortcut))
    return nn.Sequential(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2),
                         block([conv(4, 4, 1, 2, 0)], 2), nn.ReLU(), block([], 1), nn.ReLU())


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
    factors = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    return images, features, features * factors


def to_pixels(encoder, images, relevance, eps=0.01):
    """R = x r(x): the rules' derivatives take r = R / features to the pixels"""
    images = images.clone().requires_grad_()
    with LRP(eps):
        features = encoder(images)
    r = torch.where(features == 0, 0, relevance / features).detach()
    return images.detach() * torch.autograd.grad(features, images, r)[0]


# -- relevance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [vgg_like, strided, signed_groups, average_pooled])
@pytest.mark.parametrize("seed", range(3))
def test_zennit_agrees(architecture, seed):
    """zennit's ZPlus treats negative inputs as docs/method.md, section 5 (W⁻x⁻ beside W⁺x⁺).

    The positive part of the bias, which it adds to the denominator, and its stabiliser are 0. Its
    Norm is the sum rule of average-pooling."""
    pytest.importorskip("zennit")
    from zennit.composites import LayerMapComposite
    from zennit.rules import Norm, Pass, ZPlus

    encoder = make(architecture, seed)
    images, features, relevance = inputs(encoder, seed)
    z_plus = ZPlus(stabilizer=lambda z: torch.where(z == 0, torch.inf, z), zero_params="bias")
    composite = LayerMapComposite([
        (nn.Conv2d, z_plus), (nn.ReLU, Pass()), (nn.AvgPool2d, Norm(stabilizer=0.01))])
    with composite.context(encoder) as changed:
        leaf = images.clone().requires_grad_()
        expected, = torch.autograd.grad(changed(leaf), leaf, relevance)
    largest = expected.abs().max().item()
    assert largest > 1e-3
    assert_close(to_pixels(encoder, images, relevance), expected, 1e-12 * max(1, largest))


@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_residual_blocks_follow_the_sum_rule(eps):
    encoder = make(residual, seed=2)
    images, features, relevance = inputs(encoder, side=8)
    actual = to_pixels(encoder, images, relevance, eps)
    for b in range(2):
        trace = oracle.encoder_forward(encoder, images[b].numpy())
        assert_close(features[b], torch.from_numpy(trace[-1]))
        expected = oracle.encoder_rule(encoder, trace, relevance[b].numpy(), eps)
        assert np.abs(expected).max() > 1e-3
        assert_close(actual[b], torch.from_numpy(expected), 1e-9)


@pytest.mark.parametrize(("architecture", "biased"), [
    (vgg_like, False), (strided, False), (average_pooled, False), (residual, False),
    (vgg_like, True), (average_pooled, True)])
@pytest.mark.parametrize(("eps", "tolerance"), [(0, 1e-9), (1e-9, 1e-4)])
def test_relevance_is_conserved_without_eps(architecture, biased, eps, tolerance):
    """Biases take nothing in the z⁺ rule, unless z = 0 (as in the others' few channels)"""
    encoder = make(architecture, seed=1, biased=biased)
    images, _, relevance = inputs(encoder)
    pixels = to_pixels(encoder, images, relevance, eps)
    assert_close(pixels.sum((1, 2, 3)), relevance.sum((1, 2, 3)), tolerance)


def test_no_relevance_passes_where_only_the_bias_contributes():
    """z = 0 with y = b: a kernel without positive weights after a ReLU"""
    layer = nn.Conv2d(2, 2, 1).double()
    layer.weight.data[:, :, 0, 0] = torch.tensor([[-1.0, -2.0], [1.0, -3.0]])
    layer.bias.data[:] = torch.tensor([50.0, 0.5])
    encoder = nn.Sequential(nn.ReLU(), layer, nn.ReLU())
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 2, 3, 3, generator=generator, dtype=torch.float64) + 0.1
    relevance = (encoder(images) > 0).double()
    assert (relevance[:, 0] == 1).all() and relevance[:, 1].any()
    pixels = to_pixels(encoder, images, relevance)
    assert_close(pixels[:, 0], relevance[:, 1])
    assert not pixels[:, 1].any()


# -- weights ---------------------------------------------------------------------------------------


def vgg16_without_classifier():
    """torchvision's VGG16 with random weights, without the 124 million of its classifier."""
    with torch.device("meta"):
        model = models.vgg16()
    del model.classifier
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_weights_from_a_file(tmp_path, name):
    """The encoder, its batch-norm folded, computes what torchvision's does."""
    torch.manual_seed(0)
    model = (vgg16_without_classifier() if name == "vgg16" else models.resnet50()).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
    state = model.state_dict() | {"classifier.6.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "weights.pth")
    encoder = encoders.build(name, tmp_path / "weights.pth").eval()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())
    body = model.features[:-1] if name == "vgg16" else nn.Sequential(*list(model.children())[:-2])
    images = torch.randn(1, 3, 64, 64).double()
    expected = body.double()(images)
    # weights are folded in single precision
    assert_close(encoder.double()(images), expected, 1e-5 * expected.abs().max().item())
    assert encoders.feature_dim(encoder) == expected.shape[1] == {"vgg16": 512}.get(name, 2048)


def test_half_precision_weights_without_a_classifier(tmp_path):
    state = {key: value.half() for key, value in vgg16_without_classifier().state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    encoder = encoders.build("vgg16", tmp_path / "weights.pth")
    assert torch.equal(encoder[0].weight, state["features.0.weight"].float())


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = vgg16_without_classifier().state_dict()
    without = {key: value for key, value in state.items() if key != "features.28.weight"}
    other = state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    for expected, content in (("'features.28.weight'", without), ("'features.0.weight'", other),
                              ("state_dict", [1, 2])):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=expected):
            encoders.build("vgg16", tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"missing\.pth"):
        encoders.build("vgg16", tmp_path / "missing.pth")
    with pytest.raises(InputError, match="vgg11"):
        encoders.build("vgg11")
