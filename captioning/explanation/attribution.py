"""Explanations of both models: one forward pass under a rule, then one backward pass batched over all words.

The targets are the logits p_t[captions[:, t + 1]] of all steps t, or their differences to the logits of other words. Their
derivatives under a rule of captioning.explanation.rules reach words and features in one batched pass, and travel from
there through the encoder. Steps, words and equations: docs/method.md, sections 4 to 6.
"""
import contextlib
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from captioning.explanation.rules import Gradient


@dataclass
class Explanation:
    """How the inputs contributed, positively or negatively, to the word captions[:, t + 1] at every step t.

    Padding positions are zero. If only the steps (B, S) were asked for, every field has S in place of the first T. A field
    that the method does not provide is None.
    """
    logits: torch.Tensor            # (B, T, V) teacher-forced
    targets: torch.Tensor           # (B, T) the explained logits, or differences of logits
    words: torch.Tensor | None      # (B, T, T) of the word read at step i ≤ t, not normalised
    features: torch.Tensor | None   # (B, T, K, C) at the encoder's output
    pixels: torch.Tensor | None     # (B, T, 3, H, W), Grad-CAM (B, T, 1, H, W); None without an encoder
    attention: torch.Tensor         # (B, T, K), or (B, T, M, K) with M heads
    beta: torch.Tensor | None       # (B, T) Ada-LSTM's sentinel weight
    grid: tuple | None              # (h, w) of the K regions, row by row; None without an encoder
    # LRP splits `targets` into four summands, all (B, T) (docs/method.md, section 4); None for gradients and attention
    image: torch.Tensor | None = None       # the sum of `features`
    start: torch.Tensor | None = None       # words[..., 0], the word <start>
    previous: torch.Tensor | None = None    # the sum of words[..., 1:], the caption's words before the explained one
    rest: torch.Tensor | None = None        # what biases and ε absorb, and for some options more

    @property
    def conservation(self):
        """(B, T) LRP: the share of each logit that reached words and image; biases and ε absorb the rest."""
        return torch.where(self.targets == 0, 0, 1 - self.rest / self.targets)

    def __mul__(self, other):
        """This explanation with the product of both pixel maps: Guided Grad-CAM."""
        return replace(self, pixels=None if self.pixels is None else self.pixels * other.pixels)


@dataclass
class Derivatives(Explanation):
    """The derivatives of every target with respect to words, features and pixels, and the values that they belong to.

    `words` are derivatives with respect to the embeddings, (B, T, T, e)."""
    embeddings: torch.Tensor | None = None      # (B, T, e)
    inputs: torch.Tensor | None = None          # (B, K, C) features
    images: torch.Tensor | None = None          # (B, 3, H, W), or (B, K, C)

    def times_inputs(self):
        """The relevance R(x) = x r(x) of derivatives r under an LRP rule."""
        words = torch.einsum("bsie,bie->bsi", self.words, self.embeddings)
        features = self.features * self.inputs[:, None]
        image = features.sum((-2, -1))
        start = words[..., 0]
        previous = words[..., 1:].sum(-1)
        return self.explanation(
            words=words, features=features, pixels=None if self.pixels is None else self.pixels * self.images[:, None],
            image=image, start=start, previous=previous, rest=self.targets - image - start - previous)

    def summed(self):
        """Gradients: those of a word summed over the entries of its embedding."""
        return self.explanation(words=self.words.sum(-1))

    def class_activation_map(self):
        """Grad-CAM (Selvaraju et al. 2017): ReLU(Σ_c weight_c f_c) upsampled to the image and divided by its maximum;
        weight_c is the mean gradient of channel c."""
        cam = None
        if self.grid:
            cam = torch.einsum("bsc,bkc->bsk", self.features.mean(2), self.inputs).relu().unflatten(2, self.grid)
            cam = F.interpolate(cam, size=self.images.shape[-2:], mode="bilinear", align_corners=False)
            cam = (cam / cam.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny))[:, :, None]
        return self.explanation(words=self.words.sum(-1), pixels=cam)

    def combined(self, weights):
        """The derivatives of other targets: sums of these with weights (B, S, T), as derivatives are linear."""
        return replace(self, **{name: None if getattr(self, name) is None else torch.einsum(
            "bst,bt...->bs...", weights, getattr(self, name)) for name in ("targets", "words", "features", "pixels")})

    def explanation(self, **changes):
        """An Explanation with these fields, but for the changes."""
        values = {field.name: getattr(self, field.name) for field in fields(Explanation)}
        return Explanation(**values | changes)


def explain(model, images, captions, rule=None, *, weights=None, contrast=None, steps=None, chunk=None, pixels=True,
            shared=None):
    """The Derivatives of the targets of all words under a rule, by default ordinary ones.

    images (B, 3, H, W) or region features (B, K, C); captions (B, T+1). weights: function of captions and a dtype that
    returns (B, T, T); row t weights the targets whose sum is explained at step t (default: the target of step t alone).
    contrast: id of a word, or ids (B, T): explains by how much each logit exceeds that word's. steps (B, S): explains the
    words at these steps alone. chunk: words that pass through the encoder at once; by default 1 on a CPU, whose caches hold
    no more, else all. pixels=False stops at the encoder's output. shared: a dict, empty at first, which several calls with
    the same inputs and options pass on, without steps: they do not repeat the passes that they have in common.
    ValueError if the model was created within torch.inference_mode()."""
    rule = rule or Gradient()
    weights = weights or own_targets
    if shared is not None:
        key = type(rule), *(vars(rule).items())
        kept = shared.get((key, True)) or shared.get((key, pixels))
        if kept is None:
            shared.clear()      # the derivatives of one rule fill much memory
            kept = shared[key, pixels] = explain(model, images, captions, rule, contrast=contrast, chunk=chunk,
                                                 pixels=pixels)
        return kept if weights is own_targets else kept.combined(weights(captions, kept.targets.dtype))

    images, captions = ordinary(model, images, captions)
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        images.requires_grad_(pixels and images.dim() == 4)
        maps, features = encode(model, images, rule)
        features = features.detach().requires_grad_()
        embeddings, trace = teacher_force(model, features, captions, rule)
        targets = target_logits(model, trace.hidden[:, 0], captions, contrast, rule)

        # one backward pass to words and features for all steps
        weights = at_steps(weights(captions, targets.dtype), steps)                    # (B, S, T)
        r_words, r_features = torch.autograd.grad(
            targets, (embeddings, features), weights.transpose(0, 1), is_grads_batched=True)
        r_pixels = None
        if images.requires_grad:
            r_maps = r_features.transpose(2, 3).unflatten(3, maps.shape[-2:])          # (S, B, C, h, w)
            r_pixels = through_encoder(maps, images, r_maps, chunk).transpose(0, 1)
        return Derivatives(
            **common_fields(model, trace, captions, steps, maps), targets=(weights @ targets.detach()[..., None])[..., 0],
            words=r_words.transpose(0, 1)[:, :, 0], features=r_features.transpose(0, 1), pixels=r_pixels,
            embeddings=embeddings[:, 0].detach(), inputs=features.detach(), images=images.detach())


def own_targets(captions, dtype):
    """(B, T, T) weights: each step explains its own target."""
    return torch.diag_embed((captions[:, 1:] != 0).to(dtype))


def minus_other_words(captions, dtype):
    """(B, T, T) weights: 1 for a step's own target, −1/n for those of the n steps where the caption has other words."""
    words = captions[:, 1:]
    is_other = (words[:, :, None] != words[:, None]) & (words[:, :, None] != 0) & (words[:, None] != 0)
    return own_targets(captions, dtype) - is_other / is_other.sum(-1, keepdim=True).clamp(min=1).to(dtype)


def without_later_words(explanation, steps=None):
    """An explanation by `minus_other_words` in which what belongs to words read after step t is part of the rest."""
    position = torch.arange(explanation.words.shape[-1], device=explanation.words.device)
    words = explanation.words * (position <= (position if steps is None else steps)[..., None])
    previous = words[..., 1:].sum(-1)
    rest = explanation.rest + explanation.previous - previous
    return replace(explanation, words=words, previous=previous, rest=rest)


def attention(model, images, captions, contrast=None, steps=None, **_):
    """The attention weights, without a backward pass: an Explanation whose words, features and pixels are None."""
    images, captions = ordinary(model, images, captions)
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        maps, features = encode(model, images, Gradient())
        _, trace = teacher_force(model, features, captions, Gradient())
        targets = target_logits(model, trace.hidden[:, 0], captions, contrast, Gradient())
        targets = at_steps(targets * (captions[:, 1:] != 0), steps)
        return Explanation(**common_fields(model, trace, captions, steps, maps), targets=targets, words=None, features=None,
                           pixels=None)


class Trace(NamedTuple):
    """What a teacher-forced pass computes for N captions per image, of T steps each."""
    c_hat: torch.Tensor                 # (B, N, T, d) ĉ
    h: torch.Tensor                     # (B, N, T, d) the predictor's other summand
    hidden: torch.Tensor                # (B, N, T, d) their sum, the predictor's input
    attention: torch.Tensor             # (B, N, T, K), or (B, N, T, M, K) with M heads
    beta: torch.Tensor | None = None    # (B, N, T, 1) Ada-LSTM's sentinel weight


def encode(model, images, rule):
    """The encoder's maps (B, C, h, w) under a rule, or None for region features, and features (B, K, C)."""
    if images.dim() == 3:
        return None, images
    with rule:
        maps = model.encoder(images)
    return maps, maps.flatten(2).transpose(1, 2)


def teacher_force(model, features, captions, rule):
    """The embeddings (B, 1, T, e) that the model read, at which backward passes end, and its Trace under a rule."""
    leaves = []

    def as_leaf(module, inputs, output):
        leaves.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return leaves[-1]

    with model.embedding.register_forward_hook(as_leaf), rule:
        trace = model.teacher_force(features, captions[:, None])
    embeddings, = leaves
    return embeddings, trace


def target_logits(model, hidden, captions, contrast, rule):
    """(B, T) the logits of the captions' words from the predictor's input (B, T, d), less those of `contrast`, each as one
    linear output: of one row of W_o, or the difference of two."""
    rows = model.W_o.weight[captions[:, 1:]]                                           # (B, T, d)
    bias = model.W_o.bias[captions[:, 1:]]
    if contrast is not None:
        rows = rows - model.W_o.weight[contrast]
        bias = bias - model.W_o.bias[contrast]
    with rule:
        return (hidden[..., None, :] @ rows[..., None])[..., 0, 0] + bias


def common_fields(model, trace, captions, steps, maps):
    """The fields of an Explanation that do not depend on the method, at the chosen steps."""
    mask = captions[:, 1:] != 0                                                        # (B, T)
    result = {"logits": model.output(trace.hidden[:, 0]), "attention": trace.attention[:, 0],
              "beta": None if trace.beta is None else trace.beta[:, 0, :, 0]}
    for name, value in result.items():
        if value is not None:
            result[name] = at_steps(value.detach() * mask.view(*mask.shape, *[1] * (value.dim() - 2)), steps)
    return result | {"grid": None if maps is None else tuple(maps.shape[-2:])}


def at_steps(x, steps):
    """x (B, T, …) -> (B, S, …) at steps (B, S); x itself if they are None."""
    return x if steps is None else x.take_along_dim(steps.view(*steps.shape, *[1] * (x.dim() - 2)), dim=1)


def through_encoder(maps, images, r_maps, chunk):
    """Derivatives r_maps (S, B, C, h, w) at the encoder's output -> (S, B, 3, H, W) at the images."""
    chunk = chunk or (1 if maps.device.type == "cpu" else len(r_maps))
    if chunk == 1:      # without batched derivatives, which have an overhead of their own
        return torch.stack([torch.autograd.grad(maps, images, r, retain_graph=True)[0] for r in r_maps])
    return torch.cat([torch.autograd.grad(maps, images, part, retain_graph=True, is_grads_batched=True)[0]
                      for part in r_maps.split(chunk)])


def ordinary(model, images, captions):
    """images in the model's dtype and the encoder's fastest memory format, captions: both usable for derivatives."""
    if model.W_o.weight.is_inference():
        raise ValueError("the model was created within torch.inference_mode(): create it outside, to explain it")
    images = fast_format(images.detach().to(model.W_o.weight.dtype))
    with torch.inference_mode(False):
        return tuple(x.clone() if x.is_inference() else x for x in (images, captions))


def fast_format(images):
    """images (B, 3, H, W), on a CPU in channels_last format, in which a backward pass takes 2/3 to 3/4 of the time."""
    if images.dim() == 4 and images.device.type == "cpu":
        return images.contiguous(memory_format=torch.channels_last)
    return images


@contextlib.contextmanager
def frozen(model):
    """Without dropout, and without derivatives with respect to the weights."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
