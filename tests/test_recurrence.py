"""Teacher forcing without padding, gradients summed over steps, and the additive attention's scores."""
import pytest
import torch
from helpers import make, random_regions

from aoamodel import AOAModel
from captioning.recurrence import AdditiveScores, Steps
from captioning.training.losses import cross_entropy
from gridTDmodel import GridTDModel

# three images with two captions each, of 1 to 5 words
CAPTIONS = torch.tensor([[[1, 7, 2, 0, 0, 0], [1, 7, 3, 3, 9, 2]],
                         [[1, 4, 11, 2, 0, 0], [1, 2, 0, 0, 0, 0]],
                         [[1, 5, 4, 2, 0, 0], [1, 3, 3, 2, 0, 0]]])


def test_most_padding_is_skipped_and_every_word_is_computed():
    steps = Steps(CAPTIONS, skip_padding=True)
    assert steps.sizes == [(3, 2), (3, 2), (3, 2), (1, 1), (1, 1)]
    x = torch.arange(1.0, 31).view(3, 2, 5)
    restored = steps.unpack(steps.pack(x))
    is_word = CAPTIONS[..., 1:] != 0
    assert torch.equal(restored[is_word], x[is_word])
    assert (restored == 0).sum() == 30 - len(steps.rows)
    assert torch.equal(torch.cat([part.flatten() for part in steps.split(steps.pack(x))]), steps.pack(x))
    assert torch.equal(steps.from_images(steps.by_image(steps.pack(x))), steps.pack(x))
    assert torch.equal(Steps(CAPTIONS).unpack(Steps(CAPTIONS).pack(x)), x)


@pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
def test_skipping_padding_changes_neither_logits_nor_gradients(model_type):
    model, features = make(model_type), random_regions()
    whole = model.teacher_force(features, CAPTIONS)
    packed = model.teacher_force(features, CAPTIONS, skip_padding=True)
    is_word = CAPTIONS[..., 1:] != 0
    for name in ("c_hat", "h", "hidden", "attention"):
        torch.testing.assert_close(getattr(packed, name)[is_word], getattr(whole, name)[is_word], rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(cross_entropy(model, trace, CAPTIONS)[0], list(model.parameters()))
                 for trace in (whole, packed)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
def test_gradients_equal_those_of_single_steps(model_type):
    """Autograd through `step`, one word after the other, knows nothing of the sums over steps."""
    model, features, captions = make(model_type), random_regions(), CAPTIONS[:, 1:]
    targets, parameters = captions[..., 1:].flatten(), list(model.parameters())
    context, state, logits = model.start(features), model.initial_state(3), []
    for t in range(5):
        step, state, _ = model.step(captions[..., t], state, context)
        logits.append(step)
    loss = torch.nn.functional.cross_entropy(torch.stack(logits, 2).flatten(0, 2), targets, ignore_index=0)
    expected = torch.autograd.grad(loss, parameters)
    trace = model.teacher_force(features, captions, skip_padding=True)
    actual = torch.autograd.grad(cross_entropy(model, trace, captions)[0], parameters)
    for name, one, other in zip(dict(model.named_parameters()), actual, expected, strict=True):
        assert name == "W_K.bias" or other.abs().max() > 1e-5, name     # the softmax cancels a shift of all keys
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)      # the loss is float32


@pytest.mark.parametrize("per_region", [False, True])
def test_additive_scores_have_the_derivatives_of_their_equation(per_region):
    torch.manual_seed(0)
    v, w = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    q = torch.randn(2, 3, 5, 1, dtype=torch.float64) if per_region else torch.randn(2, 3, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(AdditiveScores.apply(v, q, w), torch.tanh(v[:, None] + q) @ w, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(AdditiveScores.apply, [x.requires_grad_() for x in (v, q, w)])
