"""Equations that several models use, in plain PyTorch."""
import torch


def lstm_products(lstm, W_x=None, W_h=None):
    """The weights of an LSTM's two products: those of its gates i, f, o and of its candidate.

    lstm: nn.LSTMCell, or its parameters [weight_ih, weight_hh, bias_ih, bias_hh]. W_x, W_h: linear
    layers of the same inputs and states, whose rows follow those of the gates. Returns two lists
    [weight of the inputs, weight of the states, bias]. (Relevance does not pass through gates:
    with a product of its own it need not travel through their weights.)
    """
    if isinstance(lstm, torch.nn.LSTMCell):
        lstm = lstm.weight_ih, lstm.weight_hh, lstm.bias_ih, lstm.bias_hh
    gates = []
    candidate = []
    others = [[], [], []]
    if W_x is not None:         # further rows of the gates' product: the sentinel's gate
        others = [[W_x.weight], [W_h.weight], [W_x.bias + W_h.bias]]
    for parameter, other in zip((*lstm[:2], lstm[2] + lstm[3]), others, strict=True):
        i, f, g, o = parameter.chunk(4)
        gates.append(torch.cat([i, f, o, *other]))
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
