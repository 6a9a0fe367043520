"""Both models: one set of equations serves training, decoding and explanation."""
import pytest
import torch
from helpers import published_state
from torch import nn

from aoamodel import AOAModel
from captioning.errors import InputError
from captioning.explanation.rules import Gradient
from gridTDmodel import GridTDModel

V, B, T = 17, 3, 6


def small_encoder():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1),
                         nn.ReLU())


def make(model_type, encoder="cnn", **options):
    torch.manual_seed(3)
    encoder = small_encoder() if encoder == "cnn" else encoder
    own = {"attention_dim": 16} if model_type is GridTDModel else {"num_head": 3}
    return model_type(V, 8, 12, encoder=encoder, **(own | options)).double().eval()


def inputs(channels=3, side=8):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(B, channels, side, side, generator=generator, dtype=torch.float64)
    captions = torch.randint(1, V, (B, T + 1), generator=generator)
    captions[1, 4:] = 0
    return images, captions


@pytest.fixture(params=[GridTDModel, AOAModel])
def model(request):
    return make(request.param)


def test_steps_equal_teacher_forcing(model):
    images, captions = inputs()
    logits = model(images, captions)
    assert logits.shape == (B, T, V)
    context, state = model.start(model.encode(images)), model.initial_state(B)
    for t in range(T):
        step, state, attention = model.step(captions[:, t:t + 1], state, context)
        torch.testing.assert_close(step[:, 0], logits[:, t], rtol=0, atol=1e-12)
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))


def test_several_captions_per_image_equal_one_at_a_time(model):
    images, captions = inputs()
    several = torch.stack([captions, captions.flip(0)], dim=1)                         # (B, 2, T+1)
    logits = model(images, several)
    assert logits.shape == (B, 2, T, V)
    torch.testing.assert_close(logits[:, 1], model(images, captions.flip(0)), rtol=0, atol=1e-12)


def test_unrolled_rule_equals_fused_forward(model):
    images, captions = inputs()
    with Gradient():
        trace = model.teacher_force(model.encode(images), captions[:, None])
    torch.testing.assert_close(model.output(trace.hidden)[:, 0], model(images, captions), rtol=0, atol=1e-12)


def test_features_and_images_give_equal_logits(model):
    images, captions = inputs()
    features = model.encode(images)
    assert features.shape == (B, 16, 5)
    torch.testing.assert_close(model(features, captions), model(images, captions))


@pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
def test_zero_regions_are_ignored(model_type):
    model = make(model_type, encoder=None, feature_dim=7)
    _, captions = inputs()
    features = torch.rand(B, 6, 7, dtype=torch.float64)
    padded = torch.cat([features, torch.zeros(B, 3, 7, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(model(padded, captions), model(features, captions), rtol=0, atol=1e-12)


def test_grid_attention_follows_the_equations():
    for per_region in (False, True):
        model = make(GridTDModel, query_per_region=per_region)
        context = model.start(model.encode(inputs()[0]))
        h1, s = torch.randn(2, B, 1, 12, dtype=torch.float64).unbind(0)
        alpha, beta = model.attend(h1, s, context)
        v, q = context.v[0], model.W_q(h1[0, 0])
        scores = []
        for k in range(16):
            query = q[k] if per_region else q
            scores.append(model.w_a(torch.tanh(model.W_a(v[k]) + query)).item())
        sentinel = model.w_a(torch.tanh(model.W_s(s[0, 0]) + q)).item()
        torch.testing.assert_close(alpha[0, 0], torch.tensor(scores, dtype=torch.float64).softmax(0))
        assert beta[0, 0].item() == pytest.approx(torch.tensor([*scores, sentinel]).double().softmax(0)[-1].item())


def test_initial_attention_weights_can_learn(model):
    images, captions = inputs()
    model.train()
    loss = model(images, captions).logsumexp(-1).sum()
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_passes_add_up_their_gradients(model):
    """Twice the same pass has twice the gradient: no parameters share the memory of their gradients."""
    (images, captions), gradients = inputs(), []
    for _ in range(2):
        model(images, captions).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], [2 * gradient for gradient in gradients[0]])


def test_load_published(model):
    images, captions = inputs()
    torch.manual_seed(99)
    other = type(model)(**{**model.config, "encoder": small_encoder()}).double().eval()
    other.load_published(published_state(model))
    if isinstance(model, GridTDModel):
        assert other.query_per_region
        model.query_per_region = True
    torch.testing.assert_close(other(images, captions), model(images, captions))


def test_load_published_checkpoint_of_the_other_model(model):
    other = make(AOAModel if isinstance(model, GridTDModel) else GridTDModel)
    with pytest.raises(InputError, match="other model type"):
        other.load_published(published_state(model))
