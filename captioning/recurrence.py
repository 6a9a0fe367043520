"""What makes teacher forcing fast: the steps of many captions without their padding, and gradients of weights that are
used at every step."""
import torch
from torch.autograd import Function


class Steps:
    """The steps of captions (B, N, T+1), each a rectangle of b images × n captions.

    Captions are sorted by length within each image, and images by their longest caption. Step t then needs the first
    b_t images and n_t captions alone, so that most of the padding is never computed. A tensor is `packed` if its rows
    (S, ...) are those of all steps one after the other, S = Σ b_t n_t.

    skip_padding=False, or captions on another device than a CPU, where reading their lengths would wait for the device:
    all captions have T steps, in their original order.
    """

    def __init__(self, captions, skip_padding=False):
        self.shape = B, N, T = captions[..., 1:].shape
        lengths = torch.full((B, N), T)
        if skip_padding and captions.device.type == "cpu":
            lengths = (captions[..., 1:] != 0).sum(-1).clamp(min=1)     # captions without words have one step, too
        lengths, order = lengths.sort(dim=1, descending=True, stable=True)
        images = lengths[:, 0].argsort(descending=True, stable=True)
        position = (images[:, None] * N + order[images]) * T                           # (B, N) of each caption's step 0
        active = lengths[images, :, None] > torch.arange(T)                            # (B, N, T)
        heights, widths = active.any(1).sum(0).tolist(), active.any(0).sum(0).tolist()
        self.sizes = [(b, n) for b, n in zip(heights, widths, strict=True) if b]
        rows = [(position[:b, :n] + t).flatten() for t, (b, n) in enumerate(self.sizes)]
        rows = torch.cat(rows)
        image = rows // (N * T)
        counts, order = torch.bincount(image, minlength=B), image.argsort(stable=True)
        slots = torch.empty_like(rows)
        slots[order] = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[image[order]] + image[order] * counts.max()
        self.rows_per_image = int(counts.max())                                        # Q
        # (S,) indices into B·N·T, into B and into B·Q; (B,) the order of the images
        self.rows, self.image_of_row, self.slots, self.images = (
            part.to(captions.device) for part in (rows, image, slots, images))

    def pack(self, x):
        """(B, N, T, ...) -> (S, ...)."""
        return x.flatten(0, 2)[self.rows]

    def unpack(self, packed):
        """(S, ...) -> (B, N, T, ...), zero at positions that were not computed."""
        x = packed.new_zeros(self.shape.numel(), *packed.shape[1:])
        return x.index_copy(0, self.rows, packed).unflatten(0, self.shape)

    def by_image(self, packed):
        """(S, ...) -> (B, Q, ...), the rows of each image together, zero-padded to the largest number Q of them;
        `from_images` is the inverse."""
        B, Q, sizes = self.shape[0], self.rows_per_image, packed.shape[1:]
        return packed.new_zeros(B * Q, *sizes).index_copy(0, self.slots, packed).view(B, Q, *sizes)

    def from_images(self, x):
        """(B, Q, ...) -> (S, ...)."""
        return x.flatten(0, 1)[self.slots]

    def split(self, packed):
        """(S, ...) -> a list of (b_t, n_t, ...), one per step."""
        parts = packed.split([b * n for b, n in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]


def word_rows(captions):
    """Indices (n,) into B·N·T of the positions of captions (..., T+1) that predict a word and not <pad>; on other
    devices than a CPU, where reading their number would wait for the device, a slice of all positions."""
    if captions.device.type != "cpu":
        return slice(None)
    return captions[..., 1:].flatten().nonzero().squeeze(1)


class StepWeight:
    """A weight (m, n) that is multiplied at every step t: z_t = ... + W x_t.

    Autograd would add one gradient of the weight's size at every step. Here it is one product over all steps,
    Σ_t g_t x_tᵀ with g_t the gradient at z_t: `connect` sends it to the weight, and `__call__` records x_t.
    """

    def __init__(self, weight, rule, d):
        self.weight, self.rule, self.d, self.inputs = weight, rule, d, []

    def connect(self, z):
        """z (S, m), the other terms of z_t of all steps, packed -> z, which then also sends the weight its gradient."""
        inputs = self.inputs
        return _SumOverSteps.apply(z, self.weight, lambda g: g.T @ torch.cat(inputs).to(g.dtype))

    def __call__(self, x):
        """x_t (..., n) -> W x_t (..., m), under the rule."""
        self.inputs.append(x.detach().flatten(0, -2))
        return self.rule.lstm_linear(x, self.weight.detach(), self.d)


class StepRegions:
    """Regions v (B, K, d) that attention weights at every step t: c_t = α_t v, called once per step, in order.

    As in `StepWeight`, the gradient of v is one product over all steps, Σ_t α_tᵀ g_t with g_t the gradient at c_t.
    """

    def __init__(self, v, steps):
        self.v, self.weights = v.detach()[steps.images], []
        weights, zeros = self.weights, v.new_zeros(len(steps.rows), v.shape[-1])

        def gradient(g):
            return torch.bmm(steps.by_image(torch.cat(weights).to(g.dtype)).mT, steps.by_image(g))
        self.connected = iter(steps.split(_SumOverSteps.apply(zeros, v, gradient)))

    def __call__(self, alpha):
        """α_t (b_t, n_t, K) -> c_t (b_t, n_t, d)."""
        self.weights.append(alpha.detach().flatten(0, 1))
        return next(self.connected) + alpha @ self.v[:len(alpha)]


class _SumOverSteps(Function):
    """z unchanged; `gradient` maps the gradient at z, of all steps, to that of a weight which all steps share."""

    @staticmethod
    def forward(ctx, z, weight, gradient):
        ctx.gradient = gradient
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):
        return g, ctx.gradient(g) if ctx.needs_input_grad[1] else None, None


class AdditiveScores(Function):
    """Σ_a w_a tanh(v_ka + q_a), the scores (B, N, K) of additive attention (docs/method.md, section 2).

    v (B, K, A); q (B, N, 1, A), or (B, N, K, 1) for one query per region; w (A,). The derivatives need one tensor
    (B, N, K, A) instead of three. tanh(x) = 2σ(2x) − 1, as PyTorch's σ takes a third of the time of its tanh on CPUs.
    """

    @staticmethod
    def forward(ctx, v, q, w):
        s = (v[:, None] + q).mul_(2).sigmoid_()                                        # (B, N, K, A)
        ctx.save_for_backward(s, w)
        ctx.per_region = q.shape[-1] == 1 and w.shape[0] != 1
        return 2 * (s @ w) - w.sum()

    @staticmethod
    def backward(ctx, g):
        s, w = ctx.saved_tensors
        # the derivative of tanh is 4 σ (1 − σ)
        slope = torch.addcmul(s, s, s, value=-1) * (4 * g[..., None])
        v = slope.sum(1) * w
        q = (slope @ w)[..., None] if ctx.per_region else slope.sum(2, keepdim=True) * w
        return v, q, 2 * (g.reshape(-1) @ s.flatten(0, -2)) - g.sum() if ctx.needs_input_grad[2] else None
