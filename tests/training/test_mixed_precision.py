"""Mixed precision: passes without gradient leave no cast weights to the trained pass after them."""
import pytest
import torch
from helpers import MODELS, V, make, make_batch, random_regions, vocabulary_of

from captioning.training.losses import CrossEntropy
from captioning.training.scst import SCST

WORDS = vocabulary_of("abcdefgh")
CAPTIONS = torch.tensor([[[V - 2, 1, 2, V - 1, 0], [V - 2, 3, 3, 3, V - 1]]] * 3)


def sum_of_ids(captions, references):
    return captions.sum(-1).double() / 10


def make_losses():
    """{name: (loss, its number of passes without gradient)}"""
    nothing = torch.zeros(V, dtype=torch.bool)
    return {"scheduled sampling": (CrossEntropy(WORDS, ss_prob=0.5), 1),
            "self-critical": (SCST(WORDS, sum_of_ids, 6), 1),
            "self-critical with LRP-inference": (SCST(WORDS, sum_of_ids, 6, stop=nothing), 2)}


@MODELS
@pytest.mark.parametrize("name", make_losses())
def test_every_parameter_has_a_gradient(model_type, name, monkeypatch):
    """PyTorch 2.6 keeps the cast weights in its cache unless it is cleared; newer ones do not."""
    calls, clear = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache",
                        lambda: (calls.append(torch.is_grad_enabled()), clear()))
    model, batch = make(model_type).float(), make_batch(CAPTIONS)
    loss, passes = make_losses()[name]
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = loss(model, random_regions().float(), batch, loss.counts(batch))
        assert len(calls) == passes
    value.backward()
    assert all(parameter.grad is not None and parameter.grad.any()
               for parameter in model.parameters())
