"""The gradient methods against plain autograd on the models' logits, and against captum."""
import copy

import pytest
import torch
from helpers import MODEL_TYPES, MODELS, assert_close
from helpers import make as make_model
from torch import nn
from torch.nn import functional as F

from captioning.explanation.encoders import Residual
from captioning.explanation.rules import Guided

T = 4
CAPTIONS = torch.tensor([[1, 7, 3, 3, 2], [1, 4, 2, 0, 0]])
WORDS = (CAPTIONS[:, 1:] != 0).nonzero().tolist()


class GuidedReLU(torch.autograd.Function):
    """max(z, 0), passing back only where z > 0 and only what is positive"""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        z, = ctx.saved_tensors
        return gradient * (z > 0) * (gradient > 0)


def average_pooled():
    """An encoder of 12×8 pixels to 3×2 regions."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))


def mobile():
    """An encoder of 12×8 pixels to 3×2 regions, with depthwise convolutions and ReLU6."""
    block = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
                          nn.ReLU6(), nn.Conv2d(8, 4, 1))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU6(), Residual(block, nn.Sequential()),
                         nn.Conv2d(4, 5, 2, 2), nn.ReLU6())


class Sum(nn.Module):
    """An encoder and, as one number an image, the weighted sum of its features."""

    def __init__(self, encoder, weight):
        """With a ReLU and a ceiling for each ReLU6, which captum does not guide."""
        super().__init__()
        self.encoder, self.weight = copy.deepcopy(encoder), weight
        for parent in list(self.encoder.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, nn.ReLU6):
                    setattr(parent, name, nn.Sequential(nn.ReLU(), nn.Threshold(-1, 0),
                                                        nn.Hardtanh(-1, 6)))

    def forward(self, images):
        return (self.encoder(images).flatten(2).transpose(1, 2) * self.weight).sum((1, 2))


def inputs(encoder=average_pooled):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 12, 8) if encoder else (2, 6, 7)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def plain(model, images):
    """Autograd of model(images, CAPTIONS)[b, t, w]: {(b, t): (∂/∂images[b], Σ_e ∂/∂E[w_i])}"""
    embedding = model.embedding(CAPTIONS[:, :-1]).detach().requires_grad_()
    images = images.clone().requires_grad_()
    with model.embedding.register_forward_hook(
            lambda module, inputs, output: embedding.view_as(output)):
        logits = model(images, CAPTIONS)
    result = {}
    for b, t in WORDS:
        to_images, to_words = torch.autograd.grad(
            logits[b, t, CAPTIONS[b, t + 1]], (images, embedding), retain_graph=True)
        result[b, t] = to_images[b], to_words[b].sum(-1)
    return result


def assert_agrees(explanation, model, images):
    """Words, features, pixels if they are gradients, and zeros at padding."""
    of_features = plain(model, model.encode(images).detach())
    of_images = plain(model, images) if images.dim() == 4 else {}
    for (b, t), (features, words) in of_features.items():
        assert_close(explanation.words[b, t], words)
        assert words.abs().max() > 1e-4
        assert not explanation.words[b, t, t + 1:].any()
        assert_close(explanation.features[b, t], features)
        if explanation.pixels is not None and explanation.pixels.shape[2] == 3:
            assert_close(explanation.pixels[b, t], of_images[b, t][0])
    padding = CAPTIONS[:, 1:] == 0
    for name in ("words", "features", "pixels", "attention", "targets", "beta"):
        if getattr(explanation, name) is not None:
            assert not getattr(explanation, name)[padding].any()
    assert_close(explanation.logits[~padding], model(images, CAPTIONS).detach()[~padding])
    return of_features


@pytest.fixture(params=MODEL_TYPES)
def model(request):
    return make_model(request.param, average_pooled)


def test_gradient_is_plain_autograd(model):
    assert_agrees(model.gradient(inputs(), CAPTIONS), model, inputs())


@MODELS
@pytest.mark.parametrize("method", ["gradient", "grad_cam"])
def test_gradient_at_region_features(model_type, method):
    model, features = make_model(model_type), inputs(None)
    explanation = getattr(model, method)(features, CAPTIONS)
    assert explanation.pixels is None
    assert_agrees(explanation, model, features)


def test_grad_cam(model):
    """ReLU(Σ_c weight_c f_c) upsampled, over its maximum; weight_c = mean over k of ∂p/∂f"""
    images = inputs()
    features = model.encode(images).detach()
    explanation = model.grad_cam(images, CAPTIONS)
    assert explanation.pixels.shape == (2, T, 1, 12, 8) and explanation.pixels.any()
    for (b, t), (gradient, _) in assert_agrees(explanation, model, images).items():
        cam = torch.zeros(6, dtype=torch.float64)
        for c in range(5):
            cam += gradient[:, c].mean() * features[b, :, c]
        cam = F.interpolate(cam.clamp(min=0).reshape(1, 1, 3, 2), size=(12, 8), mode="bilinear",
                            align_corners=False)[0]
        assert_close(explanation.pixels[b, t], cam / cam.max() if cam.max() > 0 else cam)


def test_guided_backprop_is_autograd_with_guided_relus(model, monkeypatch):
    explanation = model.guided_backprop(inputs(), CAPTIONS)
    unguided = model.gradient(inputs(), CAPTIONS)
    # those of the projections, and of nn.ReLU
    monkeypatch.setattr(torch, "relu", GuidedReLU.apply)
    monkeypatch.setattr(F, "relu", lambda z, inplace=False: GuidedReLU.apply(z))
    assert_agrees(explanation, model, inputs())
    assert not torch.allclose(explanation.pixels, unguided.pixels)
    assert not torch.allclose(explanation.features, unguided.features)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@MODELS
@pytest.mark.parametrize("encoder", [average_pooled, mobile])
@pytest.mark.parametrize("method", ["gradient", "guided_backprop"])
def test_captum_agrees_on_the_encoder(model_type, encoder, method):
    captum = pytest.importorskip("captum.attr")
    model = make_model(model_type, encoder)
    images = inputs() * 8
    features = model.encode(images)
    assert encoder is average_pooled or 0.02 < (features == 6).double().mean() < 0.5
    explanation = getattr(model, method)(images, CAPTIONS)
    assert explanation.pixels.any()
    of_method = {"gradient": captum.Saliency, "guided_backprop": captum.GuidedBackprop}[method]
    options = {"abs": False} if method == "gradient" else {}
    for b, t in WORDS:
        network = Sum(model.encoder, explanation.features[b, t])
        expected = of_method(network).attribute(images[b:b + 1].clone().requires_grad_(), **options)
        assert_close(explanation.pixels[b, t], expected[0].detach())


def test_only_a_hardtanh_that_is_a_relu_is_guided():
    z = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)
    r = torch.tensor([1.0, -1.0, -1.0, 1.0])
    for layer, expected in ((nn.Hardtanh(), [0, -1, -1, 0]), (nn.ReLU6(), [0, 0, 0, 1])):
        with Guided():
            y = layer(z)
        assert torch.equal(y, layer(z))
        assert torch.autograd.grad(y, z, r)[0].tolist() == expected


def test_guided_grad_cam_is_the_product(model):
    explanation = model.guided_grad_cam(inputs(), CAPTIONS)
    guided, cam = model.guided_backprop(inputs(), CAPTIONS), model.grad_cam(inputs(), CAPTIONS)
    assert explanation.pixels.shape == (2, T, 3, 12, 8)
    assert_close(explanation.pixels, guided.pixels * cam.pixels)
    assert explanation.pixels.any() and not explanation.pixels[CAPTIONS[:, 1:] == 0].any()
