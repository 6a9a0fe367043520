"""LRP-inference (docs/method.md, section 7): weights the predictor's input by its relevance for the predicted word."""
import torch
from torch.nn import functional as F

from captioning.explanation.rules import ratio
from captioning.recurrence import word_rows

EPS = 0.01


def stop_mask(model, stop_words):
    """bool (V,), True for the ids in the set `stop_words`, whose weights stay 1; a mask is returned unchanged."""
    if isinstance(stop_words, torch.Tensor):
        return stop_words
    mask = torch.zeros(len(model.W_o.weight), dtype=torch.bool)
    mask[sorted(stop_words)] = True
    return mask.to(model.W_o.weight.device)


def weights(model, c_hat, h, words, stop, eps=EPS):
    """Weights ω_c and ω_h (..., d), in [0, 2], of ĉ and h (..., d) for the predicted words (...), without gradient.

    With y = ĉ + h the ε-rule and the sum rule give R(ĉ) = ĉ/(y + ε sign y) · y W_o[w] · p[w]/(p[w] + ε sign p[w]), and
    the same for h. The last factor is a scalar, which cancels when R is divided by its maximum.
    """
    with torch.no_grad():
        shares = model.W_o.weight[words] * ratio(c_hat + h, eps)
        omegas = []
        for part in (c_hat, h):
            relevance = part * shares
            largest = relevance.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(relevance.dtype).tiny)
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
    return logits, model.W_o(dropout_mask * weighted_hidden(model, c_hat, h, logits.argmax(-1), stop, eps))


def lrp_inference(model, images, captions, stop_words, eps=EPS):
    """Teacher-forced logits p and weighted logits p̃: (B, T, V), or (B, N, T, V) for N captions per image."""
    is_single = captions.dim() == 2
    trace = model.teacher_force(model.encode(images), captions[:, None] if is_single else captions)
    pair = predict(model, trace.c_hat, trace.h, stop_mask(model, stop_words), eps)
    return tuple(logits[:, 0] if is_single else logits for logits in pair)


def lrp_loss(model, trace, captions, stop, weight=1.0, total=None):
    """CE(p, y) + weight · CE(p̃, y) of a teacher-forced trace -> (loss, correct words of p, words); total: number of
    words to divide by, default those of the captions.

    Where ω is 1, p̃ equals p, so that the second product with W_o is computed for the other words only.
    """
    rows = word_rows(captions)
    c_hat, h, hidden = (part.flatten(0, -2)[rows] for part in (trace.c_hat, trace.h, trace.hidden))    # (n, d)
    targets, dropout_mask = captions[..., 1:].flatten()[rows], model.dropout(torch.ones_like(hidden))
    logits = model.W_o(dropout_mask * hidden)                                          # (n, V)
    predicted, is_word = logits.argmax(-1), targets != 0
    is_weighted = is_word & ~stop[predicted]
    c_hat, h, part_mask = (x[is_weighted] for x in (c_hat, h, dropout_mask))
    weighted = model.W_o(part_mask * weighted_hidden(model, c_hat, h, predicted[is_weighted], stop))
    losses = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=0)
    loss = (losses * torch.where(is_weighted, 1, 1 + weight)).sum()
    loss = loss + weight * F.cross_entropy(weighted.float(), targets[is_weighted], reduction="sum")
    words = is_word.sum()
    return loss / (words if total is None else total), ((predicted == targets) & is_word).sum(), words
