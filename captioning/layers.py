"""Equations that several models use, in plain PyTorch."""
import torch


def lstm_products(parameters, more=((), (), ())):
    """The weights of an LSTM's two products: those of its gates i, f, o and of its candidate.

    parameters: weight_ih, weight_hh, bias_ih, bias_hh. more: three lists, of weights of the inputs,
    weights of the states and biases, of further gates, whose rows follow those of o. Returns two
    lists [weight of the inputs, weight of the states, bias]. (Relevance passes through the
    candidate alone. As it has a product of its own, the backward pass does not compute the gates'.)
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
