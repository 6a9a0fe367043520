"""LRP-inference (docs/method.md, section 7): weights the predictor's input by its relevance."""
import torch

from captioning.explanation.derivatives import ratio

EPS = 0.01


def stop_mask(model, stop_words):
    """bool (V,), True for the ids in the set `stop_words`, whose weights stay 1.

    A mask is returned unchanged."""
    if isinstance(stop_words, torch.Tensor):
        return stop_words
    mask = torch.zeros(len(model.W_o.weight), dtype=torch.bool)
    mask[sorted(stop_words)] = True
    return mask.to(model.W_o.weight.device)


def weights(model, c_hat, h, words, stop, eps=EPS):
    """Weights ω_c and ω_h (..., d), in [0, 2], of ĉ and h (..., d) for the predicted words (...).

    No gradient flows through them. With y = ĉ + h the ε-rule and the sum rule give
    R(ĉ) = ĉ/(y + ε sign y) · y W_o[w] · p[w]/(p[w] + ε sign p[w]), and the same for h. The last
    factor is a scalar, which cancels when R is divided by its maximum.
    """
    with torch.no_grad():
        shares = model.W_o.weight[words] * ratio(c_hat + h, eps)
        omegas = []
        for summand in (c_hat, h):
            relevance = summand * shares
            largest = relevance.abs().amax(-1, keepdim=True)
            largest = largest.clamp(min=torch.finfo(relevance.dtype).tiny)
            omegas.append(1 + (relevance / largest).masked_fill(stop[words][..., None], 0))
    return omegas


def weighted_hidden(model, c_hat, h, words, stop, eps=EPS):
    """ω_c ⊙ ĉ + ω_h ⊙ h (..., d), the predictor's input."""
    omega_c, omega_h = weights(model, c_hat, h, words, stop, eps)
    return omega_c * c_hat + omega_h * h


def predict(model, c_hat, h, stop, eps=EPS):
    """Logits p and p̃ (..., V) of ĉ and h (..., d), with the same dropout mask."""
    dropout_mask = model.dropout(torch.ones_like(h))
    logits = model.W_o(dropout_mask * (c_hat + h))
    hidden = weighted_hidden(model, c_hat, h, logits.argmax(-1), stop, eps)
    return logits, model.W_o(dropout_mask * hidden)


def lrp_inference(model, images, captions, stop_words, eps=EPS):
    """Teacher-forced logits p and weighted logits p̃.

    (B, T, V), or (B, N, T, V) for captions (B, N, T+1)."""
    is_single = captions.dim() == 2
    captions = captions[:, None] if is_single else captions
    trace = model.teacher_force(model.encode(images), captions)
    pair = predict(model, trace.c_hat, trace.h, stop_mask(model, stop_words), eps)
    return tuple(logits[:, 0] if is_single else logits for logits in pair)
