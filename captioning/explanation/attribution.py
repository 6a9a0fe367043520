"""Explanations of both models: one forward pass under a rule, then one backward pass batched over all words.

The decoder's targets are the logits p_t[captions[:, t + 1]] of all steps t, or their differences to the logits of other
words (contrast). Their derivatives under a rule of captioning.explanation.rules reach embeddings and features in one
batched pass, and travel from there through the encoder. Steps and words: docs/method.md, sections 4 to 6.
"""
import contextlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from captioning.explanation import encoders
from captioning.explanation.rules import LRP, PLAIN, Gradient, Guided


class Trace(NamedTuple):
    """What a teacher-forced pass computes for N captions per image, of T steps each."""
    embeddings: torch.Tensor     # (B, N, T, e)
    c_hat: torch.Tensor          # (B, N, T, d) ĉ
    h: torch.Tensor              # (B, N, T, d) the predictor's other summand
    hidden: torch.Tensor         # (B, N, T, d) their sum, the predictor's input
    attention: torch.Tensor      # (B, N, T, K), or (B, N, T, M, K) with M heads
    beta: torch.Tensor | None    # (B, N, T, 1) Ada-LSTM's sentinel weight


@dataclass
class Explanation:
    """How the inputs contributed, positively or negatively, to the word captions[:, t + 1] at every step t.

    Padding positions are zero. For the steps (B, S) alone if they were asked for: S in place of the first T of every
    field. A field that the method does not provide is None.
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


def encode(model, images, rule=PLAIN):
    """images (B, 3, H, W) -> features (B, K, C), K row by row; region features (B, K, C) are returned unchanged."""
    return _encode(model, images.to(model.W_o.weight.dtype), rule)[1]


def forward(model, images, captions):
    """Logits (B, T, V) for captions (B, T+1), or (B, N, T, V) for captions (B, N, T+1)."""
    single = captions.dim() == 2
    hidden = model.teacher_force(encode(model, images), captions[:, None] if single else captions).hidden
    logits = model.output(hidden)
    return logits[:, 0] if single else logits


def region_mean(features, mask):
    """The mean (B, C) of features (B, K, C) over the regions that are not padding, mask (B, K) or None."""
    if mask is None:
        return features.mean(1)
    return (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


# -- the methods: all take model, images (B, 3, H, W) or region features (B, K, C), and captions (B, T+1) -------------
#
# contrast: id of a word, or ids (B, T): explains by how much each logit exceeds that word's
# steps:    (B, S) explains the words at these steps alone
# chunk:    words that pass through the encoder at once; by default 1 on a CPU, whose caches hold no more, else all
# pixels:   False stops at the encoder's output
# shared:   a dict, empty at first, that is passed to several methods of the same inputs and options, without steps:
#           consecutive methods do not repeat the passes that they have in common


def lrp(model, images, captions, eps=0.01, head=None, **options):
    """Layer-wise relevance propagation (docs/method.md, sections 4 and 5) -> Explanation."""
    result, inputs = _explain(model, images, captions, LRP(eps, head), **options)
    # R(x) = x r(x)
    words = torch.einsum("btie,bie->bti", result.words, inputs.embeddings)
    features = result.features * inputs.features[:, None]
    pixels = None if result.pixels is None else result.pixels * inputs.images[:, None]
    image, start, previous = features.sum((-2, -1)), words[..., 0], words[..., 1:].sum(-1)
    split = {"image": image, "start": start, "previous": previous, "rest": result.targets - image - start - previous}
    return replace(result, words=words, features=features, pixels=pixels, **split)


def lrp_specific(model, images, captions, eps=0.01, steps=None, **options):
    """What is specific to a word: LRP of each word minus the mean of LRP of the caption's other words (section 4).

    Relevance is linear in the targets, so that it costs what `lrp` costs. -> Explanation, whose targets are differences
    of logits, too, and whose rest includes the relevance of words that are read after step t.
    """
    result = lrp(model, images, captions, eps, steps=steps, weights_of=_specific, **options)
    position = torch.arange(result.words.shape[-1], device=captions.device)
    words = result.words * (position <= (position if steps is None else steps)[..., None])
    previous = words[..., 1:].sum(-1)
    return replace(result, words=words, previous=previous, rest=result.rest + result.previous - previous)


def gradient(model, images, captions, rule=None, **options):
    """Derivatives of each logit, for words summed over the embedding (section 6) -> Explanation."""
    result, _ = _explain(model, images, captions, rule or Gradient(), **options)
    return replace(result, words=result.words.sum(-1))


def guided_backprop(model, images, captions, **options):
    """Guided backpropagation (Springenberg et al. 2015; section 6) -> Explanation."""
    return gradient(model, images, captions, Guided(), **options)


def grad_cam(model, images, captions, pixels=True, **options):
    """Grad-CAM at the encoder's output (Selvaraju et al. 2017; section 6) -> Explanation: pixels are
    ReLU(Σ_c weight_c f_c) upsampled to the image and divided by its maximum, weight_c the mean gradient of channel c.
    """
    result, inputs = _explain(model, images, captions, Gradient(), pixels=False, **options)
    cam = None
    if pixels and result.grid:
        weight = result.features.mean(2)                                               # (B, T, C)
        cam = torch.einsum("btc,bkc->btk", weight, inputs.features).relu().unflatten(2, result.grid)
        cam = F.interpolate(cam, size=images.shape[-2:], mode="bilinear", align_corners=False)
        cam = (cam / cam.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny))[:, :, None]
    return replace(result, words=result.words.sum(-1), pixels=cam)


def guided_grad_cam(model, images, captions, **options):
    """Guided backpropagation ⊙ Grad-CAM (section 6) -> Explanation; words and features are those of the former."""
    result = guided_backprop(model, images, captions, **options)
    if result.pixels is not None:
        result.pixels = result.pixels * grad_cam(model, images, captions, **options).pixels
    return result


def attention(model, images, captions, contrast=None, steps=None, **_):
    """The attention weights, without a backward pass -> Explanation whose words, features and pixels are None."""
    images, captions = _ordinary(model, images, captions)
    with torch.inference_mode(False), torch.no_grad(), _frozen(model):
        maps, features = _encode(model, images, Gradient())
        trace = model.teacher_force(features, captions[:, None], Gradient())
        targets = _targets(model, trace, captions, contrast, Gradient())
        targets = _at(targets * (captions[:, 1:] != 0), steps)
        return _explanation(model, trace, captions, targets, steps, None if maps is None else maps.shape[-2:])


class _Inputs(NamedTuple):
    """What the derivatives of an Explanation are taken at."""
    embeddings: torch.Tensor     # (B, T, e)
    features: torch.Tensor       # (B, K, C)
    images: torch.Tensor         # (B, 3, H, W), or (B, K, C)


def _own(captions, dtype):
    """(B, T, T), row t the weights of the targets whose weighted sum is explained at step t: 1 for its own target."""
    return torch.diag_embed((captions[:, 1:] != 0).to(dtype))


def _specific(captions, dtype):
    """(B, T, T) weights: 1 for a step's own target, −1/n for those of the n steps where the caption has other words."""
    words = captions[:, 1:]
    is_other = (words[:, :, None] != words[:, None]) & (words[:, :, None] != 0) & (words[:, None] != 0)
    return _own(captions, dtype) - is_other / is_other.sum(-1, keepdim=True).clamp(min=1).to(dtype)


def _explain(model, images, captions, rule, weights_of=_own, pixels=True, shared=None, **options):
    """(Explanation of derivatives under `rule`, with words (B, T, T, e); the _Inputs that they are taken at).

    weights_of: `_own`, or a function like it. shared: keeps the derivatives of the last rule alone."""
    if shared is None:
        return _derivatives(model, images, captions, rule, weights_of, pixels, **options)
    key = type(rule), *vars(rule).values()
    kept = shared.get((key, True)) or shared.get((key, pixels))
    if not kept:
        shared.clear()
        kept = shared[key, pixels] = _derivatives(model, images, captions, rule, _own, pixels, **options)
    result, inputs = kept
    if weights_of is not _own:      # derivatives are linear in the targets
        weights = weights_of(captions, result.targets.dtype)                           # (B, T, T)
        parts = {name: getattr(result, name) for name in ("targets", "words", "features", "pixels")}
        result = replace(result, **{name: part if part is None else torch.einsum("bst,bt...->bs...", weights, part)
                                    for name, part in parts.items()})
    return result, inputs


def _derivatives(model, images, captions, rule, weights_of, pixels, contrast=None, steps=None, chunk=None):
    """What `_explain` returns."""
    images, captions = _ordinary(model, images, captions)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        images.requires_grad_(pixels and images.dim() == 4)
        maps, features = _encode(model, images, rule)
        features = features.detach().requires_grad_()
        trace = model.teacher_force(features, captions[:, None], rule)
        targets = _targets(model, trace, captions, contrast, rule)
        weights = _at(weights_of(captions, targets.dtype), steps)                      # (B, S, T)
        r_words, r_features = (r.transpose(0, 1) for r in torch.autograd.grad(         # (B, S, 1, T, e), (B, S, K, C)
            targets, (trace.embeddings, features), weights.transpose(0, 1), is_grads_batched=True))
        r_pixels = None
        if images.requires_grad:
            r_maps = r_features.transpose(0, 1).transpose(2, 3).unflatten(3, maps.shape[-2:])  # (S, B, C, h, w)
            r_pixels = through_encoder(maps, images, r_maps, chunk).transpose(0, 1)
        grid = None if maps is None else tuple(maps.shape[-2:])
        targets = (weights @ targets.detach()[..., None])[..., 0]                      # (B, S)
        result = _explanation(model, trace, captions, targets, steps, grid, r_words[:, :, 0], r_features, r_pixels)
    return result, _Inputs(trace.embeddings[:, 0].detach(), features.detach(), images.detach())


def _ordinary(model, images, captions):
    """images in the model's dtype and the encoder's fastest memory format, captions: both usable for derivatives."""
    if model.W_o.weight.is_inference():
        raise ValueError("the model was created within torch.inference_mode(): create it outside, to explain it")
    images = fast_format(images.detach().to(model.W_o.weight.dtype))
    with torch.inference_mode(False):
        return tuple(x.clone() if x.is_inference() else x for x in (images, captions))


def _encode(model, images, rule):
    """The encoder's maps (B, C, h, w), or None for region features, and features (B, K, C)."""
    if images.dim() == 3:
        return None, images
    maps, _ = encoders.run(model.encoder, images, rule)
    return maps, maps.flatten(2).transpose(1, 2)


def _targets(model, trace, captions, contrast, rule):
    """(B, T) the logits of the captions' words, less those of `contrast`, as one output each: the difference of two
    rows of W_o."""
    following = captions[:, 1:]                                                        # (B, T) the words explained
    rows, bias = model.W_o.weight[following], model.W_o.bias[following]                # (B, T, d), (B, T)
    if contrast is not None:
        rows, bias = rows - model.W_o.weight[contrast], bias - model.W_o.bias[contrast]
    return rule.stabilise((rows * trace.hidden[:, 0]).sum(-1) + bias)


def _explanation(model, trace, captions, targets, steps, grid, words=None, features=None, pixels=None):
    """An Explanation of the parts: targets, words, features and pixels of the chosen steps, the others of all T steps.
    """
    caption_mask = captions[:, 1:] != 0                                                # (B, T)
    logits = model.output(trace.hidden[:, 0])
    beta = None if trace.beta is None else trace.beta[:, 0, :, 0]
    logits, weights, beta = (
        None if part is None else _at(part.detach() * caption_mask.view(*caption_mask.shape, *[1] * (part.dim() - 2)),
                                      steps) for part in (logits, trace.attention[:, 0], beta))
    return Explanation(logits, targets, words, features, pixels, weights, beta, grid)


def _at(x, steps):
    """x (B, T, …) -> (B, S, …) at steps (B, S); x itself if they are None."""
    return x if steps is None else x.take_along_dim(steps.view(*steps.shape, *[1] * (x.dim() - 2)), dim=1)


def fast_format(images):
    """images (B, 3, H, W), on a CPU in channels_last format, in which a backward pass takes 2/3 to 3/4 of the time."""
    if images.dim() == 4 and images.device.type == "cpu":
        return images.contiguous(memory_format=torch.channels_last)
    return images


def through_encoder(maps, images, r_maps, chunk):
    """Derivatives r_maps (S, B, C, h, w) at the encoder's output -> (S, B, 3, H, W) at the images."""
    chunk = chunk or (1 if maps.device.type == "cpu" else len(r_maps))
    if chunk == 1:      # without batched derivatives, which have an overhead of their own
        return torch.stack([torch.autograd.grad(maps, images, r, retain_graph=True)[0] for r in r_maps])
    return torch.cat([torch.autograd.grad(maps, images, part, retain_graph=True, is_grads_batched=True)[0]
                      for part in r_maps.split(chunk)])


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
