"""LRP-inference: weights against literal loops and model.lrp, and the loss against its equation."""
import numpy as np
import oracle
import pytest
import torch
from helpers import CAPTIONS, ENCODERS, MODELS, V, assert_close, inputs_of, make, random_regions
from torch.nn import functional as F

from captioning.explanation import lrp_inference
from captioning.explanation.derivatives import ratio
from captioning.training.losses import LRPInferenceLoss
from gridTDmodel import GridTDModel

SPECIAL = {0, 1, 2}
NO_STOP_WORD = torch.zeros(V, dtype=torch.bool)
PAIRS = torch.stack([CAPTIONS, CAPTIONS.flip(0)], 1)        # (B, 2, T + 1)


def literal_weights(model, c, h, word, eps):
    """ω of one step by the ε-rules of the oracle, starting from the logit."""
    y = (c + h).tolist()
    rows = model.W_o.weight[word].tolist()
    logit = oracle.affine([rows], [model.W_o.bias[word].item()], y)[0]
    omegas = []
    for part in (c.tolist(), h.tolist()):
        r = []
        for i, x in enumerate(part):
            at_y = oracle.share(rows[i] * y[i], logit, eps) * logit
            r.append(oracle.share(x, y[i], eps) * at_y)
        largest = max(map(abs, r))
        omegas.append(torch.tensor([1 + value / largest for value in r], dtype=torch.float64))
    return omegas


@MODELS
@pytest.mark.parametrize(("seed", "eps"), [(0, 0.01), (1, 0.03)])
def test_weights_equal_literal_loops(model_type, seed, eps):
    model = make(model_type, seed=seed)
    trace = model.teacher_force(random_regions(seed), CAPTIONS[:, None])
    words = model.W_o(trace.hidden).argmax(-1)              # (B, 1, T)
    omegas = lrp_inference.weights(model, trace.c_hat, trace.h, words, NO_STOP_WORD, eps=eps)
    for place in np.ndindex(words.shape):
        expected = literal_weights(model, trace.c_hat[place], trace.h[place], words[place], eps)
        for omega, literal in zip(omegas, expected, strict=True):
            assert_close(omega[place], literal, 1e-9)
    for omega in omegas:
        assert omega.min() >= 0 and omega.max() <= 2 and not omega.requires_grad
        # the most relevant entry has weight 0 or 2
        assert_close((omega - 1).abs().amax(-1), torch.ones(words.shape).double(), 1e-7)


def test_weights_never_lower_the_logit_of_their_word():
    """The proof of docs/method.md, section 7, on 2,000 random cases."""
    model = make(GridTDModel)
    generator = torch.Generator().manual_seed(0)
    c, h = torch.randn(2, 2000, 6, generator=generator, dtype=torch.float64)
    words = torch.randint(V, (2000,), generator=generator)
    weighted = lrp_inference.weighted_hidden(model, c, h, words, NO_STOP_WORD)
    increase = (model.W_o(weighted) - model.W_o(c + h)).gather(-1, words[:, None]).squeeze(-1)
    expected = 0
    for part in (c, h):
        contribution = part * model.W_o.weight[words]       # (2000, d) a_i W_wi
        relevance = contribution * ratio(c + h, 0.01)
        expected += (relevance * contribution).sum(-1) / relevance.abs().amax(-1)
    assert (increase > 0).all()
    torch.testing.assert_close(increase, expected)


@MODELS
@ENCODERS
def test_stop_words_keep_their_logits(model_type, encoder):
    model, images = make(model_type, encoder), inputs_of(encoder)
    if encoder:     # otherwise the model predicts the same word everywhere
        model.W_o.bias.data.zero_()
    plain = model(images, CAPTIONS)
    predicted = plain.argmax(-1)
    stop = {*SPECIAL, predicted[0, 0].item()}
    logits, weighted = model.lrp_inference(images, CAPTIONS, stop)
    torch.testing.assert_close(logits, plain)
    is_stop = torch.isin(predicted, torch.tensor(sorted(stop)))
    assert is_stop.any() and not is_stop.all()
    torch.testing.assert_close(weighted[is_stop], logits[is_stop])
    assert ((weighted - logits)[~is_stop].abs().amax(-1) > 1e-6).all()
    _, unweighted = model.lrp_inference(images, CAPTIONS, set(range(V)))
    torch.testing.assert_close(unweighted, plain)


@MODELS
def test_images_of_a_batch_are_independent(model_type):
    model, images = make(model_type), random_regions()
    batch = model.lrp_inference(images, CAPTIONS, SPECIAL)
    for b in range(3):
        alone = model.lrp_inference(images[b:b + 1], CAPTIONS[b:b + 1], SPECIAL)
        for logits, expected in zip(batch, alone, strict=True):     # p, p̃
            assert logits.shape == (3, 5, V)
            torch.testing.assert_close(logits[b], expected[0])


def assert_same_gradients(model, one, other, **tolerance):
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(x, parameters, allow_unused=True) for x in (one, other)]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


@MODELS
def test_no_gradient_flows_into_the_weights(model_type):
    """The gradient of p̃ is the one with constant ω."""
    model, features = make(model_type), random_regions()
    stop = lrp_inference.stop_mask(model, SPECIAL)
    _, weighted = model.lrp_inference(features, CAPTIONS, SPECIAL)
    trace = model.teacher_force(features, CAPTIONS[:, None])
    words = model.W_o(trace.hidden).argmax(-1)
    hidden = 0
    for part, omega in zip((trace.c_hat, trace.h), lrp_inference.weights(
            model, trace.c_hat, trace.h, words, stop), strict=True):
        hidden += torch.tensor(omega.tolist(), dtype=torch.float64) * part
    assert_same_gradients(model, weighted.square().sum(), model.W_o(hidden[:, 0]).square().sum())


def lrp_loss(model, trace, captions, stop):
    return LRPInferenceLoss(None, stop=stop, weight=0.7).word_loss(model, trace, captions)


@MODELS
def test_loss_is_the_sum_of_both_cross_entropies(model_type):
    """Equal to that of the two full products, although p̃ is computed only where it is not p."""
    model, features = make(model_type), random_regions()
    targets = PAIRS[..., 1:]
    predicted = torch.stack([model(features, captions).argmax(-1) for captions in PAIRS.unbind(1)],
                            1)
    stop = {*SPECIAL, predicted[0, 0, 0].item()}
    trace = model.teacher_force(features, PAIRS)
    loss, correct, words = lrp_loss(model, trace, PAIRS, lrp_inference.stop_mask(model, stop))
    loss = loss / words
    both = [model.lrp_inference(features, captions, stop) for captions in PAIRS.unbind(1)]
    p, p_weighted = (F.cross_entropy(torch.stack(logits, 1).flatten(0, -2), targets.flatten(),
                                     ignore_index=0) for logits in zip(*both, strict=True))
    torch.testing.assert_close(loss, p + 0.7 * p_weighted, check_dtype=False)
    assert words == (targets != 0).sum()
    assert correct == ((predicted == targets) & (targets != 0)).sum()
    assert_same_gradients(model, loss, p + 0.7 * p_weighted, rtol=1e-5, atol=1e-7)


@MODELS
def test_both_logits_have_the_same_dropout_mask(model_type):
    model = make(model_type)
    model.dropout.train()
    logits, weighted = model.lrp_inference(random_regions(), CAPTIONS, set(range(V)))
    torch.testing.assert_close(logits, weighted)
    assert not torch.allclose(logits, model(random_regions(), CAPTIONS))
    assert logits.isfinite().all()


@MODELS
def test_the_loss_has_one_dropout_mask_for_both_logits(model_type):
    """Its value equals that of the two full products with the mask of the same seed."""
    model = make(model_type, dropout=0.5)
    trace = model.teacher_force(random_regions(), CAPTIONS[:, None])
    rows = CAPTIONS[:, 1:].flatten() != 0
    targets = CAPTIONS[:, 1:].flatten()[rows]
    c_hat, h, hidden = (x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h, trace.hidden))
    model.dropout.train()
    torch.manual_seed(5)
    mask = model.dropout(torch.ones_like(hidden))
    logits = model.W_o(mask * hidden)
    weighted = lrp_inference.weighted_hidden(model, c_hat, h, logits.argmax(-1), NO_STOP_WORD)
    p = F.cross_entropy(logits, targets)
    p_weighted = F.cross_entropy(model.W_o(mask * weighted), targets)
    for stop, expected in ((~NO_STOP_WORD, 1.7 * p), (NO_STOP_WORD, p + 0.7 * p_weighted)):
        torch.manual_seed(5)
        loss, _, words = lrp_loss(model, trace, CAPTIONS[:, None], stop)
        loss = loss / words
        torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    for other in (p, p_weighted):       # the mask matters
        assert abs(other - F.cross_entropy(model.W_o(hidden), targets)) > 0.01
