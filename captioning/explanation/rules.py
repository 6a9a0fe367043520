"""Rules: which derivative each operation has. This choice determines the explanation method.

Write r(x) = R(x)/x for a relevance R. Then r is 1 at the explained logit and travels backwards like a gradient, so that
every relevance rule of docs/method.md (sections 4 and 5) is a modified derivative:

    linear   z = Wx + b         r(x) = Wᵀ [r(z) z/(z + ε sign z)]         ordinary derivative, then `stabilise`
    sum      y = a + b          r(a) = r(b) = r(y) y/(y + ε sign y)       ordinary derivative, then `stabilise`
    gate     y = σ(·) ⊙ s       r(s) = r(y) σ(·), no relevance for σ      `constant`
    tanh     y = tanh(z)        r(z) = r(y) y/z                           `tanh`
    ReLU     y = max(z, 0)      r(z) = r(y) y/z = r(y) [z > 0]            ordinary derivative
    z⁺       y = conv(x) + b    r(x) = W⁺ᵀ [r(y) y/z⁺] where x > 0, W⁻ᵀ [r(y) y/z⁺] elsewhere, z⁺ = W⁺x⁺ + W⁻x⁻
                                followed by a ReLU, a = max(y, 0):  r(y) y/z⁺ = r(a) a/z⁺
    max-pool                    winner takes all                          ordinary derivative

and R(x) = x r(x) at the end. The gradient methods (section 6) are other choices of the same derivatives.

A rule is a class with the methods of `Plain`, where they are documented, and a new rule overrides those that differ.
The γ-rule for convolutions (weights W + γW⁺ in place of W):

    class Gamma(LRP):
        def conv(self, x, layer, signed, rectified):
            z = layer._conv_forward(x, layer.weight + 0.25 * layer.weight.clamp(min=0), layer.bias)
            y = Plain.conv(self, x, layer, signed, rectified).detach()
            return replace(z, y, y / stabilised(z.detach(), self.eps))
"""
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.grad import conv2d_input


class _Replace(Function):
    """See `replace`."""

    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.save_for_backward(scale)
        return y.view_as(x)

    @staticmethod
    def backward(ctx, r):
        scale, = ctx.saved_tensors
        return r * scale, None, None


class _GuidedReLU(Function):
    """ReLU that passes a gradient only where both input and gradient are positive (Springenberg et al. 2015)."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z > 0)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, r):
        active, = ctx.saved_tensors
        return r.clamp(min=0) * active


class _CandidateLinear(Function):
    """x Wᵀ for the pre-activations of an LSTM of d units; only the rows of the candidate g propagate relevance."""

    @staticmethod
    def forward(ctx, x, weight, d):
        ctx.save_for_backward(weight[2 * d:3 * d])
        ctx.candidate = slice(2 * d, 3 * d)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, r):
        weight, = ctx.saved_tensors
        r = r[..., ctx.candidate]
        # of two dimensions, as batched derivatives would compute a product of more for one word after the other
        return torch.mm(r.reshape(-1, r.shape[-1]), weight).view(*r.shape[:-1], -1), None, None


class _ZPlusConv(Function):
    """A convolution, with its ReLU if `rectified`, whose derivative is the α1β0 rule (see `Plain.conv`)."""

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
        scale = y / z.masked_fill_(z == 0, torch.inf)       # no relevance passes where z⁺ is zero
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
    """Positive and negative part of x, concatenated along `dim`."""
    return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim)


def replace(x, value, scale):
    """Gives an elementwise operation on x any value and derivative: the forward pass returns `value`, the backward pass
    multiplies the incoming derivative by `scale`. Both have the shape of x and carry no derivatives themselves."""
    return _Replace.apply(x, value, scale)


class Plain:
    """Ordinary derivatives and fused kernels: training and decoding. Its methods are the interface of every rule."""

    fused = True    # whether an LSTM may run as one operation, in which the rule's other methods have no effect

    def leaf(self, x):
        """x (any shape), at which a backward pass under this rule ends: explaining rules cut the graph here."""
        return x

    def stabilise(self, z):
        """z (any shape), the output of a linear layer, or of a sum, mean or weighted sum. Value z, derivative 1; LRP:
        z/(z + ε sign z), which turns the ordinary derivative of the operation before it into the ε-rule or sum rule."""
        return z

    def constant(self, a):
        """a (any shape), a gate or an attention weight, or what it is computed from. Value a, derivative 1; LRP: 0, so
        that the gated signal receives all relevance."""
        return a

    def tanh(self, z):
        """tanh(z), z of any shape. Derivative 1 − tanh²(z); LRP: tanh(z)/z, relevance passes unchanged."""
        return torch.tanh(z)

    def relu(self, z):
        """max(z, 0), z of any shape. Derivative [z > 0]; guided backpropagation: zero also for a negative gradient."""
        return torch.relu(z)

    def rectify(self, z):
        """max(z, 0) of a linear layer's output z: `stabilise` and `relu` in one."""
        return self.relu(self.stabilise(z))

    def lstm_linear(self, x, weight, d):
        """x Wᵀ, x (..., n) and W (≥ 4d, n): the share of x in the pre-activations i, f, g, o of an LSTM of d units, and
        of further gates, without bias. Ordinary derivative; LRP: only that of the candidate g, as the others are gates.
        """
        return F.linear(x, weight)

    def select_heads(self, c):
        """c (..., M, d/M), the contexts of M attention heads. Value c, derivative 1; LRP: 0 for heads not selected."""
        return c

    def conv(self, x, layer, signed, rectified):
        """layer(x) for an nn.Conv2d and x (B, C, H, W), followed by a ReLU if `rectified`. Ordinary derivative; LRP:
        the α1β0 rule. signed: whether x may have negative entries, for which the rule needs W⁻ as well as W⁺."""
        return self.relu(layer(x)) if rectified else layer(x)


class Gradient(Plain):
    """Ordinary derivatives, with every operation's backward pass batched over words: gradient and Grad-CAM."""

    fused = False

    def leaf(self, x):
        return x.detach().requires_grad_()


class Guided(Gradient):
    """Guided backpropagation (Springenberg et al. 2015)."""

    def relu(self, z):
        return _GuidedReLU.apply(z)


class LRP(Gradient):
    """Layer-wise relevance propagation: ε-rule in the decoder, α1β0 (z⁺) rule in the convolutions.

    eps: ε ≥ 0. head: index of the one attention head that propagates relevance (MH-FC); all heads by default.
    """

    def __init__(self, eps=0.01, head=None):
        self.eps, self.head = eps, head

    def stabilise(self, z):
        return replace(z, z.detach(), ratio(z.detach(), self.eps))

    def rectify(self, z):
        positive = z.detach().clamp(min=0)
        return replace(z, positive, ratio(positive, self.eps))

    def constant(self, a):
        return a.detach()

    def tanh(self, z):
        y = torch.tanh(z.detach())
        return replace(z, y, torch.where(z.detach() == 0, 1, y / z.detach()))

    def lstm_linear(self, x, weight, d):
        return _CandidateLinear.apply(x, weight, d)

    def select_heads(self, c):
        if self.head is None:
            return c
        if not 0 <= self.head < c.shape[-2]:
            raise ValueError(f"head {self.head} is not one of this model's 0 … {c.shape[-2] - 1}")
        selected = torch.arange(c.shape[-2], device=c.device) == self.head
        return replace(c, c.detach(), selected[:, None].to(c.dtype))

    def conv(self, x, layer, signed, rectified):
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), 0
        geometry = layer.stride, padding, layer.dilation, layer.groups
        return _ZPlusConv.apply(x, layer.weight, layer.bias, geometry, signed, rectified)


def stabilised(z, eps):
    """z + ε sign z, with sign(0) = +1."""
    return torch.where(z >= 0, z + eps, z - eps)


def ratio(z, eps):
    """z / (z + ε sign z); 0 where both are zero. An ε below the smallest number of z's type counts as zero."""
    return (z != 0).to(z.dtype) if eps < torch.finfo(z.dtype).tiny else z / stabilised(z, eps)


PLAIN = Plain()


def lstm_cell(preactivations, c, rule):
    """One LSTM step under a rule: pre-activations (..., 4d) in the order i, f, g, o and c (..., d) -> h, c (..., d)."""
    if rule.fused and c.is_cuda:        # one operation in place of nine, as in nn.LSTMCell on GPUs
        gates = preactivations.flatten(0, -2).to(c.dtype)
        with torch.autocast("cuda", enabled=False):
            h, new_c, _ = torch.ops.aten._thnn_fused_lstm_cell(gates, torch.zeros_like(gates), c.flatten(0, -2))
        return h.view(c.shape), new_c.view(c.shape)
    i, f, g, o = preactivations.chunk(4, dim=-1)
    g = rule.tanh(rule.stabilise(g))
    c = rule.stabilise(rule.constant(f.sigmoid()) * c + rule.constant(i.sigmoid()) * g)
    return rule.constant(o.sigmoid()) * rule.tanh(c), c
