"""The rules as a context: each entry of the table against its equation, and what is refused."""
import threading

import oracle
import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional as F

from captioning import LRP
from captioning.explanation.rules import Gradient, Guided

EPS = 0.1


def random(*shape, seed=0):
    """Normal random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explained(function, *inputs, rule=None):
    """The relevance of each input for R(y) = y, and y, of y = function(*inputs) under a rule."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with rule or LRP(EPS):
        y = function(*leaves)
    assert_close(y, function(*inputs))      # no rule changes values
    r = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    relevance = [0 * x if part is None else x * part for x, part in zip(inputs, r, strict=True)]
    return *relevance, y.detach()


def stabilised(y, eps=EPS):
    """y + ε sign y"""
    return torch.where(y >= 0, y + eps, y - eps)


# -- the table -------------------------------------------------------------------------------------

X = random(2, 4, seed=1)
OTHER = random(2, 4, seed=2)
W = random(3, 4, seed=3)
b = random(3, seed=4)
PICTURE = random(1, 2, 4, 4, seed=5)


@pytest.mark.parametrize("function", [
    lambda x: F.linear(x, W, b),
    lambda x: F.linear(input=x, weight=W, bias=b),
    lambda x: x @ W.T + b,
    lambda x: torch.mm(x, W.T) + b,
    lambda x: b + torch.bmm(x[None], W.T[None])[0],
    lambda x: (W @ x.mT).mT + b,
    lambda x: b.add(x.matmul(W.T))])
def test_linear_layers(function):
    relevance, z = explained(function, X)
    for one, x, row in zip(relevance, X.tolist(), z.tolist(), strict=True):
        expected = oracle.linear_rule(W.tolist(), x, row, row, EPS)
        assert_close(one, torch.tensor(expected, dtype=torch.float64))


def test_a_sum_of_linear_layers_is_one_linear_layer():
    """It has one ε, however its terms are cut into pieces; a state of zeros changes nothing."""
    both = torch.cat([X, OTHER], 1)
    weight = torch.cat([W, 2 * W], 1)
    expected, z = explained(lambda x: F.linear(x, weight, b), both)

    def in_pieces(x, y):
        pieces = zip(F.linear(x, W, b).chunk(3, 1), F.linear(y, 2 * W).chunk(3, 1), strict=True)
        return torch.cat([p + q for p, q in pieces], 1)
    for function in (
            in_pieces,
            lambda x, y: F.linear(x, W) + F.linear(y, 2 * W, b),
            lambda x, y: b + (x @ W.T) - y @ (-2 * W.T),
            lambda x, y: F.linear(x, W, b)[:, None].squeeze(1) + F.linear(y, 2 * W),
            lambda x, y: F.linear(x, W, b) + F.linear(y, 2 * W) + F.linear(0 * X, W)):
        of_x, of_y, y = explained(function, X, OTHER)
        assert_close(torch.cat([of_x, of_y], 1), expected)
        assert_close(y, z)


def test_a_sum_of_other_signals_has_its_own_epsilon():
    def function(x, y):
        return F.linear(x, W).relu() + F.linear(y, W).relu()
    of_x, of_y, total = explained(function, X, OTHER)
    for x, relevance in ((X, of_x), (OTHER, of_y)):
        z = x @ W.T
        at_z = z.relu() / stabilised(total) * total
        assert_close(relevance, (W * x[:, None] * (at_z / stabilised(z))[..., None]).sum(1))


def test_a_linear_layer_that_is_used_twice():
    """As a term of a sum it shares that sum's ε; elsewhere it has its own."""
    relevance, _ = explained(lambda x: torch.cat([(z := x @ W.T) + 1, z.relu()], 1), X)
    z = X @ W.T
    r = (z + 1) / stabilised(z + 1) + (z > 0) * z / stabilised(z)
    assert_close(relevance, X * (r @ W))


@pytest.mark.parametrize(("function", "share"), [
    (lambda x, y: x + y, lambda x, y: (x, y)),
    (lambda x, y: torch.add(x, y), lambda x, y: (x, y)),
    (lambda x, y: x - y, lambda x, y: (x, -y)),
    (lambda x, y: x.clone().add_(y), lambda x, y: (x, y)),
    (lambda x, y: sum([y, x]), None),
    (lambda x, y: 3 + x, lambda x, y: (x, 0 * y)),
    (lambda x, y: x + torch.zeros(4), lambda x, y: (x, 0 * y))])
def test_sums(function, share):
    of_x, of_y, total = explained(function, X, OTHER)
    factor = total / stabilised(total)
    if share is None:       # Python's sum begins with 0 + y, a sum as well
        of_y = of_y * stabilised(OTHER) / OTHER
        share = lambda x, y: (x, y)     # noqa: E731
    for relevance, part in zip((of_x, of_y), share(X, OTHER), strict=True):
        assert_close(relevance, part * factor)


@pytest.mark.parametrize(("function", "share"), [
    (lambda x: x.sum(1), X),
    (lambda x: torch.sum(x, 1), X),
    (lambda x: x.mean(-1), X / 4)])
def test_totals(function, share):
    relevance, total = explained(function, X)
    assert_close(relevance, share * (total / stabilised(total))[:, None])


@pytest.mark.parametrize("function", [
    lambda x: 3 * x, lambda x: x * OTHER, lambda x: x.mul(OTHER), lambda x: x / 7,
    lambda x: torch.div(x, OTHER), lambda x: x * F.linear(x, random(4, 4)).sigmoid(),
    lambda x: (x @ x.mT).softmax(-1)[:, :1] * x, torch.tanh, lambda x: x.clone().tanh_(), F.relu6,
    nn.Hardtanh(-2, 3), nn.LeakyReLU(0.2), lambda x: nn.LeakyReLU(0.2, inplace=True)(x.clone()),
    torch.relu, lambda x: x.clone().relu_(), nn.ReLU(), lambda x: nn.ReLU(inplace=True)(x.clone()),
    lambda x: x.T.reshape(4, 2).flip(0).repeat(2, 1)[:4].flip(0).T,
    lambda x: torch.where(x > 0, x, 0).masked_fill(x > 1, 0), lambda x: torch.stack([x, -x]) * 2])
def test_relevance_passes_unchanged(function):
    """Products with constants, of which gates are an example, activations, and what moves numbers.

    All of them are entry by entry: R(x_i) is the sum of R(y) = y over the places where x_i is."""
    relevance, y = explained(function, X)
    assert_close(relevance, y if y.shape == X.shape else y[0] + y[1])


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: x.softmax(-1), F.sigmoid,
                                      lambda x: x.clone().sigmoid_()])
def test_gates_and_attention_weights_are_constants(function):
    leaf = X.clone().requires_grad_()
    with LRP():
        y = function(leaf)
    assert not y.requires_grad
    assert_close(y, function(X))


@pytest.mark.parametrize(("pool", "axes"), [
    (nn.AdaptiveAvgPool2d(1), (2, 3)), (nn.AdaptiveAvgPool2d((1, 4)), (2,))])
def test_adaptive_pooling_is_a_mean(pool, axes):
    expected, _ = explained(lambda x: x.mean(axes, keepdim=True), PICTURE)
    assert_close(explained(pool, PICTURE)[0], expected)


def batch_norm(channels):
    """A batch-norm in evaluation mode with random statistics and weights."""
    norm = nn.BatchNorm2d(channels).double().eval()
    for number, values in enumerate((norm.running_mean, norm.weight.data, norm.bias.data)):
        values.copy_(random(channels, seed=number))
    norm.running_var.copy_(random(channels, seed=3).abs() + 0.5)
    return norm


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_is_part_of_the_convolution_before_it(bias):
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=bias).double().eval()
    norm = batch_norm(3)
    folded = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    expected, _ = explained(folded, PICTURE)
    assert_close(explained(nn.Sequential(conv, norm), PICTURE)[0], expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell])
def test_lstms(kind):
    """Against the oracle's rule of one step after the other, from h_T back to the inputs."""
    torch.manual_seed(0)
    layer = kind(4, 3, **{"batch_first": True} if kind is nn.LSTM else {}).double()
    layer.requires_grad_(False)
    x = random(1, 3, 4)

    def function(x):
        if kind is nn.LSTM:
            return layer(x)[0][:, -1]
        state = None
        for t in range(3):
            state = layer(x[:, t], state)
        return state[0]
    relevance, h = explained(function, x)
    cell = next(iter(oracle.parameters(nn.ModuleDict({"cell": layer})).values()))
    steps = []
    state = [0.0] * 3, [0.0] * 3
    for t in range(3):
        steps.append(oracle.lstm_step(cell, x[0, t].tolist(), *state))
        state = steps[-1]["h"], steps[-1]["c"]
    r_h, r_c = h[0].tolist(), [0.0] * 3
    for t in (2, 1, 0):
        r_x, r_h, r_c = oracle.lstm_rule(cell, steps[t], r_h, r_c, EPS)
        assert_close(relevance[0, t], torch.tensor(r_x, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "num_layers": 2},
                                     {"batch_first": True, "bidirectional": True}])
def test_an_lstm_of_another_form_is_refused(options):
    with pytest.raises(NotImplementedError, match="batch_first=True"):
        explained(nn.LSTM(4, 3, **options).double(), random(1, 3, 4))


# -- what has no rule ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "function"), [
    ("exp", torch.exp), ("exp", lambda x: torch.exp(input=x)), ("cumsum", lambda x: x.cumsum(1)),
    ("pow", lambda x: x ** 2), ("max", lambda x: x.max(1).values), ("elu", F.elu),
    ("normalize", lambda x: F.normalize(x)), ("einsum", lambda x: torch.einsum("ij->j", x)),
    ("matmul", lambda x: x @ x.mT), ("rdiv", lambda x: 1 / x),
    ("div", lambda x: torch.div(1, x)), ("linear", lambda x: F.linear(x, x)),
    ("exp", lambda x: x.clone().exp_())])
def test_relevance_that_reaches_an_unknown_function_raises_an_error(name, function):
    """In the backward pass, which relevance takes; a function before a softmax is never reached."""
    leaf = X.clone().requires_grad_()
    with LRP():
        y = function(leaf)
        weighted = y.flatten()[:1].softmax(-1) * leaf
    with pytest.raises(NotImplementedError, match=f"no rule for {name}"):
        y.sum().backward()
    weighted.sum().backward()
    assert_close(leaf.grad, torch.ones_like(leaf))


def test_batch_norm_elsewhere_is_refused():
    norm = batch_norm(2)
    for function in (norm, nn.Sequential(nn.Conv2d(2, 2, 1), norm).double().train()):
        with pytest.raises(NotImplementedError, match="after a convolution only"):
            explained(function, PICTURE)


@pytest.mark.parametrize("change", [
    lambda y: y.add_(1), lambda y: y.relu_(), lambda y: y.exp_(), lambda y: F.relu(y, inplace=True),
    lambda y: torch.relu_(y)])
@pytest.mark.parametrize("rule", [LRP, Guided])
def test_a_tensor_changed_in_place_is_right_or_refused(rule, change):
    """The result of a change in place may be another tensor under a rule, so that x is stale."""
    def function(x):
        y = x * 1
        change(y)
        return y * 2
    try:
        explained(function, X, rule=rule())
    except NotImplementedError as error:
        assert "changed in place" in str(error)


# -- when a rule is active -------------------------------------------------------------------------


def is_active():
    """Whether a gate is a constant."""
    return not X.clone().requires_grad_().sigmoid().requires_grad


def test_a_rule_ends_with_its_context():
    with LRP():
        assert is_active()
        with LRP():
            assert is_active()
        assert is_active()
    assert not is_active()
    with pytest.raises(ValueError, match="from inside"), LRP():
        raise ValueError("from inside")
    assert not is_active()
    rule = LRP()
    with rule, rule:
        with pytest.raises(ValueError, match="from inside"), rule:
            raise ValueError("from inside")
        assert is_active()
    assert not is_active()


def test_other_threads_have_no_rule():
    seen = []
    with LRP():
        thread = threading.Thread(target=lambda: seen.append(is_active()))
        thread.start()
        thread.join()
        assert is_active()
    assert seen == [False]


@pytest.mark.parametrize("outer", [LRP(0.5), Guided(), Gradient()])
@pytest.mark.parametrize("inner", [LRP(EPS), Guided(), Gradient()])
def test_of_nested_rules_the_inner_one_counts(outer, inner):
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()

    def function(x):
        with inner:
            return layers(x)
    expected = explained(layers, PICTURE, rule=inner)
    for one, other in zip(explained(function, PICTURE, rule=outer), expected, strict=True):
        assert_close(one, other)


def test_the_backward_pass_may_be_inside_the_context():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    expected, y = explained(layers, PICTURE)
    leaf = PICTURE.clone().requires_grad_()
    with LRP(EPS):
        r, = torch.autograd.grad(layers(leaf), leaf, torch.ones_like(y))
    assert_close(PICTURE * r, expected)


# -- whole models ----------------------------------------------------------------------------------


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(),
                         nn.Linear(5, 3)).double()


def residual():
    """A small ResNet with a block of torchvision's: batch-norm, shortcut, changes in place."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    down = nn.Sequential(nn.Conv2d(16, 64, 1, stride=2, bias=False), batch_norm(64))
    block = resnet.Bottleneck(16, 16, stride=2, downsample=down)
    block.bn1, block.bn2, block.bn3 = map(batch_norm, (16, 16, 64))
    return nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), batch_norm(16), nn.ReLU(inplace=True),
                         block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("architecture", [perceptron, residual])
def test_relevance_is_conserved_without_biases_and_eps(architecture):
    torch.manual_seed(1)
    model = architecture().double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(0 if "bias" in name else 1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.zero_()
    x = X if architecture is perceptron else PICTURE
    relevance, y = explained(lambda x: model(x)[:, 1], x, rule=LRP(eps=0))
    assert y.abs().min() > 1e-4
    assert_close(relevance.flatten(1).sum(1), y, 1e-9)
