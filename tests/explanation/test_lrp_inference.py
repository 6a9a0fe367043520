"""LRP-inference: weights against literal loops and model.lrp, and the loss against its equation."""
import math

import numpy as np
import oracle
import pytest
import torch
from helpers import CAPTIONS, make, max_pooled, random_images, random_regions
from torch.nn import functional as F

from aoamodel import AOAModel
from captioning.explanation import lrp_inference
from captioning.explanation.derivatives import ratio
from captioning.explanation.rules import LRP
from captioning.training.losses import lrp_loss
from gridTDmodel import GridTDModel

MODELS = [GridTDModel, AOAModel]
SPECIAL = {0, 1, 2}


def trace_of(model, features, captions=CAPTIONS):
    return model.teacher_force(features, captions[:, None])


def literal_weights(model, c, h, word, eps=0.01):
    """ω of one step by the ε-rules of the oracle, starting from the logit."""
    y, rows, bias = c + h, model.W_o.weight[word].tolist(), model.W_o.bias[word].item()
    logit = sum(w * x for w, x in zip(rows, y.tolist(), strict=True)) + bias
    omegas = []
    for part in (c.tolist(), h.tolist()):
        r = []
        for i, x in enumerate(part):
            at_y = oracle.share(rows[i] * y[i].item(), logit, eps) * logit
            r.append(oracle.share(x, y[i].item(), eps) * at_y)
        largest = max(map(abs, r))
        omegas.append([1 + value / largest for value in r])
    return omegas


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_equal_literal_loops(model_type, seed):
    model = make(model_type, seed=seed)
    trace = trace_of(model, random_regions(seed))
    words = model.W_o(trace.hidden).argmax(-1)                                         # (B, 1, T)
    stop = torch.zeros(len(model.W_o.bias), dtype=torch.bool)
    omegas = lrp_inference.weights(model, trace.c_hat, trace.h, words, stop)
    for b, t in np.ndindex(words.shape[0], words.shape[2]):
        expected = literal_weights(model, trace.c_hat[b, 0, t], trace.h[b, 0, t], words[b, 0, t])
        for omega, literal in zip(omegas, expected, strict=True):
            np.testing.assert_allclose(omega[b, 0, t].numpy(), literal, rtol=0, atol=1e-9)
    for omega in omegas:
        assert omega.min() >= 0 and omega.max() <= 2 and not omega.requires_grad
        # the most relevant entry has weight 0 or 2
        torch.testing.assert_close((omega - 1).abs().amax(-1), torch.ones_like(words, dtype=torch.float64))


def test_weights_never_lower_the_logit_of_their_word():
    """The proof of docs/method.md, section 7, on 2,000 random cases."""
    model = make(GridTDModel)
    generator = torch.Generator().manual_seed(0)
    c, h = torch.randn(2, 2000, len(model.W_o.weight[0]), generator=generator, dtype=torch.float64)
    words = torch.randint(len(model.W_o.bias), (2000,), generator=generator)
    stop = torch.zeros(len(model.W_o.bias), dtype=torch.bool)
    weighted = lrp_inference.weighted_hidden(model, c, h, words, stop)
    logits, increased = (model.W_o(x).gather(-1, words[:, None]).squeeze(-1) for x in (c + h, weighted))
    expected = 0
    for part in (c, h):
        contribution = part * model.W_o.weight[words]                                  # (2000, d) a_i W_wi
        relevance = contribution * ratio(c + h, 0.01)
        expected = expected + (relevance * contribution).sum(-1) / relevance.abs().amax(-1)
    assert (increased > logits).all()
    torch.testing.assert_close(increased - logits, expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_weights_equal_the_first_stage_of_lrp(model_type):
    """R(ĉ) and R(h) of the predicted words, as model.lrp computes them."""
    model, features, eps = make(model_type), random_regions(), 0.03
    trace = trace_of(model.requires_grad_(False), features)
    words = model.W_o(trace.hidden).argmax(-1)
    c_hat, h = trace.c_hat.clone().requires_grad_(), trace.h.clone().requires_grad_()
    with LRP(eps):
        logits = model.W_o(c_hat + h).gather(-1, words[..., None])
    omegas = lrp_inference.weights(model, c_hat, h, words, torch.zeros(len(model.W_o.bias), dtype=torch.bool), eps)
    for part, omega, r in zip((c_hat, h), omegas, torch.autograd.grad(logits.sum(), (c_hat, h)), strict=True):
        relevance = part.detach() * r
        torch.testing.assert_close(omega - 1, relevance / relevance.abs().amax(-1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("encoder", [None, max_pooled])
def test_stop_words_keep_their_logits(model_type, encoder):
    model, images = make(model_type, encoder), random_images() if encoder else random_regions()
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
    _, unweighted = model.lrp_inference(images, CAPTIONS, set(range(len(model.W_o.bias))))
    torch.testing.assert_close(unweighted, plain)


@pytest.mark.parametrize("model_type", MODELS)
def test_images_and_captions_of_a_batch_are_independent(model_type):
    model, images = make(model_type), random_regions()
    captions = torch.stack([CAPTIONS, CAPTIONS.flip(0)], 1)                            # (B, 2, T + 1)
    for kind, batch_logits in enumerate(model.lrp_inference(images, captions, SPECIAL)):      # p, p̃
        assert batch_logits.shape == (3, 2, 5, len(model.W_o.bias))
        for b, n in np.ndindex(3, 2):
            alone = model.lrp_inference(images[b:b + 1], captions[b, n][None], SPECIAL)[kind][0]
            torch.testing.assert_close(batch_logits[b, n], alone)


@pytest.mark.parametrize("model_type", MODELS)
def test_no_gradient_flows_into_the_weights(model_type):
    """The gradient of p̃ is the one with constant ω."""
    model, features = make(model_type), random_regions()
    stop = lrp_inference.stop_mask(model, SPECIAL)
    _, weighted = model.lrp_inference(features, CAPTIONS, stop)
    gradients = torch.autograd.grad(weighted.square().sum(), list(model.parameters()), allow_unused=True)
    trace = trace_of(model, features)
    words = model.W_o(trace.hidden).argmax(-1)
    omega_c, omega_h = (torch.tensor(omega.tolist(), dtype=torch.float64)
                        for omega in lrp_inference.weights(model, trace.c_hat, trace.h, words, stop))
    expected = torch.autograd.grad(model.W_o(omega_c * trace.c_hat + omega_h * trace.h).square().sum(),
                                   list(model.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("model_type", MODELS)
def test_loss_is_the_sum_of_both_cross_entropies(model_type):
    """Value and gradient equal those of the two full products, although p̃ is computed only where it differs from p."""
    model, features = make(model_type), random_regions()
    captions = torch.stack([CAPTIONS, CAPTIONS.flip(0)], 1)
    predicted = model(features, captions).argmax(-1)
    stop = lrp_inference.stop_mask(model, {*SPECIAL, predicted[0, 0, 0].item()})
    trace = model.teacher_force(features, captions)
    loss, correct, words = lrp_loss(model, trace, captions, stop, 0.7)
    loss = loss / words
    targets = captions[..., 1:]
    logits, weighted = model.lrp_inference(features, captions, stop)
    p, p_weighted = (F.cross_entropy(x.flatten(0, -2), targets.flatten(), ignore_index=0) for x in (logits, weighted))
    torch.testing.assert_close(loss, p + 0.7 * p_weighted, check_dtype=False)
    assert words == (targets != 0).sum() and correct == ((predicted == targets) & (targets != 0)).sum()
    parameters = list(model.parameters())
    for actual, wanted in zip(torch.autograd.grad(loss, parameters, allow_unused=True),
                              torch.autograd.grad(p + 0.7 * p_weighted, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", MODELS)
def test_both_logits_have_the_same_dropout_mask(model_type):
    model = make(model_type)
    model.dropout.train()
    logits, weighted = model.lrp_inference(random_regions(), CAPTIONS, set(range(len(model.W_o.bias))))
    torch.testing.assert_close(logits, weighted)
    assert not torch.allclose(logits, model(random_regions(), CAPTIONS))
    assert math.isfinite(logits.sum().item())


@pytest.mark.parametrize("model_type", MODELS)
def test_the_loss_has_one_dropout_mask_for_both_logits(model_type):
    """Its value equals that of the two full products with the mask of the same seed."""
    model = make(model_type, dropout=0.5)
    trace, targets = trace_of(model, random_regions()), CAPTIONS[:, 1:]
    rows, keep = targets.flatten() != 0, model.dropout.train()
    torch.manual_seed(5)
    mask = keep(torch.ones_like(trace.hidden.flatten(0, -2)[rows]))
    c_hat, h, hidden = (x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h, trace.hidden))
    logits = model.W_o(mask * hidden)
    p = F.cross_entropy(logits, targets.flatten()[rows])
    every = torch.ones(len(model.W_o.bias), dtype=torch.bool)
    weighted = lrp_inference.weighted_hidden(model, c_hat, h, logits.argmax(-1), ~every)
    p_weighted = F.cross_entropy(model.W_o(mask * weighted), targets.flatten()[rows])
    for stop, expected in ((every, 1.7 * p), (~every, p + 0.7 * p_weighted)):
        torch.manual_seed(5)
        loss, _, words = lrp_loss(model, trace, CAPTIONS[:, None], stop, 0.7)
        loss = loss / words
        torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    for other in (p, p_weighted):       # the mask matters
        assert abs(other - F.cross_entropy(model.W_o(hidden), targets.flatten()[rows])) > 0.01
