"""Relevance rules as derivatives: the table of this file is what explains a model.

Write r(x) = R(x)/x for a relevance R. Then r is 1 at the explained logit and travels backwards like a gradient, so that
every rule of docs/method.md (sections 4 and 5) is another derivative of a PyTorch function, and R(x) = x r(x) at the end.

A model is written in plain PyTorch and knows nothing of this. While a rule is active, the functions of torch that its
forward pass calls have the derivatives of the rule's table:

    with LRP(eps=0.01):
        logit = model(x)[0, word]
    relevance = x * torch.autograd.grad(logit, x)[0]

The values of the forward pass do not change. A rule of your own is a class with another table, such as `Gamma` below.
"""
import threading

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from captioning.layers import gates_and_candidate, lstm_cell


class Active(threading.local):
    """The rules whose `with` surrounds what a thread runs, the innermost last."""

    def __init__(self):
        self.rules = []


active = Active()


class Rule(TorchFunctionMode):
    """A context in which functions of torch have the derivatives of `table`; of two nested ones, the inner one counts.

    table: {name of a function: derivative(rule, function, *args, **kwargs) -> result}; torch.add, Tensor.add_, x + y
    and the like all have the name "add". Functions that are not in the table keep their derivatives.
    """
    table = {}

    def __enter__(self):
        active.rules.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        active.rules.pop()
        super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if active.rules[-1] is not self:
            return function(*args, **kwargs)
        result = self.call(name_of(function), function, args, kwargs)

        # a function that would have changed its input gave another tensor instead
        if args and result is not args[0] and is_in_place(function, kwargs) and is_signal(args[0]):
            args[0].changed_by = function.__name__
        return result

    def call(self, name, function, args, kwargs):
        inputs = [*args, *kwargs.values()]
        for x in inputs:
            if hasattr(x, "changed_by"):
                raise NotImplementedError(f"{name} uses a tensor that {x.changed_by} changed in place, which has no "
                                          f"rule: use the result of {x.changed_by} instead")
        if name in self.table and carries_relevance(inputs):
            return self.table[name](self, function, *args, **kwargs)
        return function(*args, **kwargs)


# -- gradients ---------------------------------------------------------------------------------------------------------


def lstm_step(inputs, state, W_h):
    """The equations of an LSTM; inputs: the shares of its input, with biases, in the gates i, f, o and in g."""
    h, c = state
    gates, g = (share + F.linear(h, W) for share, W in zip(inputs, W_h, strict=True))
    i, f, o = gates.sigmoid().chunk(3, -1)
    return lstm_cell(i, f, o, g, c)


def lstm_single(rule, function, x, state, *weights):
    """nn.LSTMCell as its equations, each operation with the derivative of the rule."""
    W_x, W_h, b_x, b_h = map(gates_and_candidate, weights)
    with rule:
        return lstm_step(map(F.linear, [x, x], W_x, map(torch.add, b_x, b_h)), state, W_h)


def lstm_by_steps(rule, function, x, state, weights, *options):
    """nn.LSTM as its equations, one step after the other, each operation with the derivative of the rule."""
    has_biases, layers, _, _, bidirectional, batch_first = options
    if not (has_biases and layers == 1 and batch_first) or bidirectional:
        raise NotImplementedError("an nn.LSTM is explained if it has batch_first=True, biases, one layer and one direction")
    W_x, W_h, b_x, b_h = map(gates_and_candidate, weights)
    state = [part[0] for part in state]
    outputs = []
    with rule:
        inputs = list(map(F.linear, [x, x], W_x, map(torch.add, b_x, b_h)))
        for t in range(x.shape[1]):
            state = lstm_step([share[:, t] for share in inputs], state, W_h)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state[0][None], state[1][None]


def guided_relu(rule, function, z, *args, **kwargs):
    """r(z) = max(r(y), 0) [z > 0] (Springenberg et al. 2015)."""
    return _GuidedReLU.apply(z)


class Gradient(Rule):
    """Ordinary derivatives. The LSTM runs step by step, since derivatives of PyTorch's own cannot be batched over words.
    """
    table = {"lstm": lstm_by_steps, "lstm_cell": lstm_single}


class Guided(Gradient):
    """Guided backpropagation (Springenberg et al. 2015)."""
    table = Gradient.table | {"relu": guided_relu}


# -- layer-wise relevance propagation ----------------------------------------------------------------------------------


def linear(rule, function, *args, **kwargs):
    """z = Σ_i W_ji x_i + b_j:  r(x) = Wᵀ [r(z) z/(z + ε sign z)]  (ε-rule, section 4).

    A sum of linear layers is one linear layer of all their inputs, which has one ε: see `add`."""
    z = function(*args, **kwargs)
    return without_rule(z, function) if sum(map(is_signal, args[:2])) > 1 else linear_output(z, rule.eps)


def add(rule, function, a, b, **kwargs):
    """y = a + b:  r(a) = r(b) = r(y) y/(y + ε sign y)  (sum rule, section 4); with linear layers: `linear`."""
    is_linear = all(hasattr(x, "without_eps") for x in (a, b) if is_signal(x))
    a, b = (getattr(x, "without_eps", x) for x in (a, b))
    y = out_of_place(function)(a, b, **kwargs)
    return linear_output(y, rule.eps) if is_linear else stabilised(y, rule.eps)


def total(rule, function, *args, **kwargs):
    """y = Σ_i x_i, or their mean: ordinary derivative, then y/(y + ε sign y)  (sum rule, section 4)."""
    return stabilised(function(*args, **kwargs), rule.eps)


def product(rule, function, a, b, **kwargs):
    """y = a x with a constant a, such as a gate: r(x) = a r(y), all relevance goes to the signal x (section 4)."""
    y = out_of_place(function)(a, b, **kwargs)
    is_divisor = is_signal(b) and "div" in name_of(function)
    return without_rule(y, function) if is_signal(b) and (is_signal(a) or is_divisor) else y


def constant(rule, function, *args, **kwargs):
    """Gates σ(z) and attention weights softmax(z): r(z) = 0, they are constants (section 4)."""
    return out_of_place(function)(*args, **kwargs).detach()


def elementwise(rule, function, z, *args, **kwargs):
    """y = tanh(z) and other activation functions: r(z) = r(y) y/z, relevance passes unchanged (section 4)."""
    kwargs.pop("inplace", None)
    return _Quotient.apply(z, out_of_place(function)(z.detach(), *args, **kwargs))


def relu(rule, function, z, *args, **kwargs):
    """y = max(z, 0):  r(z) = r(y) y/z = r(y) [z > 0], the ordinary derivative (section 4)."""
    return torch.relu(z)


def max_pool(rule, function, *args, **kwargs):
    """Winner takes all, the ordinary derivative (section 5)."""
    return function(*args, **kwargs)


def conv(rule, function, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """α1β0 rule (section 5), z⁺ = W⁺x⁺ + W⁻x⁻:  r(x) = W⁺ᵀ [r(y) y/z⁺] where x > 0, W⁻ᵀ [r(y) y/z⁺] elsewhere."""
    x, padding = padded(x, weight, padding, dilation)
    y = _AlphaBeta.apply(x, weight, bias, (stride, padding, dilation, groups))
    y.convolution = x, weight, bias, stride, padding, dilation, groups      # for a batch-norm after it
    return y


def batch_norm(rule, function, x, mean, variance, weight, bias, training, momentum, eps):
    """In evaluation mode an affine map of each channel, which becomes part of the convolution before it (section 5)."""
    if training or not hasattr(x, "convolution"):
        raise NotImplementedError("batch normalisation is explained in evaluation mode and after a convolution only")
    inputs, conv_weight, conv_bias, *geometry = x.convolution
    scale = weight / (variance + eps).sqrt()
    conv_bias = (0 if conv_bias is None else conv_bias) - mean
    return conv(rule, F.conv2d, inputs, conv_weight * scale[:, None, None, None], conv_bias * scale + bias, *geometry)


class LRP(Rule):
    """Layer-wise relevance propagation: ε-rule in the decoder, α1β0 (z⁺) rule in convolutions.

    eps: ε ≥ 0. Parameters are no signals: freeze other weights with requires_grad_(False). The backward pass raises
    NotImplementedError, which names the function, where relevance reaches a function that is not in the table and does more
    than move numbers around, or the product of two signals. (Attention scores may be such: no relevance reaches them.)
    """
    table = Gradient.table | {
        "linear": linear, "matmul": linear, "mm": linear, "bmm": linear,
        "add": add, "sub": add, "sum": total, "mean": total, "avg_pool2d": total, "adaptive_avg_pool2d": total,
        "mul": product, "div": product, "truediv": product,
        "sigmoid": constant, "softmax": constant,
        "tanh": elementwise, "relu6": elementwise, "hardtanh": elementwise, "leaky_relu": elementwise,
        "relu": relu, "max_pool2d": max_pool, "conv2d": conv, "batch_norm": batch_norm}

    # they move numbers around; a linear layer remains one under `moves`
    moves = {"getitem", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "mT", "T", "unsqueeze", "squeeze",
             "expand", "expand_as", "select", "narrow", "chunk", "split", "unbind", "contiguous", "to",
             "requires_grad"}
    gathers = {"cat", "stack", "gather", "take_along_dim", "index_select", "masked_fill", "where", "repeat",
               "repeat_interleave", "pad", "clone", "dropout", "neg", "type_as", "double", "float", "flip"}

    def __init__(self, eps=0.01):
        super().__init__()
        self.eps = eps

    def call(self, name, function, args, kwargs):
        if args and name in self.moves and hasattr(args[0], "without_eps"):
            result = super().call(name, function, [args[0].without_eps, *args[1:]], kwargs)
            if isinstance(result, tuple | list):
                return type(result)(linear_output(part, self.eps) for part in result)
            return linear_output(result, self.eps)
        result = super().call(name, function, args, kwargs)
        is_known = name in self.table or name in self.moves or name in self.gathers
        return without_rule(result, function) if carries_relevance([result]) and not is_known else result


class Gamma(LRP):
    """LRP with the γ-rule in convolutions (Montavon et al. 2019): weights W + γW⁺ in place of W, ε-rule otherwise."""

    def __init__(self, gamma=0.25, eps=0.01):
        super().__init__(eps)
        self.gamma = gamma

    def conv(self, function, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """y = Wx + b, z = (W + γW⁺)x + b:  r(x) = (W + γW⁺)ᵀ [r(y) y/(z + ε sign z)]."""
        x, padding = padded(x, weight, padding, dilation)
        geometry = stride, padding, dilation, groups
        y = F.conv2d(x.detach(), weight, bias, *geometry)
        z = F.conv2d(x, weight + self.gamma * weight.clamp(min=0), bias, *geometry)
        y = _Replace.apply(z, y, y / away_from_zero(z.detach(), self.eps))
        y.convolution = x, weight, bias, *geometry
        return y

    table = LRP.table | {"conv2d": conv}


# -- what the derivatives are made of ----------------------------------------------------------------------------------


def name_of(function):
    """The name of a function of torch: "add" of torch.add, Tensor.add, Tensor.add_, x + y, y + x and x += y."""
    if function is F.max_pool2d:
        return "max_pool2d"
    name = getattr(function, "__name__", "")
    if name == "__get__":       # a property, such as Tensor.mT
        return function.__self__.__name__
    if name.startswith("__"):
        name = name.strip("_")
        name = name[1:] if name[0] in "ri" and name[1:] in ("add", "sub", "mul", "matmul") else name
        name = "div" if name in ("idiv", "itruediv") else name
    return name.rstrip("_")


def is_signal(x):
    """Whether relevance passes through x: a tensor with derivatives that is no parameter."""
    return isinstance(x, torch.Tensor) and x.requires_grad and not isinstance(x, nn.Parameter)


def carries_relevance(args):
    """Whether one of the arguments of a function, or of the tensors in a list of them, is a signal."""
    return any(carries_relevance(arg) if isinstance(arg, tuple | list) else is_signal(arg) for arg in args)


def linear_output(z, eps):
    """The output z of a linear layer, with its ε; a sum takes `without_eps`, and has its own."""
    y = stabilised(z, eps)
    y.without_eps = z
    return y


def is_in_place(function, kwargs):
    """Whether a function changes its first argument: x.relu_(), x += y, F.relu(x, inplace=True)."""
    name = getattr(function, "__name__", "")
    return name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__") or kwargs.get("inplace", False) or (
        name.endswith("_") and not name.startswith("_"))


def out_of_place(function):
    """The function itself, or that of the same name that leaves its arguments unchanged."""
    name = getattr(function, "__name__", "")
    if name.startswith("__i"):
        return getattr(torch.Tensor, f"__{name[3:]}")
    return getattr(torch.Tensor, name[:-1]) if name.endswith("_") and not name.startswith("_") else function


def padded(x, weight, padding, dilation):
    """x and the padding of a convolution as numbers: "same" may need another margin on each side."""
    if not isinstance(padding, str):
        return x, padding
    margins = []
    for size, step in zip(weight.shape[:1:-1], reversed(pair(dilation)), strict=True):
        margin = step * (size - 1) if padding == "same" else 0
        margins += [margin // 2, margin - margin // 2]
    return F.pad(x, margins), 0


def pair(value):
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def away_from_zero(z, eps):
    """z + ε sign z, with sign(0) = +1."""
    return torch.where(z >= 0, z + eps, z - eps)


def ratio(z, eps):
    """z / (z + ε sign z); 0 where both are zero. An ε below the smallest number of z's type counts as zero."""
    return (z != 0).to(z.dtype) if eps < torch.finfo(z.dtype).tiny else z / away_from_zero(z, eps)


def without_rule(y, function):
    """y, the result of a function for which there is no rule: relevance must not reach it."""
    if isinstance(y, tuple | list):
        return type(y)(without_rule(part, function) for part in y)
    return _WithoutRule.apply(y, name_of(function)) if is_signal(y) else y


class _WithoutRule(Function):
    """See `without_rule`."""

    @staticmethod
    def forward(ctx, y, name):
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx, r):
        raise NotImplementedError(f"LRP has no rule for {ctx.name}, or not for two signals: add one to the table of "
                                  "captioning/explanation/rules.py")


def stabilised(z, eps):
    """z (any shape), whose derivative is z/(z + ε sign z): turns the derivative of a linear layer into the ε-rule."""
    return _Stabilise.apply(z, eps)


class _Stabilise(Function):
    """See `stabilised`; the factor is computed only if the derivative is used."""

    @staticmethod
    def forward(ctx, z, eps):
        ctx.save_for_backward(z)
        ctx.eps = eps
        return z.view_as(z)

    @staticmethod
    def backward(ctx, r):
        z, = ctx.saved_tensors
        return r * ratio(z, ctx.eps), None


class _Quotient(Function):
    """y as an elementwise function of z, whose derivative is y/z, and 1 at z = 0."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, r):
        z, y = ctx.saved_tensors
        return r * torch.where(z == 0, 1, y / z), None


class _Replace(Function):
    """The value y in place of z, with `scale` as derivative."""

    @staticmethod
    def forward(ctx, z, y, scale):
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, r):
        scale, = ctx.saved_tensors
        return r * scale, None, None


class _GuidedReLU(Function):
    """ReLU that passes a gradient only where both input and gradient are positive."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z > 0)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, r):
        active, = ctx.saved_tensors
        return r.clamp(min=0) * active


class _AlphaBeta(Function):
    """A convolution whose derivative is the α1β0 rule (see `conv`)."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        if x.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, bias, *geometry)
        ctx.save_for_backward(x, weight, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx, r):
        x, weight, y = ctx.saved_tensors
        groups = ctx.geometry[-1]

        # the same for all words, which pass one after the other
        if not hasattr(ctx, "scale"):
            ctx.signed = bool((x < 0).any())
            # W⁺x⁺ + W⁻x⁻ as one convolution, of twice the channels in each group
            parts = _signs(x.unflatten(1, (groups, -1)), 2).flatten(1, 2) if ctx.signed else x
            ctx.weight = _signs(weight, 1) if ctx.signed else weight.clamp(min=0)
            z = F.conv2d(parts, ctx.weight, None, *ctx.geometry)
            ctx.scale = y / z.masked_fill_(z == 0, torch.inf)       # no relevance passes where z⁺ is zero
            ctx.shape = parts.shape

        r_x = conv2d_input(ctx.shape, ctx.weight, r * ctx.scale, *ctx.geometry)
        if ctx.signed:
            B, _, *sides = r_x.shape
            plus, minus = r_x.reshape(B, groups, 2, -1, *sides).unbind(2)
            r_x = torch.where(x > 0, plus.reshape(B, -1, *sides), minus.reshape(B, -1, *sides))
        return r_x, None, None, None


def _signs(x, dim):
    """Positive and negative part of x, concatenated along `dim`."""
    return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim)
