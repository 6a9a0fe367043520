"""LRP-inference (method.md, section 7): a predictor whose input is weighted by what spoke for the predicted word."""
import torch
from torch.nn import functional as F

from captioning.explanation.rules import ratio

EPS = 0.01


def stop_mask(model, stop_words):
    """bool (V,), True for the ids of the set `stop_words`, whose weights stay 1; a mask passes as it is."""
    if isinstance(stop_words, torch.Tensor):
        return stop_words
    mask = torch.zeros(len(model.W_o.weight), dtype=torch.bool)
    mask[sorted(stop_words)] = True
    return mask.to(model.W_o.weight.device)


def weights(model, c_hat, h, words, stop, eps=EPS):
    """ω_c and ω_h, (..., d) in [0, 2], of ĉ and h (..., d) for the predicted words (...); no gradient flows in.

    With y = ĉ + h the ε-rule and the sum rule give R(ĉ) = ĉ/(y + ε sign y) · y W_o[w] · p[w]/(p[w] + ε sign p[w]), and
    the same for h. The last factor is one number: it goes when R is divided by its maximum.
    """
    with torch.no_grad():
        shares = model.W_o.weight[words] * ratio(c_hat + h, eps)
        found = []
        for part in (c_hat, h):
            r = part * shares
            largest = r.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
            found.append(1 + (r / largest).masked_fill(stop[words][..., None], 0))
    return found


def weighted_hidden(model, c_hat, h, words, stop, eps=EPS):
    """ω_c ⊙ ĉ + ω_h ⊙ h (..., d), the predictor's input."""
    omega_c, omega_h = weights(model, c_hat, h, words, stop, eps)
    return omega_c * c_hat + omega_h * h


def predict(model, c_hat, h, stop, eps=EPS):
    """Logits p and p̃ (..., V) of ĉ and h (..., d), with the same units dropped in both."""
    kept = model.dropout(torch.ones_like(h))
    logits = model.W_o(kept * (c_hat + h))
    return logits, model.W_o(kept * weighted_hidden(model, c_hat, h, logits.argmax(-1), stop, eps))


def lrp_inference(model, images, captions, stop_words, eps=EPS):
    """Logits and weighted logits (B, T, V), or (B, N, T, V) for N captions an image, teacher-forced."""
    single = captions.dim() == 2
    trace = model.teacher_force(model.encode(images), captions[:, None] if single else captions)
    both = predict(model, trace.c_hat, trace.h, stop_mask(model, stop_words), eps)
    return tuple(logits[:, 0] if single else logits for logits in both)


def lrp_loss(model, trace, captions, stop, weight=1.0):
    """CE(p, y) + weight · CE(p̃, y) of a teacher-forced trace -> (loss, right words of p, words).

    Where ω is 1, p̃ is p: the second product of W_o is for the other words alone.
    """
    kept = model.dropout(torch.ones_like(trace.hidden))
    logits = model.W_o(kept * trace.hidden)                                            # (B, N, T, V)
    targets, predicted = captions[..., 1:], logits.argmax(-1)
    there = targets != 0
    changed = there & ~stop[predicted]
    part = [x[changed] for x in (trace.c_hat, trace.h, kept)]                          # (n, d)
    weighted = model.W_o(part[2] * weighted_hidden(model, *part[:2], predicted[changed], stop))
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none", ignore_index=0)
    loss = (losses * torch.where(changed, 1, 1 + weight).flatten()).sum()
    loss = loss + weight * F.cross_entropy(weighted.float(), targets[changed], reduction="sum")
    return loss / there.sum(), ((predicted == targets) & there).sum(), there.sum()
