"""Equations that both models use, in plain PyTorch."""
import torch


def gates_and_candidate(parameter, *others):
    """The rows of an LSTM's weight or bias (4d, …) for its gates i, f, o, followed by `others`; and those for g."""
    i, f, g, o = parameter.chunk(4)
    return torch.cat([i, f, o, *others]), g


def lstm_cell(i, f, o, g, c):
    """One LSTM step: gates i, f, o, the candidate's pre-activation g, and the cell state c, all (..., d) -> h, c."""
    c = f * c + i * g.tanh()
    return o * c.tanh(), c


def region_mean(x, mask):
    """The mean (B, d) of x (B, K, d) over its regions; mask (B, K) bool is False at padding, None without padding."""
    if mask is None:
        return x.mean(1)
    weights = mask.to(x.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (weights[:, None] @ x).squeeze(1)
