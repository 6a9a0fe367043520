"""Both models: one set of equations serves training, decoding and explanation."""
import pytest
import torch
from helpers import (
    CAPTIONS,
    MODEL_TYPES,
    MODELS,
    T,
    V,
    assert_close,
    make,
    max_pooled,
    published_state,
    random_images,
    random_regions,
    refused,
)
from torch.nn import functional as F

from aoamodel import AOAModel
from gridTDmodel import GridTDModel

# three images with two captions each, of 1 to 5 words
PAIRS = torch.stack([CAPTIONS, CAPTIONS.flip(0)], 1)


@pytest.fixture(params=MODEL_TYPES)
def model(request):
    return make(request.param, max_pooled)


@MODELS
def test_steps_equal_teacher_forcing(model_type):
    """Logits, and gradients of captions of different lengths: autograd through single steps."""
    model = make(model_type)
    features = random_regions()
    logits = model.output(model.teacher_force(features, PAIRS).hidden)
    assert logits.shape == (3, 2, T, V)
    context, state = model.start(features), model.initial_state(3, 2)
    steps = []
    for t in range(T):
        step, state, attention = model.step(PAIRS[..., t], state, context)
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1], dtype=torch.float64))
        steps.append(step)
    assert_close(torch.stack(steps, 2), logits)

    targets = PAIRS[..., 1:].flatten()
    parameters = dict(model.named_parameters())
    trace = model.teacher_force(features, PAIRS)
    gradients = []
    for result in (torch.stack(steps, 2), model.output(trace.hidden)):
        loss = F.cross_entropy(result.flatten(0, 2), targets, ignore_index=0)
        gradients.append(torch.autograd.grad(loss, parameters.values()))
    for name, one, other in zip(parameters, *gradients, strict=True):
        # the softmax cancels a shift of all keys
        assert name == "W_K.bias" or other.abs().max() > 1e-5, name
        assert_close(one, other)


def test_several_captions_per_image_equal_one_at_a_time(model):
    images = random_images()
    logits = model.output(model.teacher_force(model.encode(images), PAIRS).hidden)
    for n, captions in enumerate(PAIRS.unbind(1)):
        assert_close(logits[:, n], model(images, captions))


@pytest.mark.parametrize("per_region", [False, True])
def test_grid_attention_follows_the_equations(per_region):
    model = make(GridTDModel, max_pooled, attention_dim=16, query_per_region=per_region)
    context = model.start(model.encode(random_images()))
    h1, s = torch.randn(2, 3, 1, 6, dtype=torch.float64)
    alpha, beta = model.attend(h1, s, context)
    q = model.W_q(h1[0, 0])
    scores = []
    for k in range(16):
        query = q[k] if per_region else q
        scores.append(model.w_a(torch.tanh(model.W_a(context.v[0, k]) + query)))
    assert_close(alpha[0, 0], torch.cat(scores).softmax(0))
    scores.append(model.w_a(torch.tanh(model.W_s(s[0, 0]) + q)))
    assert_close(beta[0, 0], torch.cat(scores).softmax(0)[-1:])


def test_every_weight_learns_and_passes_add_up_their_gradients(model):
    """Twice the same pass has twice the gradient: parameters share no memory of gradients."""
    model.train().dropout.eval()
    if isinstance(model, AOAModel):
        model.attention_dropout.eval()
    gradients = []
    for _ in range(2):
        model(random_images(), CAPTIONS).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], [2 * gradient for gradient in gradients[0]])


@MODELS
def test_load_published(model_type):
    model, other = (make(model_type, max_pooled, seed, **{"attention_dim": 16}
                         if model_type is GridTDModel else {}) for seed in (0, 99))
    other.load_published(published_state(model))
    if model_type is GridTDModel:
        assert other.query_per_region
        model.query_per_region = True
    assert_close(other(random_images(), CAPTIONS), model(random_images(), CAPTIONS))
    wrong = make(AOAModel if model_type is GridTDModel else GridTDModel, max_pooled)
    with refused("other model type"):
        wrong.load_published(published_state(model))
