"""Relevance rules as derivatives: the table in this file explains a model.

Write r(x) = R(x)/x for a relevance R. Then r is 1 at the explained logit and travels backwards like
a gradient, so that every rule of docs/method.md (sections 4 and 5) is another derivative of a
function of torch, and R(x) = x r(x) at the end.

A model is written in plain PyTorch and knows nothing of this. While a rule is active, the functions
of torch that a forward pass calls have the derivatives of the rule's table:

    with LRP(eps=0.01):
        logit = model(x)[0, word]
    relevance = x * torch.autograd.grad(logit, x)[0]

The values of the forward pass do not change. A rule of your own is a class with another table, such
as `Gamma` at the end of this file."""
import threading

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from captioning.explanation.derivatives import (
    AlphaBeta,
    GuidedReLU,
    Replace,
    away_from_zero,
    stabilised,
    with_margin,
)
from captioning.explanation.functions import (
    as_gate,
    carries_relevance,
    halved,
    is_in_place,
    is_signal,
    linear_output,
    name_of,
    out_of_place,
    without_rule,
)
from captioning.layers import lstm_cell, lstm_products


class Active(threading.local):
    """The rules whose `with` surrounds what a thread runs, the innermost last."""

    def __init__(self):
        self.rules = []


active = Active()


class Rule(TorchFunctionMode):
    """A context in which functions of torch have the derivatives of `table`.

    Of two nested rules, the inner one counts.
    table: {name of a function: derivative(rule, function, *args, **kwargs) -> result}; torch.add,
    Tensor.add_, x + y and the like all have the name "add". Functions that are not in the table
    keep their derivatives.
    watch: is called with (function, args, kwargs, result) after every function of torch.
    """
    table = {}
    watch = None

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
        if self.watch is not None:
            self.watch(function, args, kwargs, result)

        # x.add_(y) and the like gave a new tensor: x itself must not be used any more
        if args and result is not args[0] and is_signal(args[0]) and is_in_place(function, kwargs):
            args[0].changed_by = function.__name__
        return result

    def call(self, name, function, args, kwargs):
        inputs = [*args, *kwargs.values()]
        for x in inputs:
            if hasattr(x, "changed_by"):
                raise NotImplementedError(f"{name} uses a tensor that {x.changed_by} changed in "
                                          "place: use the result of that function instead")
        if name in self.table and carries_relevance(inputs):
            return self.table[name](self, function, *args, **kwargs)
        return function(*args, **kwargs)


# -- gradients -------------------------------------------------------------------------------------


def lstm_steps(rule, x, state, weights):
    """The equations of an LSTM for x (B, T, e), each operation with the derivative of the rule."""
    h, c = state
    products = lstm_products(weights)
    outputs = []
    with rule:      # PyTorch switches a mode off while it handles a call
        inputs = [F.linear(x, W_x, bias) for W_x, _, bias in products]
        for t in range(x.shape[1]):
            gates, g = (part[:, t] + F.linear(h, W_h)
                        for part, (_, W_h, _) in zip(inputs, products, strict=True))
            i, f, o = gates.sigmoid().chunk(3, -1)
            h, c = lstm_cell(i, f, o, g, c)
            outputs.append(h)
        return torch.stack(outputs, 1), h, c


def lstm_layer(rule, function, x, state, weights, *options):
    """nn.LSTM: `lstm_steps`."""
    has_biases, layers, _, _, bidirectional, batch_first = options
    if not (has_biases and layers == 1 and batch_first) or bidirectional:
        raise NotImplementedError("an nn.LSTM is explained with batch_first=True, biases, one "
                                  "layer and one direction only")
    outputs, h, c = lstm_steps(rule, x, (part[0] for part in state), weights)
    return outputs, h[None], c[None]


def lstm_single(rule, function, x, state, *weights):
    """nn.LSTMCell: `lstm_steps`."""
    _, h, c = lstm_steps(rule, x[:, None], state, weights)
    return h, c


def guided_relu(rule, function, z, *args, **kwargs):
    """r(z) = max(r(y), 0) [z > 0] (Springenberg et al. 2015)."""
    return GuidedReLU.apply(z)


def guided_hardtanh(rule, function, z, min_val=0.0, max_val=6.0, inplace=False):
    """ReLU6, y = min(max(z, 0), 6):  r(z) = max(r(y), 0) [0 < z ≤ 6]; with another lower bound,
    which is no ReLU, the ordinary derivative."""
    if min_val:
        return F.hardtanh(z, min_val, max_val)
    return GuidedReLU.apply(z).clamp(max=max_val)


def attention(rule, function, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """Scaled dot-product attention softmax(q kᵀ scale + mask) v, each operation with the derivative
    of the rule."""
    if is_causal:
        attn_mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    with rule:
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1) @ v


class Gradient(Rule):
    """Ordinary derivatives; those of PyTorch's LSTMs and of its fused attention cannot be batched
    over words, so they are computed step by step."""
    table = {"lstm": lstm_layer, "lstm_cell": lstm_single,
             "scaled_dot_product_attention": attention}


class Guided(Gradient):
    """Guided backpropagation (Springenberg et al. 2015)."""
    table = Gradient.table | {"relu": guided_relu, "relu6": guided_hardtanh,
                              "hardtanh": guided_hardtanh}      # nn.ReLU6 calls F.hardtanh


# -- layer-wise relevance propagation --------------------------------------------------------------


def linear(rule, function, input, weight, bias=None):
    """z_j = Σ_i W_ji x_i + b_j:  r(x) = Wᵀ [r(z) z/(z + ε sign z)]  (ε-rule, section 4).

    A sum of linear layers is one linear layer of all their inputs, with one ε: see `add`."""
    z = function(input, weight, rule.measured(bias))
    is_product = is_signal(input) and is_signal(weight)
    return without_rule(z, function) if is_product else linear_output(z, rule.eps)


def matmul(rule, function, *args, **kwargs):
    """z = a b, one of them constant, such as attention weights: `linear` without a bias."""
    z = function(*args, **kwargs)
    is_product = all(map(is_signal, args[:2]))
    return without_rule(z, function) if is_product else linear_output(z, rule.eps)


def addmm(rule, function, bias, x, weight):
    """z = x W + b: `linear`."""
    return linear(rule, lambda x, weight, bias: torch.addmm(bias, x, weight), x, weight, bias)


def add(rule, function, a, b, **kwargs):
    """y = a + b:  r(a) = r(b) = r(y) y/(y + ε sign y)  (sum rule, section 4).

    A linear layer among the terms is one without its own ε."""
    is_linear = all(hasattr(x, "without_eps") for x in (a, b) if is_signal(x))
    is_gate = all(hasattr(x, "is_gate") for x in (a, b) if is_signal(x))
    a, b = (getattr(x, "without_eps", rule.measured(x)) for x in (a, b))
    y = out_of_place(function)(a, b, **kwargs)
    y = linear_output(y, rule.eps) if is_linear else stabilised(y, rule.eps)
    return as_gate(y) if is_gate else y


def gather(rule, function, *args, **kwargs):
    """Signals and constants side by side, such as the tokens of an image and a class token."""
    measured = []
    for arg in args:
        if isinstance(arg, tuple | list):
            arg = [rule.measured(x) for x in arg]
        elif isinstance(arg, torch.Tensor):     # numbers say where the others go
            arg = rule.measured(arg)
        measured.append(arg)
    return function(*measured, **kwargs)


def total(rule, function, *args, **kwargs):
    """y = Σ_i x_i, or the mean: ordinary, then y/(y + ε sign y)  (sum rule, section 4)."""
    return stabilised(function(*args, **kwargs), rule.eps)


def product(rule, function, a, b, **kwargs):
    """y = a x, a constant such as a gate:  r(x) = a r(y), all relevance to x (section 4).

    Of two signals each has half of it:  r(a) = x r(y)/2,  r(x) = a r(y)/2  (Achtibat et al. 2024);
    but a tanh or erf that multiplies another signal is a constant, as in formulas of GELU."""
    if is_signal(a) and is_signal(b):
        a, b = (x.detach() if hasattr(x, "is_gate") else x for x in (a, b))
    y = out_of_place(function)(a, b, **kwargs)
    if is_signal(b) and "div" in name_of(function):
        return without_rule(y, function)
    if is_signal(a) and is_signal(b):
        return halved(y)
    is_gate = any(is_signal(x) and hasattr(x, "is_gate") for x in (a, b))
    return as_gate(y) if is_gate else y


def constant(rule, function, *args, **kwargs):
    """Gates σ(z) and attention weights softmax(z):  r(z) = 0, they are constants (section 4)."""
    return out_of_place(function)(*args, **kwargs).detach()


def elementwise(rule, function, z, *args, **kwargs):
    """y = GELU(z) and the like:  r(z) = r(y) y/z, relevance passes unchanged (section 4)."""
    kwargs.pop("inplace", None)
    z0 = z.detach()
    y = out_of_place(function)(z0, *args, **kwargs)
    return Replace.apply(z, y, torch.where(z0 == 0, 1, y / z0))


def bounded(rule, function, z):
    """y = tanh(z): `elementwise`; a gate if it is multiplied with another signal."""
    return as_gate(elementwise(rule, function, z))


def layer_norm(rule, function, x, shape, weight=None, bias=None, eps=1e-5):
    """y = (x − mean x) w/σ + b with the standard deviation σ constant (Ali et al. 2022)."""
    dims = tuple(range(-len(shape), 0))
    x = x.contiguous()          # as the result of the function is
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return stabilised(y if bias is None else y + rule.measured(bias), rule.eps)


def rms_norm(rule, function, x, shape, weight=None, eps=None):
    """y = x w/σ with the root mean square σ constant (Ali et al. 2022)."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(shape), 0))
    x = x.contiguous()
    y = x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def relu(rule, function, z, *args, **kwargs):
    """y = max(z, 0):  r(z) = r(y) y/z = r(y) [z > 0], the ordinary derivative (section 4)."""
    return torch.relu(z)


def conv(rule, function, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """α1β0 (section 5), with z⁺ = W⁺x⁺ + W⁻x⁻:
    r(x) = W⁺ᵀ [r(y) y/z⁺] where x > 0, and W⁻ᵀ [r(y) y/z⁺] elsewhere."""
    x, padding = with_margin(x, weight, padding, dilation)
    y = AlphaBeta.apply(x, weight, bias, (stride, padding, dilation, groups))
    y.convolution = x, weight, bias, stride, padding, dilation, groups      # for a batch-norm
    return y


def gamma_conv(rule, function, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """γ-rule (Montavon et al. 2019), for outputs of both signs as Andéol et al. (2021): y = Wx + b,
    z = W'x + b and r(x) = W'ᵀ [r(y) y/(z + ε sign z)], where W' is W with the weights of those
    products W_ji x_i that have the sign of y_j times 1 + γ."""
    x, padding = with_margin(x, weight, padding, dilation)
    geometry = stride, padding, dilation, groups
    y = F.conv2d(x.detach(), weight, bias, *geometry)
    # products W_ji x_i > 0 count 1 + γ times in plus, those < 0 in minus
    raised = weight + rule.gamma * weight.clamp(min=0)
    lowered = weight + rule.gamma * weight.clamp(max=0)
    plus = F.conv2d(x.clamp(min=0), raised, bias, *geometry)
    minus = F.conv2d(x.clamp(min=0), lowered, bias, *geometry)
    if (x < 0).any():
        plus = plus + F.conv2d(x.clamp(max=0), lowered, None, *geometry)
        minus = minus + F.conv2d(x.clamp(max=0), raised, None, *geometry)
    z = torch.where(y >= 0, plus, minus)
    y = Replace.apply(z, y, torch.where(z == 0, 0, y / away_from_zero(z.detach(), rule.eps)))
    y.convolution = x, weight, bias, *geometry
    return y


def batch_norm(rule, function, x, mean, variance, weight, bias, training, momentum, eps):
    """In evaluation mode an affine map, part of the convolution before it (section 5)."""
    if training or not hasattr(x, "convolution"):
        raise NotImplementedError("batch normalisation is explained in evaluation mode and after a "
                                  "convolution only")
    # the convolution once more, with the batch normalisation in its weights
    inputs, conv_weight, conv_bias, *geometry = x.convolution
    scale = weight / (variance + eps).sqrt()
    shift = bias - mean * scale if conv_bias is None else bias + (conv_bias - mean) * scale
    return rule.table["conv2d"](rule, F.conv2d, inputs, conv_weight * scale[:, None, None, None],
                                shift, *geometry)


class LRP(Rule):
    """Layer-wise relevance propagation: ε-rule in the decoder, α1β0 (z⁺) rule in convolutions.

    eps: ε ≥ 0. Parameters are no signals; freeze weights that are computed from parameters with
    requires_grad_(False). The backward pass raises NotImplementedError, which names the function,
    where relevance reaches a function that is not in the table and does more than move numbers, or
    the product of two matrices. (Attention scores may be such: no relevance reaches them.)
    one: measures what constants such as biases absorb, if set to a tensor of the number 1 that
    requires a gradient: constants are multiplied with it, and its relevance is that of all.
    """
    table = Gradient.table | {
        "linear": linear, "addmm": addmm, "matmul": matmul, "mm": matmul, "bmm": matmul,
        "add": add, "sub": add,
        "sum": total, "mean": total, "avg_pool2d": total, "adaptive_avg_pool2d": total,
        "mul": product, "div": product,
        "sigmoid": constant, "softmax": constant, "rsqrt": constant,
        "tanh": bounded, "erf": bounded, "gelu": elementwise, "silu": elementwise,
        "relu6": elementwise, "hardtanh": elementwise, "leaky_relu": elementwise, "relu": relu,
        "layer_norm": layer_norm, "rms_norm": rms_norm,
        "cat": gather, "stack": gather, "where": gather, "masked_scatter": gather,
        "conv2d": conv, "batch_norm": batch_norm}

    # Functions that keep their derivative. After the first kind, the output of a linear layer still
    # is one, whose ε a following sum replaces. Of max-pooling, the winner takes all (section 5).
    moves = {"getitem", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "mT",
             "T", "unsqueeze", "squeeze", "expand", "expand_as", "select", "narrow", "chunk",
             "split", "unbind", "contiguous", "to", "type"}
    gathers = {"max_pool2d", "gather", "take_along_dim", "index_select", "masked_fill", "repeat",
               "repeat_interleave", "pad", "clone", "dropout", "neg", "flip", "roll", "float",
               "double", "type_as"}
    one = None

    def __init__(self, eps=0.01):
        super().__init__()
        self.eps = eps

    def measured(self, constant):
        """A constant times `one`, if that is set; a signal unchanged."""
        is_number = isinstance(constant, int | float)
        is_constant = is_number or (isinstance(constant, torch.Tensor) and not is_signal(constant)
                                    and constant.is_floating_point())
        if self.one is None or not is_constant:
            return constant
        if is_number:
            return constant * self.one
        # a sum, so that the value stays exact; −∞ and the lowest number, which mask, stay alone
        return constant + torch.where(constant < -1e30, 0, constant) * (self.one - 1)

    def call(self, name, function, args, kwargs):
        if args and name in self.moves and hasattr(args[0], "without_eps"):
            result = function(args[0].without_eps, *args[1:], **kwargs)
            if isinstance(result, tuple | list):
                return type(result)(linear_output(part, self.eps) for part in result)
            return linear_output(result, self.eps)
        result = super().call(name, function, args, kwargs)
        is_known = name in self.table or name in self.moves or name in self.gathers
        if is_known or name == "requires_grad" or not carries_relevance([result]):
            return result
        return without_rule(result, function)


class Gamma(LRP):
    """LRP with the γ-rule in convolutions in place of α1β0."""
    table = LRP.table | {"conv2d": gamma_conv}

    def __init__(self, gamma=0.25, eps=0.01):
        super().__init__(eps)
        self.gamma = gamma
