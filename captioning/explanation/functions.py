"""What the rules ask about functions of torch and tensors, and the marks that they set on results.

The equations are in captioning/explanation/rules.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from captioning.explanation.derivatives import Replace, WithoutRule, stabilised


def name_of(function):
    """The name of a function of torch: "add" of torch.add, Tensor.add_, x + y, y + x and x += y."""
    if function is F.max_pool2d:        # the name of this one is "fn"
        return "max_pool2d"
    name = getattr(function, "__name__", "")
    if name == "__get__":               # a property, such as Tensor.mT
        return function.__self__.__name__
    if name.startswith("__"):
        name = name.strip("_")
        if name[1:] in ("add", "sub", "mul", "matmul"):     # radd, iadd and so on
            return name[1:]
        return "div" if name in ("truediv", "itruediv", "idiv") else name
    return name.rstrip("_")


def is_signal(x):
    """Whether relevance passes through x: a tensor with derivatives that is no parameter."""
    return (isinstance(x, torch.Tensor) and x.requires_grad
            and not isinstance(x, nn.Parameter))


def carries_relevance(args):
    """Whether one of the arguments of a function, or of the tensors in lists, is a signal."""
    for arg in args:
        if carries_relevance(arg) if isinstance(arg, tuple | list) else is_signal(arg):
            return True
    return False


def linear_output(z, eps):
    """The output z of a linear layer, with its ε; a sum takes `without_eps`, and has its own."""
    y = stabilised(z, eps)
    y.without_eps = z
    return y


def as_gate(y):
    """y, marked as a bounded function of a signal: see `product`."""
    y.is_gate = True
    return y


def halved(y):
    """y, the product of two signals, with half of its derivative."""
    return Replace.apply(y, y.detach(), y.new_tensor(0.5))


def is_in_place(function, kwargs):
    """Whether a function changes its first argument: x.relu_(), x += y, F.relu(x, inplace=True)."""
    name = getattr(function, "__name__", "")
    is_operator = name.startswith("__i") and name_of(function) in ("add", "sub", "mul", "div")
    return is_operator or kwargs.get("inplace") or (name[-1:] == "_" and name[:1] != "_")


def out_of_place(function):
    """The function, or for x += y, x.add_(y) and the like the one that leaves x unchanged."""
    name = getattr(function, "__name__", "")
    if name.startswith("__i"):
        return getattr(torch.Tensor, f"__{name[3:]}")
    if name.endswith("_") and not name.startswith("_"):
        return getattr(torch.Tensor, name[:-1])
    return function


def without_rule(y, function):
    """y, the result of a function for which there is no rule: relevance must not reach it."""
    if isinstance(y, tuple | list):
        return type(y)(without_rule(part, function) for part in y)
    return WithoutRule.apply(y, name_of(function)) if is_signal(y) else y
