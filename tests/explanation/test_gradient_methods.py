"""The gradient methods against plain autograd on the models' logits, and against captum."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aoamodel import AOAModel
from gridTDmodel import GridTDModel

V, T = 12, 4
CAPTIONS = torch.tensor([[1, 7, 3, 3, 2], [1, 4, 2, 0, 0]])
WORDS = [(b, t) for b in range(2) for t in range(T) if CAPTIONS[b, t + 1] != 0]


class Features(nn.Module):
    """An encoder and, as one number an image, its features weighted"""

    def __init__(self, encoder, weight):
        super().__init__()
        self.encoder, self.weight = encoder, weight

    def forward(self, images):
        return (self.encoder(images).flatten(2).transpose(1, 2) * self.weight).sum((1, 2))


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


def make(model_type, with_encoder=True):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1),
                            nn.ReLU(), nn.AvgPool2d(2)) if with_encoder else None
    own = {"num_head": 2} if model_type is AOAModel else {"attention_dim": 5}
    model = model_type(V, 4, 6, encoder=encoder, feature_dim=7, **own).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def inputs(with_encoder=True):
    shape = (2, 3, 12, 8) if with_encoder else (2, 6, 7)              # 6×4 regions at 12×8 pixels halved twice: 3×2
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(model, images):
    """By autograd on model(images, captions)[b, t, w]: {(b, t): (∂/∂images[b], Σ_e ∂/∂E[w_i])}"""
    seen = []
    hook = model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(output) or output)
    images = images.clone().requires_grad_()
    logits = model(images, CAPTIONS)
    hook.remove()
    embeddings, = seen
    result = {}
    for b, t in WORDS:
        target = logits[b, t, CAPTIONS[b, t + 1]]
        to_images, to_words = torch.autograd.grad(target, (images, embeddings), retain_graph=True)
        result[b, t] = to_images[b], to_words.reshape(2, T, -1)[b].sum(-1)
    return result


def assert_words(explanation, model, expected):
    """Words, logits and zeros at padding"""
    for (b, t), (_, words) in expected.items():
        torch.testing.assert_close(explanation.words[b, t], words, rtol=0, atol=1e-12)
        assert words.abs().max() > 1e-4
        assert not explanation.words[b, t, t + 1:].any()
    padding = CAPTIONS[:, 1:] == 0
    for name in ("words", "features", "pixels", "attention", "targets", "beta"):
        if getattr(explanation, name) is not None:
            assert not getattr(explanation, name)[padding].any()


def regions(model, images):
    """The features at the encoder's output, (B, K, C)"""
    return images if model.encoder is None else model.encoder(images).flatten(2).transpose(1, 2).detach()


@pytest.fixture(params=[GridTDModel, AOAModel])
def model(request):
    return make(request.param)


# -- gradient ------------------------------------------------------------------------------------------------------


def test_gradient_is_plain_autograd(model):
    images = inputs()
    explanation = model.gradient(images, CAPTIONS)
    expected, of_features = plain(model, images), plain(model, regions(model, images))
    assert_words(explanation, model, expected)
    for b, t in WORDS:
        torch.testing.assert_close(explanation.pixels[b, t], expected[b, t][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(explanation.features[b, t], of_features[b, t][0], rtol=0, atol=1e-12)
    logits = model(images, CAPTIONS).detach()
    torch.testing.assert_close(explanation.logits[CAPTIONS[:, 1:] != 0], logits[CAPTIONS[:, 1:] != 0])


@pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
@pytest.mark.parametrize("method", ["gradient", "grad_cam"])
def test_gradient_at_region_features(model_type, method):
    model, features = make(model_type, with_encoder=False), inputs(with_encoder=False)
    explanation, expected = getattr(model, method)(features, CAPTIONS), plain(model, features)
    assert explanation.pixels is None
    assert_words(explanation, model, expected)
    for b, t in WORDS:
        torch.testing.assert_close(explanation.features[b, t], expected[b, t][0], rtol=0, atol=1e-12)


# -- Grad-CAM ------------------------------------------------------------------------------------------------------


def cam(features, gradient, grid, size):
    """ReLU(Σ_c weight_c f_c) upsampled, divided by its maximum; weight_c = mean over positions of ∂p/∂f"""
    weight = [gradient[:, c].mean() for c in range(features.shape[1])]
    result = sum(weight[c] * features[:, c] for c in range(features.shape[1])).clamp(min=0)
    result = F.interpolate(result.reshape(1, 1, *grid), size=size, mode="bilinear", align_corners=False)[0]
    return result / result.max() if result.max() > 0 else result


def test_grad_cam(model):
    images = inputs()
    features = regions(model, images)
    explanation, expected = model.grad_cam(images, CAPTIONS), plain(model, features)
    assert explanation.pixels.shape == (2, T, 1, 12, 8)
    assert_words(explanation, model, expected)
    maps = {(b, t): cam(features[b], expected[b, t][0], (3, 2), (12, 8)) for b, t in WORDS}
    assert any(one.any() for one in maps.values())
    for b, t in WORDS:
        torch.testing.assert_close(explanation.pixels[b, t], maps[b, t], rtol=0, atol=1e-12)
        torch.testing.assert_close(explanation.features[b, t], expected[b, t][0], rtol=0, atol=1e-12)


# -- guided backpropagation ----------------------------------------------------------------------------------------


def test_guided_backprop_is_autograd_with_guided_relus(model, monkeypatch):
    images = inputs()
    explanation, unguided = model.guided_backprop(images, CAPTIONS), model.gradient(images, CAPTIONS)
    monkeypatch.setattr(torch, "relu", GuidedReLU.apply)              # of the projections, and of nn.ReLU
    monkeypatch.setattr(F, "relu", lambda z, inplace=False: GuidedReLU.apply(z))
    expected, of_features = plain(model, images), plain(model, regions(model, images))
    assert_words(explanation, model, expected)
    for b, t in WORDS:
        torch.testing.assert_close(explanation.pixels[b, t], expected[b, t][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(explanation.features[b, t], of_features[b, t][0], rtol=0, atol=1e-12)
    assert not torch.allclose(explanation.pixels, unguided.pixels)
    assert not torch.allclose(explanation.features, unguided.features)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_captum_agrees_on_the_encoder(model):
    captum = pytest.importorskip("captum.attr")
    images = inputs()
    explanation = model.guided_backprop(images, CAPTIONS)
    assert explanation.pixels.any()
    for b, t in WORDS:
        guided = captum.GuidedBackprop(Features(model.encoder, explanation.features[b, t]))
        expected = guided.attribute(images[b:b + 1].clone().requires_grad_())
        torch.testing.assert_close(explanation.pixels[b, t], expected[0].detach(), rtol=0, atol=1e-12)


def test_guided_grad_cam_is_the_product(model):
    images = inputs()
    explanation, guided = model.guided_grad_cam(images, CAPTIONS), model.guided_backprop(images, CAPTIONS)
    assert explanation.pixels.shape == (2, T, 3, 12, 8)
    torch.testing.assert_close(explanation.pixels, guided.pixels * model.grad_cam(images, CAPTIONS).pixels)
    assert explanation.pixels.any() and not explanation.pixels[CAPTIONS[:, 1:] == 0].any()


# -- invariances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "guided_backprop", "guided_grad_cam"])
def test_batch_padding_mode_and_context_do_not_matter(model, method):
    images = inputs()
    expected = getattr(model, method)(images, CAPTIONS)
    model.train()
    with torch.no_grad():
        padded = getattr(model, method)(images[1:], F.pad(CAPTIONS[1:], (0, 2)))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name in ("words", "features", "pixels"):
        actual = getattr(padded, name)[0, :T]
        actual = actual[:, :T] if name == "words" else actual
        torch.testing.assert_close(actual, getattr(expected, name)[1], rtol=0, atol=1e-12)
