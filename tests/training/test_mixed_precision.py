"""Mixed precision: passes without gradient leave no cast weights to the trained pass that follows them."""
import pytest
import torch
from helpers import V, make, random_regions

from aoamodel import AOAModel
from captioning.data.vocabulary import Vocabulary
from captioning.training.losses import teacher_forced_loss
from captioning.training.scst import SCST
from gridTDmodel import GridTDModel

WORDS = Vocabulary({word: i for i, word in enumerate(["<pad>", *"abcdefgh", "<unk>", "<start>", "<end>"])})
CAPTIONS = torch.tensor([[[V - 2, 1, 2, V - 1, 0], [V - 2, 3, 3, 3, V - 1]]] * 3)


def sum_of_ids(captions, references):
    return captions.sum(-1).double() / 10


# passes: those without gradient
LOSSES = {"scheduled sampling": (teacher_forced_loss(WORDS, ss_prob=0.5), 1),
          "self-critical": (SCST(WORDS, sum_of_ids, 6), 1),
          "self-critical with LRP-inference": (SCST(WORDS, sum_of_ids, 6, stop=torch.zeros(V, dtype=torch.bool)), 2)}


@pytest.mark.parametrize("model_class", [GridTDModel, AOAModel])
@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_has_a_gradient(model_class, name, monkeypatch):
    """PyTorch 2.6 keeps the cast weights in its cache unless it is cleared; newer versions do not keep them."""
    calls, clear = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (calls.append(torch.is_grad_enabled()), clear()))
    model, (loss_function, passes) = make(model_class).float(), LOSSES[name]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = loss_function(model, random_regions().float(), CAPTIONS, 0)
        assert len(calls) == passes
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
