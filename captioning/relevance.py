"""Rules: which derivative each operation has. One forward pass explains itself once its derivatives are chosen.

Write r(x) = R(x)/x for a relevance R. Then r is 1 at the explained logit and travels back like a gradient, every
relevance rule of method.md (sections 4 and 5) being a changed derivative, stated here beside its equation:

    linear   z = Wx + b         r(x) = Wᵀ [r(z) z/(z + ε sign z)]         ordinary, then `stabilise`
    sum      y = a + b          r(a) = r(b) = r(y) y/(y + ε sign y)       ordinary, then `stabilise`
    gate     y = σ(·) ⊙ s       r(s) = r(y) σ(·), nothing into σ          `gate`
    tanh     y = tanh(z)        r(z) = r(y) y/z                           `tanh`
    ReLU     y = max(z, 0)      r(z) = r(y) y/z = r(y) [z > 0]            ordinary
    z⁺       y = conv(x) + b    r(x) = W⁺ᵀ [r(y) y/z⁺] where x > 0, W⁻ᵀ [r(y) y/z⁺] elsewhere, z⁺ = W⁺x⁺ + W⁻x⁻
                                with a ReLU, a = max(y, 0):  r(y) y/z⁺ = r(a) a/z⁺
    max-pool                    winner takes all                          ordinary

and R(x) = x r(x) at the end. The gradient methods are other choices of the same few derivatives.
"""
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.grad import conv2d_input


class _Replace(Function):
    """y in place of x, with the derivative `scale`."""

    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.save_for_backward(scale)
        return y.view_as(x)

    @staticmethod
    def backward(ctx, r):
        scale, = ctx.saved_tensors
        return r * scale, None, None


class _GuidedReLU(Function):
    """ReLU that lets a gradient through only where input and gradient are positive (Springenberg et al. 2015)."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z > 0)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, r):
        active, = ctx.saved_tensors
        return r.clamp(min=0) * active


class _CandidateLinear(Function):
    """x Wᵀ for the four gates of an LSTM, W (4d, n); only the rows of the candidate g carry relevance."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, r):
        weight, = ctx.saved_tensors
        d = weight.shape[0] // 4
        return r[..., 2 * d:3 * d] @ weight[2 * d:3 * d], None


class _ZPlusConv(Function):
    """A convolution whose derivative is the α1β0 rule; signed: its input may be negative; rectified: a ReLU follows."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, signed, rectified):
        if x.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, bias, *geometry)
        *_, ctx.groups = geometry
        # W⁺x⁺ + W⁻x⁻ as one convolution, of twice the channels in each group
        parts = _signs(x.unflatten(1, (ctx.groups, -1)), 2).flatten(1, 2) if signed else x
        weight = _signs(weight, 1) if signed else weight.clamp(min=0)
        z = F.conv2d(parts, weight, None, *geometry)
        if rectified:
            y = y.clamp_(min=0)
        scale = y / z.masked_fill_(z == 0, torch.inf)       # nothing passes where z⁺ is zero
        ctx.save_for_backward(scale, weight, *((x > 0,) if signed else ()))
        ctx.geometry, ctx.shape = geometry, parts.shape
        return y

    @staticmethod
    def backward(ctx, r):
        scale, weight, *positive = ctx.saved_tensors
        r_x = conv2d_input(ctx.shape, weight, r * scale, *ctx.geometry)
        if positive:
            B, _, *sides = r_x.shape
            plus, minus = r_x.reshape(B, ctx.groups, 2, -1, *sides).unbind(2)
            r_x = torch.where(positive[0], plus.reshape(B, -1, *sides), minus.reshape(B, -1, *sides))
        return r_x, None, None, None, None, None


def _signs(x, dim):
    """The positive and the negative part of x, side by side along `dim`."""
    return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim)


class Plain:
    """Ordinary derivatives and fused kernels: training and decoding."""
    fused = True

    def leaf(self, x):
        return x

    def stabilise(self, z):
        return z

    def gate(self, a):
        return a

    def tanh(self, z):
        return torch.tanh(z)

    def relu(self, z):
        return torch.relu(z)

    def rectify(self, z):
        """The ReLU of a linear layer's output z: `stabilise` and `relu` in one."""
        return self.relu(self.stabilise(z))

    def gates(self, x, weight):
        return F.linear(x, weight)

    def heads(self, c):
        return c

    def conv(self, x, layer, signed, rectified):
        return self.relu(layer(x)) if rectified else layer(x)


class Gradient(Plain):
    """Ordinary derivatives, every operation's backward pass batched over words: gradient and Grad-CAM."""
    fused = False

    def leaf(self, x):
        return x.detach().requires_grad_()


class Guided(Gradient):
    """Guided backpropagation."""

    def relu(self, z):
        return _GuidedReLU.apply(z)


class LRP(Gradient):
    """Layer-wise relevance propagation: ε-rule in the decoder, z⁺ in the convolutions.

    head: of multi-head attention, let this head alone propagate (all by default).
    """

    def __init__(self, eps=0.01, head=None):
        self.eps, self.head = eps, head

    def stabilise(self, z):
        return _Replace.apply(z, z.detach(), ratio(z.detach(), self.eps))

    def rectify(self, z):
        positive = z.detach().clamp(min=0)
        return _Replace.apply(z, positive, ratio(positive, self.eps))

    def gate(self, a):
        return a.detach()

    def tanh(self, z):
        y = torch.tanh(z.detach())
        return _Replace.apply(z, y, torch.where(z.detach() == 0, 1, y / z.detach()))

    def gates(self, x, weight):
        return _CandidateLinear.apply(x, weight)

    def heads(self, c):
        """c (..., M, d/M)"""
        if self.head is None:
            return c
        one = torch.arange(c.shape[-2], device=c.device) == self.head
        return _Replace.apply(c, c.detach(), one[:, None].to(c.dtype))

    def conv(self, x, layer, signed, rectified):
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), 0
        geometry = layer.stride, padding, layer.dilation, layer.groups
        return _ZPlusConv.apply(x, layer.weight, layer.bias, geometry, signed, rectified)


def ratio(z, eps):
    """z / (z + ε sign z), with sign(0) = +1; 0 where both are zero."""
    if eps == 0:
        return (z != 0).to(z.dtype)
    return z / torch.where(z >= 0, z + eps, z - eps)


PLAIN = Plain()


def lstm_cell(gates, c, rule):
    """One LSTM step: pre-activations `gates` (..., 4d), in the order i, f, g, o, and c (..., d) -> h, c (..., d)."""
    i, f, g, o = gates.chunk(4, dim=-1)
    g = rule.tanh(rule.stabilise(g))
    c = rule.stabilise(rule.gate(f.sigmoid()) * c + rule.gate(i.sigmoid()) * g)
    return rule.gate(o.sigmoid()) * rule.tanh(c), c
