"""LRP-inference (docs/method.md, section 7): weights the predictor's input by its relevance."""
import torch

from captioning.explanation.derivatives import ratio


def stop_mask(model, stop_words):
    """bool (V,), True for the ids in the set `stop_words`, whose weights stay 1."""
    mask = torch.zeros(len(model.W_o.weight), dtype=torch.bool)
    mask[sorted(stop_words)] = True
    return mask.to(model.W_o.weight.device)


def weights(model, c_hat, h, words, stop, eps=0.01):
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


def weighted_hidden(model, c_hat, h, words, stop, eps=0.01):
    """ω_c ⊙ ĉ + ω_h ⊙ h (..., d), the predictor's input."""
    omega_c, omega_h = weights(model, c_hat, h, words, stop, eps)
    return omega_c * c_hat + omega_h * h
