"""Updates of the training loop: learning rates, clipping, seeds, patience and checkpoints."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from captioning.training import loop
from captioning.training.options import TrainingOptions
from captioning.training.parts import WHOLE, Loss

CPU = torch.device("cpu")
IMAGES, STEPS = 12, 3       # STEPS: per epoch
DECODER_LR, ENCODER_LR = 0.5, 0.125
OPTIONS = {"batch_size": 4, "accumulate": 1, "epochs": 4, "patience": 99, "decoder_lr": DECODER_LR,
           "encoder_lr": ENCODER_LR, "lr_schedule": "constant", "weight_decay": 0.25, "grad_clip": 0.75, "amp": False,
           "finetune_encoder": True, "region_epochs": 0, "seed": 1, "workers": 0, "save_every": 99.0, "save_path": "",
           "resume": "never", "from_features": False, "flags": {}}


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

    def set_epoch(self, epoch):
        pass

    def __getitems__(self, indices, images=slice(None)):
        return {"images": torch.randn(len(indices[images]), 2), "captions": torch.zeros(len(indices), 1)}


def sum_loss(model, features, captions, epoch, part):
    return model.W_o(features).sum(), torch.ones(()), torch.ones(())


@pytest.fixture
def fit(monkeypatch):
    """A function of the validation CIDEr of each epoch and of options, that trains a Model and returns what it saw:
    model, optimizer; of each step its learning rates and grad_clip; of each part of a step the seeds of PyTorch and of
    the whole batch; (epochs completed, name) of each checkpoint."""
    def run(ciders, **changes):
        seen, ciders, train_step = SimpleNamespace(lrs=[], clips=[], parts=[], saved=[]), iter(ciders), loop.train_step

        def observed(parts):
            for part, batch in parts:
                seen.parts[-1].append((torch.initial_seed(), part.generator.initial_seed()))
                yield part, batch

        def observed_step(loss_module, parts, epoch, optimizer, scaler, device, grad_clip, amp):
            seen.optimizer = optimizer
            seen.lrs.append([group["lr"] for group in optimizer.param_groups])
            seen.clips.append(grad_clip)
            seen.parts.append([])
            return train_step(loss_module, observed(parts), epoch, optimizer, scaler, device, grad_clip, amp)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", observed_step)
            patch.setattr(loop, "validate", lambda *_: {"cider": next(ciders), "bleu_4": 0.0, "loss": 1.0})
            patch.setattr(loop, "write_log", lambda *_: None)
            patch.setattr(loop.Saver, "save", lambda saver, name="checkpoint_last.pth": seen.saved.append(
                (saver.state["epoch"], name)))
            seen.model = Model()
            seen.best = loop.fit(TrainingOptions(**OPTIONS | changes), seen.model, None, Data(), None, sum_loss, CPU)
        return seen
    return run


@pytest.mark.parametrize("finetune_encoder", [True, False])
def test_encoder_and_decoder_have_their_own_learning_rates(fit, finetune_encoder):
    seen = fit([0.1], epochs=1, finetune_encoder=finetune_encoder)
    decoder, *encoder = seen.optimizer.param_groups
    assert list(map(id, decoder["params"])) == list(map(id, seen.model.W_o.parameters()))
    assert decoder["lr"] == DECODER_LR and decoder["weight_decay"] == 0.25
    assert len(encoder) == finetune_encoder
    for group in encoder:
        assert list(map(id, group["params"])) == list(map(id, seen.model.encoder.parameters()))
        assert group["lr"] == ENCODER_LR and group["weight_decay"] == 0.25
    assert all(parameter.requires_grad is finetune_encoder for parameter in seen.model.encoder.parameters())


def test_cosine_schedule_falls_from_step_to_step(fit):
    seen = fit([0.1] * 2, epochs=2, lr_schedule="cosine")
    factors = [(1 + math.cos(math.pi * step / (2 * STEPS))) / 2 for step in range(2 * STEPS)]
    assert factors[0] == 1 and factors[STEPS] == pytest.approx(0.5)
    torch.testing.assert_close(seen.lrs, [[DECODER_LR * factor, ENCODER_LR * factor] for factor in factors])


@pytest.mark.parametrize("schedule, factors", [("plateau", [1, 1, 1, 0.8, 0.8, 0.64, 0.64]), ("constant", [1] * 7)])
def test_plateau_schedule_lowers_both_rates_after_two_bad_epochs(fit, schedule, factors):
    seen = fit([0.2, 0.2, 0.1, 0.1, 0.1, 0.3, 0.1], epochs=7, lr_schedule=schedule)
    torch.testing.assert_close(seen.lrs[::STEPS], [[DECODER_LR * x, ENCODER_LR * x] for x in factors])


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


def test_parts_have_their_own_seeds_and_steps_one_for_the_whole_batch(fit):
    options = {"epochs": 2, "accumulate": 2}
    seen = fit([0.1] * 2, **options)
    assert [len(parts) for parts in seen.parts] == [2] * 2 * STEPS
    dropout, batches = zip(*sum(seen.parts, []), strict=True)
    assert batches[::2] == batches[1::2]        # the same in both parts
    assert len({*dropout, *batches}) == 3 * 2 * STEPS
    assert fit([0.1] * 2, **options).parts == seen.parts
    assert fit([0.1] * 2, seed=2, **options).parts[0] != seen.parts[0]


@pytest.mark.parametrize("clip, change", [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradients_are_clipped_to_the_given_norm(clip, change):
    """The gradient of W·(3, 4) has the norm 5."""
    model = Model()
    model.encoder, model.W_o = nn.Identity(), nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), model.W_o.weight.detach().clone()
    batch = {"images": torch.tensor([[3.0, 4.0]]), "captions": torch.zeros(1, 1)}
    result = loop.train_step(Loss(model, sum_loss), [(WHOLE, batch)], 0, optimizer,
                             torch.amp.GradScaler("cpu", enabled=False), CPU, clip)
    torch.testing.assert_close(before - model.W_o.weight, torch.tensor([change]))
    assert result[3] == pytest.approx(5)        # the norm before clipping


def test_every_step_clips_by_the_option(fit):
    assert fit([0.1], epochs=1).clips == [OPTIONS["grad_clip"]] * STEPS


def test_parts_have_different_random_numbers_on_a_cpu():
    """CPU generators use the lowest 32 bits of a seed alone."""
    numbers = [(torch.rand(()).item(), torch.rand((), generator=part.generator).item())
               for part in loop.step_parts(8, 4, 7, torch.device("cpu"), 0)]
    dropout, batches = zip(*numbers, strict=True)
    assert len(set(dropout)) == 4 and len(set(batches)) == 1 and batches[0] not in dropout
