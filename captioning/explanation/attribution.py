"""Explanations of captioning models: a forward pass under a rule, one backward pass for all words.

The targets are the logits p_t[captions[:, t + 1]] of all steps t, or their differences to the
logits of other words. Their derivatives under a rule of captioning.explanation.rules reach words
and features in one batched backward pass, and travel from there through the encoder
(docs/method.md, sections 4 to 6).
"""
import contextlib
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from captioning.explanation.rules import Gradient


class Trace(NamedTuple):
    """What a teacher-forced pass computes for N captions per image, of T steps each."""
    c_hat: torch.Tensor                 # (B, N, T, d) ĉ
    h: torch.Tensor                     # (B, N, T, d) the predictor's other summand
    hidden: torch.Tensor                # (B, N, T, d) their sum, the predictor's input
    attention: torch.Tensor             # (B, N, T, K), or (B, N, T, M, K) with M heads
    beta: torch.Tensor | None = None    # (B, N, T, 1) Ada-LSTM's sentinel weight


@dataclass
class Explanation:
    """How the inputs contributed to the word captions[:, t + 1] at every step t.

    Positive numbers support the word, negative ones oppose it. Padding positions are zero. If only
    the steps (B, S) were asked for, every field has S in place of the first T. A field that the
    method does not provide is None.
    """
    logits: torch.Tensor            # (B, T, V) teacher-forced
    targets: torch.Tensor           # (B, T) the explained logits, or differences of logits
    words: torch.Tensor | None      # (B, T, T) [b, t, i]: of the word read at step i ≤ t
    features: torch.Tensor | None   # (B, T, K, C) at the encoder's output
    pixels: torch.Tensor | None     # (B, T, 3, H, W), Grad-CAM (B, T, 1, H, W); None: no encoder
    attention: torch.Tensor         # (B, T, K), or (B, T, M, K) with M heads
    beta: torch.Tensor | None       # (B, T) Ada-LSTM's sentinel weight
    grid: tuple | None              # (h, w) of the K regions, row by row; None: no encoder

    # LRP splits `targets` into four summands (B, T); None for gradients and attention
    image: torch.Tensor | None = None       # the sum of `features`
    start: torch.Tensor | None = None       # words[..., 0], the word <start>
    previous: torch.Tensor | None = None    # the sum of words[..., 1:], the previous words
    rest: torch.Tensor | None = None        # what biases and ε absorb (and other heads, `head`)

    # (B, T) of words that consist of several pieces, each with logits; None: a word is one piece
    word_logits: torch.Tensor | None = None     # the sums of their pieces' logits
                                                # (with contrast, of the differences)
    word_log_p: torch.Tensor | None = None

    @property
    def conservation(self):
        """(B, T) LRP: the share of each logit that reached words and image, not biases and ε."""
        return torch.where(self.targets == 0, 0, 1 - self.rest / self.targets)

    def __mul__(self, other):
        """This explanation with the product of both pixel maps: Guided Grad-CAM."""
        pixels = None if self.pixels is None else self.pixels * other.pixels
        return replace(self, pixels=pixels)


@dataclass
class Derivatives(Explanation):
    """The derivatives of every target with respect to words, features and pixels, and their inputs.

    The field `words` (B, T, T, e) contains derivatives with respect to the embeddings.
    """
    embeddings: torch.Tensor | None = None      # (B, T, e)
    inputs: torch.Tensor | None = None          # (B, K, C) the features
    images: torch.Tensor | None = None          # (B, 3, H, W), or (B, K, C)

    def times_inputs(self):
        """LRP: the relevance R(x) = x r(x) of derivatives r."""
        words = torch.einsum("bsie,bie->bsi", self.words, self.embeddings)
        features = self.features * self.inputs[:, None]
        pixels = None if self.pixels is None else self.pixels * self.images[:, None]

        # the split of the targets
        image = features.sum((-2, -1))
        start = words[..., 0]
        previous = words[..., 1:].sum(-1)
        rest = self.targets - image - start - previous
        return self.explanation(words=words, features=features, pixels=pixels, image=image,
                                start=start, previous=previous, rest=rest)

    def summed(self):
        """Gradients: those of a word are summed over the entries of its embedding."""
        return self.explanation(words=self.words.sum(-1))

    def class_activation_map(self, pixels=True):
        """Grad-CAM (Selvaraju et al. 2017): ReLU(Σ_c weight_c f_c), weight_c the mean gradient of
        channel c; upsampled to the pixels of the image and divided by its maximum."""
        cam = None
        if pixels and self.grid:
            cam = torch.einsum("bsc,bkc->bsk", self.features.mean(2), self.inputs).relu()
            cam = F.interpolate(cam.unflatten(2, self.grid), size=self.images.shape[-2:],
                                mode="bilinear", align_corners=False)
            largest = cam.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)
            cam = (cam / largest)[:, :, None]
        return self.explanation(words=self.words.sum(-1), pixels=cam)

    def combined(self, weights):
        """The derivatives of weighted sums of the targets: derivatives are linear in them.

        weights (B, S, T), see `explain`."""
        changes = {}
        for name in ("targets", "words", "features", "pixels"):
            value = getattr(self, name)
            if value is not None:
                changes[name] = torch.einsum("bst,bt...->bs...", weights, value)
        return replace(self, **changes)

    def explanation(self, **changes):
        """An Explanation with these fields, but for the changes."""
        values = {field.name: getattr(self, field.name) for field in fields(Explanation)}
        return Explanation(**values | changes)


def explain(model, images, captions, rule=None, *, weights=None, contrast=None, steps=None,
            chunk=None, pixels=True, shared=None):
    """The Derivatives of all words' targets under a rule, by default ordinary derivatives.

    images (B, 3, H, W) or region features (B, K, C); captions (B, T+1).
    weights: function of captions and a dtype -> (B, T, T); step t explains the sum of all targets
    with the weights of row t (default: `own_targets`).
    contrast: id of a word, or ids (B, T): explains by how much each logit exceeds that word's.
    steps (B, S): explains the words at these steps alone.
    chunk: words that pass through the encoder at once; by default 1 on a CPU, else all.
    pixels=False stops at the encoder's output.
    shared: a dict, empty at first, that several calls with the same inputs and options pass on, all
    without steps: they do not repeat the passes that they have in common.
    ValueError if the model was created within torch.inference_mode().
    """
    rule = rule or Gradient()
    weights = weights or own_targets
    if shared is not None:
        return _shared(shared, model, images, captions, rule, weights, contrast, chunk, pixels)

    images, captions = _usable(model, images, captions)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        # the forward pass under the rule: encoder, decoder, logits of the captions' words
        images.requires_grad_(pixels and images.dim() == 4)
        maps, features = _encode(model, images, rule)
        features = features.detach().requires_grad_()
        embeddings, trace = _teacher_force(model, features, captions, rule)
        targets = _target_logits(model, trace, captions, contrast, rule)

        # one backward pass from all steps to words and features, then through the encoder
        weights = _at(weights(captions, targets.dtype), steps)               # (B, S, T)
        r_words, r_features = torch.autograd.grad(
            targets, (embeddings, features), weights.transpose(0, 1), is_grads_batched=True)
        r_pixels = None
        if images.requires_grad:
            r_maps = r_features.transpose(2, 3).unflatten(3, maps.shape[-2:])
            r_pixels = through_encoder(maps, images, r_maps, chunk).transpose(0, 1)

        targets = (weights @ targets.detach()[..., None])[..., 0]            # (B, S)
        return Derivatives(
            **_common(model, trace, captions, steps, maps), targets=targets, pixels=r_pixels,
            words=r_words.transpose(0, 1)[:, :, 0], features=r_features.transpose(0, 1),
            embeddings=embeddings[:, 0].detach(), inputs=features.detach(), images=images.detach())


def attention(model, images, captions, contrast=None, steps=None, **_):
    """The attention weights, without a backward pass.

    Returns an Explanation whose words, features and pixels are None."""
    images, captions = _usable(model, images, captions)
    with torch.inference_mode(False), torch.no_grad(), _frozen(model):
        maps, features = _encode(model, images, Gradient())
        _, trace = _teacher_force(model, features, captions, Gradient())
        targets = _target_logits(model, trace, captions, contrast, Gradient())
        targets = _at(targets * (captions[:, 1:] != 0), steps)
        return Explanation(**_common(model, trace, captions, steps, maps), targets=targets,
                           words=None, features=None, pixels=None)


# -- which targets are explained -------------------------------------------------------------------


def own_targets(captions, dtype):
    """(B, T, T) weights: each step explains its own target."""
    return torch.diag_embed((captions[:, 1:] != 0).to(dtype))


def differences(captions, dtype):
    """(B, T, T) weights: 1 for a step's own target, −1/n for the n steps with other words."""
    words = captions[:, 1:]
    is_word = words != 0
    is_other = (words[:, :, None] != words[:, None]) & is_word[:, :, None] & is_word[:, None]
    count = is_other.sum(-1, keepdim=True).clamp(min=1)
    return own_targets(captions, dtype) - is_other / count.to(dtype)


def minus_other_words(lrp, images, captions, steps=None, **options):
    """The relevance of each word minus the mean relevance of the caption's other words (section 4).

    lrp: the method `lrp` of a model. What belongs to words after step t is part of the rest."""
    result = lrp(images, captions, steps=steps, weights=differences, **options)
    position = torch.arange(result.words.shape[-1], device=captions.device)
    last = position if steps is None else steps
    words = result.words * (position <= last[..., None])
    previous = words[..., 1:].sum(-1)
    rest = result.rest + result.previous - previous
    return replace(result, words=words, previous=previous, rest=rest)


# -- the passes ------------------------------------------------------------------------------------


def _shared(shared, model, images, captions, rule, weights, contrast, chunk, pixels):
    """What `explain` returns, from the derivatives in `shared` if they are of the same rule."""
    key = type(rule), *vars(rule).items()
    kept = shared.get((key, True)) or shared.get((key, pixels))     # with pixels serves both
    if kept is None:
        shared.clear()      # the derivatives of one rule fill much memory
        kept = explain(model, images, captions, rule, contrast=contrast, chunk=chunk, pixels=pixels)
        shared[key, pixels] = kept
    return kept if weights is own_targets else kept.combined(weights(captions, kept.targets.dtype))


def _encode(model, images, rule):
    """The encoder's maps (B, C, h, w), or None for region features; and features (B, K, C)."""
    if images.dim() == 3:
        return None, images
    with rule:
        maps = model.encoder(images)
    return maps, maps.flatten(2).transpose(1, 2)


def _teacher_force(model, features, captions, rule):
    """The embeddings (B, 1, T, e) that the model read, and its Trace under a rule."""
    leaves = []

    def as_leaf(module, inputs, output):
        leaves.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return leaves[-1]

    # a model calls its embedding once, for all words
    with model.embedding.register_forward_hook(as_leaf), rule:
        trace = model.teacher_force(features, captions[:, None])
    embeddings, = leaves
    return embeddings, trace


def _target_logits(model, trace, captions, contrast, rule):
    """(B, T) the logits of the captions' words, less those of `contrast`.

    Each is one linear output, of one row of W_o or of the difference of two."""
    rows = model.W_o.weight[captions[:, 1:]]                                 # (B, T, d)
    bias = model.W_o.bias[captions[:, 1:]]
    if contrast is not None:
        rows = rows - model.W_o.weight[contrast]
        bias = bias - model.W_o.bias[contrast]
    with rule:
        return (trace.hidden[:, 0, :, None] @ rows[..., None])[..., 0, 0] + bias


def _common(model, trace, captions, steps, maps):
    """The fields of an Explanation that do not depend on the method, at the chosen steps."""
    result = {"logits": model.output(trace.hidden[:, 0]), "attention": trace.attention[:, 0],
              "beta": None if trace.beta is None else trace.beta[:, 0, :, 0]}
    is_word = captions[:, 1:] != 0                                           # (B, T)
    for name, value in result.items():
        if value is not None:
            mask = is_word.view(*is_word.shape, *[1] * (value.dim() - 2))
            result[name] = _at(value.detach() * mask, steps)
    return result | {"grid": None if maps is None else tuple(maps.shape[-2:])}


def _at(x, steps):
    """x (B, T, …) -> (B, S, …) at steps (B, S); x itself if they are None."""
    if steps is None:
        return x
    return x.take_along_dim(steps.view(*steps.shape, *[1] * (x.dim() - 2)), dim=1)


def through_encoder(maps, images, r_maps, chunk):
    """Derivatives r_maps (S, B, C, h, w) at the encoder's output -> (S, B, 3, H, W) at images."""
    # the caches of a CPU hold one word, and batched derivatives have an overhead of their own
    chunk = chunk or (1 if maps.device.type == "cpu" else len(r_maps))
    parts = r_maps if chunk == 1 else r_maps.split(chunk)
    r_images = [torch.autograd.grad(maps, images, part, retain_graph=True,
                                    is_grads_batched=chunk > 1)[0] for part in parts]
    return torch.stack(r_images) if chunk == 1 else torch.cat(r_images)


def _usable(model, images, captions):
    """images in the model's dtype and fastest format, and captions, both usable for derivatives."""
    if model.W_o.weight.is_inference():
        raise ValueError("the model was created within torch.inference_mode(): create it outside, "
                         "to explain it")
    images = fast_format(images.detach().to(model.W_o.weight.dtype))
    # tensors of inference mode cannot be saved for a backward pass
    with torch.inference_mode(False):
        return tuple(x.clone() if x.is_inference() else x for x in (images, captions))


def fast_format(images):
    """images (B, 3, H, W), on a CPU channels_last, which takes 2/3 to 3/4 of the time backwards."""
    if images.dim() == 4 and images.device.type == "cpu":
        return images.contiguous(memory_format=torch.channels_last)
    return images


@contextlib.contextmanager
def _frozen(model):
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
