"""Updates of the training loop: learning rates, clipping, seeds, patience and checkpoints."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from captioning.training import loop

CPU = torch.device("cpu")
IMAGES, STEPS = 12, 3       # STEPS: per epoch
DECODER_LR, ENCODER_LR = 0.5, 0.125
SETTINGS = {"batch_size": 4, "accumulate": 1, "epochs": 4, "patience": 99, "decoder_lr": DECODER_LR,
            "encoder_lr": ENCODER_LR, "lr_schedule": "constant", "weight_decay": 0.25,
            "grad_clip": 0.75, "amp": False, "finetune_encoder": True, "frozen_layers": 0,
            "region_epochs": 0,
            "seed": 1, "workers": 0, "save_every": 99.0, "save_path": "", "resume": "never"}


class Model(nn.Module):
    """An encoder and a decoder of one layer each."""

    def __init__(self):
        super().__init__()
        self.encoder, self.W_o = nn.Linear(2, 2), nn.Linear(2, 1)

    def encode(self, images):
        return self.encoder(images)


class Data:
    """A CaptionDataset of random numbers."""

    def __len__(self):
        return IMAGES

    def __getitems__(self, indices):
        return {"images": torch.randn(len(indices), 2), "captions": torch.zeros(len(indices), 1),
                "index": torch.tensor(indices)}


class SumLoss:
    """The sum of all outputs, over the number of images; records the seeds of dropout."""
    measure = "accuracy"

    def __init__(self):
        self.seeds = []

    def counts(self, batch):
        return torch.tensor([len(batch["captions"])])

    def __call__(self, model, features, batch, counts):
        self.seeds.append((torch.initial_seed(), torch.rand(()).item()))
        return model.W_o(features).sum() / counts[0], [torch.ones(()), torch.ones(())]


@pytest.fixture
def fit(monkeypatch):
    """A function of the validation CIDEr of each epoch and of settings, that trains a Model and
    returns what it saw: model, optimizer; of each step its learning rates and grad_clip; of each
    pass the seed of dropout and a random number; (epochs completed, name) of each checkpoint."""
    def run(ciders, **changes):
        seen, train_step = SimpleNamespace(lrs=[], clips=[], saved=[]), loop.train_step
        ciders, loss = iter(ciders), SumLoss()

        def observed_step(model, loss, batches, optimizer, scaler, device, grad_clip, amp, seed):
            seen.optimizer = optimizer
            seen.lrs.append([group["lr"] for group in optimizer.param_groups])
            seen.clips.append(grad_clip)
            return train_step(model, loss, batches, optimizer, scaler, device, grad_clip, amp, seed)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", observed_step)
            patch.setattr(loop, "validate", lambda *_: {"cider": next(ciders), "bleu_4": 0.0,
                                                        "loss": 1.0})
            patch.setattr(loop, "write_log", lambda *_: None)
            patch.setattr(loop.Saver, "save", lambda saver, name="checkpoint_last.pth": (
                seen.saved.append((saver.state["epoch"], name))))
            seen.model = Model()
            settings = SimpleNamespace(**SETTINGS | changes)
            seen.best = loop.fit(settings, seen.model, None, Data(), None, loss, CPU)
        seen.seeds = loss.seeds
        return seen
    return run


@pytest.mark.parametrize("finetune_encoder", [True, False])
def test_encoder_and_decoder_have_their_own_learning_rates(fit, finetune_encoder):
    seen = fit([0.1], epochs=1, finetune_encoder=finetune_encoder)
    groups = [(seen.model.W_o, DECODER_LR), (seen.model.encoder, ENCODER_LR)][:1 + finetune_encoder]
    for group, (module, lr) in zip(seen.optimizer.param_groups, groups, strict=True):
        assert list(map(id, group["params"])) == list(map(id, module.parameters()))
        assert group["lr"] == lr and group["weight_decay"] == 0.25
    assert all(x.requires_grad is finetune_encoder for x in seen.model.encoder.parameters())
    assert seen.model.encoder.training is finetune_encoder and seen.model.W_o.training


def test_frozen_layers_are_not_trained():
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model.W_o = nn.Linear(2, 1)
    optimizer = loop.make_optimizer(model, CPU, DECODER_LR, ENCODER_LR, frozen_layers=2)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        list(map(id, layer.parameters())) for layer in (model.W_o, model.encoder[2])]
    assert [x.requires_grad for x in model.encoder.parameters()] == [False, False, True, True]


def test_cosine_schedule_falls_from_step_to_step(fit):
    seen = fit([0.1] * 2, epochs=2, lr_schedule="cosine")
    factors = [(1 + math.cos(math.pi * step / (2 * STEPS))) / 2 for step in range(2 * STEPS)]
    assert factors[0] == 1 and factors[STEPS] == pytest.approx(0.5)
    torch.testing.assert_close(seen.lrs, [[DECODER_LR * x, ENCODER_LR * x] for x in factors])


@pytest.mark.parametrize("schedule, factors", [("plateau", [1, 1, 1, 0.8, 0.8, 0.64, 0.64]),
                                               ("constant", [1] * 7)])
def test_plateau_schedule_lowers_both_rates_after_two_bad_epochs(fit, schedule, factors):
    seen = fit([0.2, 0.2, 0.1, 0.1, 0.1, 0.3, 0.1], epochs=7, lr_schedule=schedule)
    torch.testing.assert_close(seen.lrs[::STEPS], [[DECODER_LR * x, ENCODER_LR * x]
                                                   for x in factors])


def test_patience_counts_epochs_since_the_best(fit):
    ciders = [0.2, 0.1, 0.3, 0.3, 0.1, 0.1]
    seen = fit(ciders, epochs=6, patience=2)
    assert len(seen.lrs) == 5 * STEPS and seen.best == 0.3
    assert len(fit(ciders, epochs=6, patience=1).lrs) == 2 * STEPS
    assert len(fit(ciders, epochs=6, patience=4).lrs) == 6 * STEPS


def test_best_checkpoint_is_written_in_better_epochs_alone(fit):
    seen = fit([0.2, 0.1, 0.3, 0.3])
    assert [epoch for epoch, name in seen.saved if name == "checkpoint_last.pth"] == [1, 2, 3, 4]
    assert [epoch for epoch, name in seen.saved if name == "checkpoint_best.pth"] == [1, 3]


def test_every_pass_has_its_own_dropout(fit):
    """CPU generators use the lowest 32 bits of a seed alone."""
    options = {"epochs": 2, "accumulate": 2}
    seen = fit([0.1] * 2, **options)
    seeds, numbers = zip(*seen.seeds, strict=True)
    assert len(set(seeds)) == len(set(numbers)) == 2 * 2 * STEPS
    assert fit([0.1] * 2, **options).seeds == seen.seeds
    assert fit([0.1] * 2, seed=2, **options).seeds[0] != seen.seeds[0]


@pytest.mark.parametrize("clip, change", [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradients_are_clipped_to_the_given_norm(fit, clip, change):
    """The gradient of W·(3, 4) has the norm 5."""
    model = Model()
    model.encoder, model.W_o = nn.Identity(), nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.W_o.weight.detach().clone()
    batch = {"images": torch.tensor([[3.0, 4.0]]), "captions": torch.zeros(1, 1)}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = loop.train_step(model, SumLoss(), [batch], optimizer, scaler, CPU, clip)
    torch.testing.assert_close(before - model.W_o.weight, torch.tensor([change]))
    assert result[3] == pytest.approx(5)        # the norm before clipping
    assert fit([0.1], epochs=1).clips == [SETTINGS["grad_clip"]] * STEPS
