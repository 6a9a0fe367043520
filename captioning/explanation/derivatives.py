"""What the rules consist of: values with a derivative of another kind, and helpers.

The equations are in captioning/explanation/rules.py.
"""
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.grad import conv2d_input


def with_margin(x, weight, padding, dilation):
    """x padded as "same" or "valid" says, and 0 as the remaining padding; numbers as they are.

    ("same" may need one more zero at one end.)"""
    if not isinstance(padding, str):
        return x, padding
    margins = []
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    for size, step in zip(weight.shape[:1:-1], reversed(steps), strict=True):
        margin = step * (size - 1) if padding == "same" else 0
        margins += [margin // 2, margin - margin // 2]
    return F.pad(x, margins), 0


def away_from_zero(z, eps):
    """z + ε sign z, with sign(0) = +1."""
    return torch.where(z >= 0, z + eps, z - eps)


def ratio(z, eps):
    """z / (z + ε sign z); 0 where both are zero.

    An ε below the smallest number of z's type counts as zero."""
    if eps < torch.finfo(z.dtype).tiny:
        return (z != 0).to(z.dtype)
    return z / away_from_zero(z, eps)


def stabilised(z, eps):
    """z with the derivative z/(z + ε sign z): it makes a linear layer's derivative the ε-rule."""
    return _Stabilise.apply(z, eps)


class WithoutRule(Function):
    """y, the result of a function for which there is no rule: relevance must not reach it."""

    @staticmethod
    def forward(ctx, y, name):
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx, r):
        raise NotImplementedError(f"LRP has no rule for {ctx.name}, or none for two signals: add "
                                  "one to the table in captioning/explanation/rules.py")


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


class Replace(Function):
    """The value y, whose derivative with respect to z is `scale`."""

    @staticmethod
    def forward(ctx, z, y, scale):
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, r):
        scale, = ctx.saved_tensors
        return r * scale, None, None


class GuidedReLU(Function):
    """ReLU that passes a gradient only where both input and gradient are positive."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z > 0)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, r):
        is_positive, = ctx.saved_tensors
        return r.clamp(min=0) * is_positive


class AlphaBeta(Function):
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
        *_, groups = ctx.geometry

        # computed once: the backward passes of all words share it
        if not hasattr(ctx, "scale"):
            ctx.is_signed = bool((x < 0).any())
            parts = x
            if ctx.is_signed:   # W⁺x⁺ + W⁻x⁻ as one convolution, of twice the channels per group
                parts = _signs(x.unflatten(1, (groups, -1)), 2).flatten(1, 2)
            ctx.weight = _signs(weight, 1) if ctx.is_signed else weight.clamp(min=0)
            z = F.conv2d(parts, ctx.weight, None, *ctx.geometry)
            ctx.scale = y / z.masked_fill_(z == 0, torch.inf)       # z⁺ = 0: no relevance passes
            ctx.shape = parts.shape

        r_x = conv2d_input(ctx.shape, ctx.weight, r * ctx.scale, *ctx.geometry)
        if ctx.is_signed:
            B, _, *sides = r_x.shape
            plus, minus = r_x.reshape(B, groups, 2, -1, *sides).unbind(2)
            r_x = torch.where(x > 0, plus.reshape(B, -1, *sides), minus.reshape(B, -1, *sides))
        return r_x, None, None, None


def _signs(x, dim):
    """Positive and negative part of x, concatenated along `dim`."""
    return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim)
