"""Equations that several models use, in plain PyTorch."""
import torch


def lstm_products(parameters, more=((), (), ())):
    """The weights of an LSTM's two products: those of its gates i, f, o and of its candidate.

    parameters: weight_ih, weight_hh, bias_ih, bias_hh. more: of another gate with the same inputs
    and states, whose rows follow. Returns two lists [weight of the inputs, weight of the states,
    bias]. (Relevance does not pass through gates: with a product of its own it need not travel
    through their weights.)
    """
    weight_ih, weight_hh, bias_ih, bias_hh = parameters
    gates = []
    candidate = []
    for parameter, rows in zip((weight_ih, weight_hh, bias_ih + bias_hh), more, strict=True):
        i, f, g, o = parameter.chunk(4)
        gates.append(torch.cat([i, f, o, *rows]))
        candidate.append(g)
    return gates, candidate


def lstm_cell(i, f, o, g, c):
    """One LSTM step: gates i, f, o, the candidate g before its tanh, and the cell state c -> h, c.

    All have the shape (..., d)."""
    c = f * c + i * g.tanh()
    return o * c.tanh(), c


def region_mean(x, mask):
    """The mean (B, d) of x (B, K, d) over its regions.

    mask (B, K) bool is False at padding; None: there is no padding."""
    if mask is None:
        return x.mean(1)
    weights = mask.to(x.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (weights[:, None] @ x).squeeze(1)
