"""Explanations of both models: one forward pass under a rule, then one backward pass batched over all words.

The decoder's targets are the logits p_t[captions[:, t + 1]] of all steps t, or what they are above the logits of other
words (contrast). Their derivatives under the rule of captioning.relevance reach the embeddings and the features in one
batched pass, and go on from there through the encoder.
"""
import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from captioning import encoders
from captioning.relevance import LRP, PLAIN, Gradient, Guided


class Trace(NamedTuple):
    """What a teacher-forced pass leaves behind for N captions an image, of T steps each."""
    embeddings: torch.Tensor     # (B, N, T, e)
    c_hat: torch.Tensor          # (B, N, T, d) ĉ
    h: torch.Tensor              # (B, N, T, d) the predictor's other summand
    hidden: torch.Tensor         # (B, N, T, d) their sum, the predictor's input
    attention: torch.Tensor      # (B, N, T, K), or (B, N, T, M, K) with heads
    beta: torch.Tensor | None    # (B, N, T, 1), of Ada-LSTM


@dataclass
class Explanation:
    """How inputs spoke for (+) and against (−) the word captions[:, t + 1], at every step t; zero at padding."""
    logits: torch.Tensor            # (B, T, V) teacher-forced
    targets: torch.Tensor           # (B, T) the explained logits, or differences of logits
    words: torch.Tensor             # (B, T, T) of the word read at step i ≤ t, not normalised
    features: torch.Tensor          # (B, T, K, C) at the encoder's output
    pixels: torch.Tensor | None     # (B, T, 3, H, W), Grad-CAM (B, T, 1, H, W); None without an encoder
    attention: torch.Tensor         # (B, T, K), or (B, T, M, K) with heads
    beta: torch.Tensor | None       # (B, T) the sentinel's share, of Ada-LSTM

    @property
    def conservation(self):
        """(B, T) LRP: the share of each logit that reached words and image; biases and ε keep the rest."""
        arrived = self.words.sum(-1) + self.features.sum((-2, -1))
        return torch.where(self.targets == 0, 0, arrived / self.targets)


def encode(model, images, rule=PLAIN):
    """images (B, 3, H, W) -> features (B, K, C), K row by row; region features (B, K, C) pass as they are."""
    images = images.to(model.W_o.weight.dtype)
    if images.dim() == 3:
        return images
    maps, _ = encoders.run(model.encoder, images, rule)
    return maps.flatten(2).transpose(1, 2)


def forward(model, images, captions):
    """Logits (B, T, V) for captions (B, T+1), or (B, N, T, V) for captions (B, N, T+1)."""
    single = captions.dim() == 2
    hidden = model.teacher_force(encode(model, images), captions[:, None] if single else captions).hidden
    logits = model.output(hidden)
    return logits[:, 0] if single else logits


def region_mean(features, mask):
    """The mean (B, C) of features (B, K, C) over the regions that are there, mask (B, K) or None."""
    if mask is None:
        return features.mean(1)
    return (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def lrp(model, images, captions, eps=0.01, head=None, **options):
    r, logits, targets, trace = _derivatives(model, images, captions, LRP(eps, head), **options)
    # R(x) = x r(x)
    words = torch.einsum("btie,bie->bti", r.words, trace.embeddings[:, 0])
    features = r.features * r.at_features[:, None]
    pixels = None if r.pixels is None else r.pixels * images.detach().to(r.pixels.dtype)[:, None]
    return _explanation(captions, logits, targets, words, features, pixels, trace)


def gradient(model, images, captions, rule=None, **options):
    r, logits, targets, trace = _derivatives(model, images, captions, rule or Gradient(), **options)
    return _explanation(captions, logits, targets, r.words.sum(-1), r.features, r.pixels, trace)


def guided_backprop(model, images, captions, **options):
    return gradient(model, images, captions, Guided(), **options)


def grad_cam(model, images, captions, contrast=None, steps=None):
    r, logits, targets, trace = _derivatives(model, images, captions, Gradient(), contrast=contrast, to_pixels=False)
    pixels = None if images.dim() == 3 else _cam(r, images.shape[-2:], steps)
    return _explanation(captions, logits, targets, r.words.sum(-1), r.features, pixels, trace)


def guided_grad_cam(model, images, captions, contrast=None, steps=None, **options):
    result = guided_backprop(model, images, captions, contrast=contrast, steps=steps, **options)
    if result.pixels is not None:
        result.pixels = result.pixels * grad_cam(model, images, captions, contrast, steps).pixels
    return result


def _cam(r, size, steps=None):
    """ReLU(Σ_c weight_c f_c) upsampled to the image and divided by its maximum: (B, T, 1, H, W)."""
    weight = r.features.mean(2)                                                        # (B, T, C)
    if steps is not None:
        weight = weight.take_along_dim(steps[..., None], dim=1)                        # (B, S, C)
    cam = torch.einsum("btc,bkc->btk", weight, r.at_features).relu()
    cam = F.interpolate(cam.unflatten(2, r.grid), size=size, mode="bilinear", align_corners=False)
    return (cam / cam.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny))[:, :, None]


class _Derivatives(NamedTuple):
    words: torch.Tensor              # (B, T, T, e)
    features: torch.Tensor           # (B, T, K, C)
    pixels: torch.Tensor | None      # (B, T, 3, H, W)
    at_features: torch.Tensor        # (B, K, C) the features themselves
    grid: tuple | None               # (h, w) of the K regions


def _derivatives(model, images, captions, rule, chunk=None, contrast=None, steps=None, to_pixels=True):
    """Derivatives of all words' logits under `rule`; `chunk` words at a time go through the encoder, or, with steps
    (B, S), only the words at these steps: pixels are then (B, S, 3, H, W).

    contrast: id of a word, or ids (B, T): the logits less that word's are explained, as one output with the difference
    of the two rows of W_o. By default one word at a time on a CPU, whose caches hold no more, and all at once
    elsewhere.
    """
    images = fast_format(images.detach().to(model.W_o.weight.dtype))
    following = captions[:, 1:]                                                        # (B, T) the words explained
    with _frozen(model), torch.enable_grad():
        maps, grid = None, None
        if images.dim() == 4:
            images.requires_grad_(to_pixels)
            maps, _ = encoders.run(model.encoder, images, rule)
            grid = tuple(maps.shape[-2:])
        features = (images if maps is None else maps.flatten(2).transpose(1, 2)).detach().requires_grad_()
        trace = model.teacher_force(features, captions[:, None], rule)
        rows, bias = model.W_o.weight[following], model.W_o.bias[following]            # (B, T, d), (B, T)
        if contrast is not None:
            rows, bias = rows - model.W_o.weight[contrast], bias - model.W_o.bias[contrast]
        targets = rule.stabilise((rows * trace.hidden[:, 0]).sum(-1) + bias)
        one_word = torch.diag_embed((following != 0).to(targets.dtype)).transpose(0, 1)  # (T, B, T)
        r_words, r_features = torch.autograd.grad(targets, (trace.embeddings, features), one_word,
                                                  is_grads_batched=True)
        r_pixels = None
        if maps is not None and to_pixels:
            r_maps = r_features.transpose(2, 3).unflatten(3, grid)                     # (T, B, C, h, w)
            if steps is not None:
                r_maps = r_maps[steps.T, torch.arange(len(images), device=steps.device)]
            r_pixels = through_encoder(maps, images, r_maps, chunk).transpose(0, 1)
        logits = model.output(trace.hidden[:, 0]).detach()
    r = _Derivatives(r_words[:, :, 0].transpose(0, 1), r_features.transpose(0, 1), r_pixels, features.detach(), grid)
    return r, logits, targets.detach(), Trace(*(part if part is None else part.detach() for part in trace))


def fast_format(images):
    """On a CPU, channels_last: a backward pass takes 2/3 to 3/4 of the time."""
    if images.dim() == 4 and images.device.type == "cpu":
        return images.contiguous(memory_format=torch.channels_last)
    return images


def through_encoder(maps, images, r_maps, chunk):
    """Derivatives r_maps (T, B, C, h, w) at the encoder's output -> (T, B, 3, H, W) at the images."""
    chunk = chunk or (1 if maps.device.type == "cpu" else len(r_maps))
    if chunk == 1:      # without the batching of derivatives, which has a price of its own
        return torch.stack([torch.autograd.grad(maps, images, r, retain_graph=True)[0] for r in r_maps])
    return torch.cat([torch.autograd.grad(maps, images, part, retain_graph=True, is_grads_batched=True)[0]
                      for part in r_maps.split(chunk)])


@contextlib.contextmanager
def _frozen(model):
    """Without dropout, and without derivatives with respect to the weights."""
    training = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def _explanation(captions, logits, targets, words, features, pixels, trace):
    there = captions[:, 1:] != 0                                                       # (B, T)
    attention = trace.attention[:, 0]
    attention = attention * there.view(*there.shape, *[1] * (attention.dim() - 2))
    beta = None if trace.beta is None else trace.beta[:, 0, :, 0] * there
    return Explanation(logits * there[..., None], targets * there, words, features, pixels, attention, beta)
