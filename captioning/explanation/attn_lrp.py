"""Rules for transformers: relevance that passes through attention weights, and γ in linear layers.
"""
import torch
import torch.nn.functional as F

from captioning.explanation.derivatives import Replace, away_from_zero, stabilised
from captioning.explanation.functions import halved, is_signal
from captioning.explanation.rules import LRP, Gamma, matmul


def softmax(rule, function, x, *args, **kwargs):
    """y = softmax(x): the ordinary derivative J; y − Jx is constant (Achtibat et al. 2024)."""
    y = function(x, *args, **kwargs)
    if rule.one is None:
        return y
    dim = kwargs.get("dim", args[0] if args else -1)
    a = y.detach()      # y − Jx is multiplied with 1, so that its relevance is measured
    ax = torch.where(a == 0, 0, a * x.detach())     # masked scores may be −∞
    return y + (a - ax + a * ax.sum(dim, keepdim=True)) * (rule.one - 1)


def half_matmul(rule, function, a, b):
    """z = a b: of two signals each has half of the relevance (Achtibat et al. 2024)."""
    if is_signal(a) and is_signal(b):
        return stabilised(halved(function(a, b)), rule.eps)
    return matmul(rule, function, a, b)


def gamma_linear(rule, function, x, weight, bias=None):
    """γ-rule for inputs of both signs, y_j = Σ_i W_ji x_i + b_j: summands of the sign of y_j count
    1 + γ times:  z_j = y_j + γ Σ_i (W_ji x_i)^±,  r(x_i) = Σ_j (1 or 1 + γ) W_ji r(y_j) y_j/z_j."""
    y = F.linear(x.detach(), weight, bias)
    raised = weight + rule.gamma * weight.clamp(min=0)
    lowered = weight + rule.gamma * weight.clamp(max=0)
    high = x.clamp(min=0)
    low = x - high
    bias = rule.measured(bias)
    z = torch.where(y > 0, F.linear(high, raised, bias) + F.linear(low, lowered),
                    F.linear(high, lowered, bias) + F.linear(low, raised))
    return Replace.apply(z, y, y / away_from_zero(z.detach(), rule.eps).masked_fill(z == 0, 1))


class AttnLRP(LRP):
    """LRP that passes through attention weights (Achtibat et al. 2024)."""
    table = LRP.table | {"softmax": softmax, "matmul": half_matmul, "mm": half_matmul,
                         "bmm": half_matmul}


class GammaLinear(Gamma):
    """LRP with the γ-rule in linear layers, for image encoders that are transformers."""
    table = LRP.table | {"linear": gamma_linear}


class AttnGammaLinear(Gamma):
    """AttnLRP with the γ-rule in linear layers."""
    table = AttnLRP.table | {"linear": gamma_linear}
