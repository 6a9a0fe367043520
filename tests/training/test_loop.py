"""The training loop: order of images, transfers, losses that are not finite, mixed precision."""
import os
import signal

import pytest
import torch
from helpers import REGIONS, refused, train_run

from captioning import checkpoint
from captioning.data.dataset import CaptionDataset
from captioning.training import loop
from captioning.training.loop import epoch_batches

ONE_IMAGE = (*REGIONS, "--batch_size", "1", "--epochs", "1")      # 24 steps per epoch


def test_every_epoch_uses_every_image_once_in_another_order():
    first, second = (epoch_batches(23, 5, seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(23))
    assert first != second and first == epoch_batches(23, 5, seed=1, epoch=0)
    assert [len(batch) for batch in first] == [5, 5, 5, 4, 4]


def test_a_batch_that_is_too_small_for_the_passes_is_refused(demo_data, tmp_path):
    with refused("4 images cannot be split into 5 passes.*lower"):
        train_run(demo_data, tmp_path, "--accumulate", "5")


def fail_at(monkeypatch, bad_step, column, stop_at=None):
    """Makes loop.train_step return NaN in one column of one step's result; at step stop_at, Ctrl-C
    is pressed. Returns the list of results."""
    train_step, steps = loop.train_step, []

    def failing_step(*args):
        result = train_step(*args)
        steps.append(result)
        if len(steps) == bad_step:
            result[column] = torch.nan
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return result
    monkeypatch.setattr(loop, "train_step", failing_step)
    return steps


@pytest.mark.parametrize("column, stop_at", [(0, None), (3, None), (0, 15)])
def test_first_step_that_is_not_finite_is_named(demo_data, tmp_path, monkeypatch, column, stop_at):
    """Loss or norm of the gradient; it is noticed at the next transfer, and never saved."""
    steps = fail_at(monkeypatch, 13, column, stop_at)
    with refused("not a finite number at epoch 1, step 13: lower --de"):
        train_run(demo_data, tmp_path, *ONE_IMAGE)
    assert len(steps) == (stop_at or 20)
    assert not list(tmp_path.glob("*.pth"))


def test_last_checkpoint_precedes_the_step_that_is_not_finite(demo_data, tmp_path, monkeypatch):
    fail_at(monkeypatch, 13, 0)
    with refused("step 13"):
        train_run(demo_data, tmp_path, *ONE_IMAGE, "--save_every", "1e-9")
    state = checkpoint.read(tmp_path / "checkpoint_last.pth")["training"]["state"]
    assert state["step"] == 12 and torch.tensor(state["sums"]).isfinite().all()


def test_interrupt_saves_all_steps(demo_data, tmp_path, monkeypatch):
    steps = fail_at(monkeypatch, None, 0, stop_at=15)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        train_run(demo_data, tmp_path, *ONE_IMAGE)
    state = checkpoint.read(tmp_path / "checkpoint_last.pth")["training"]["state"]
    expected = torch.zeros(3, dtype=torch.float64)
    for step in steps:
        loss, correct, words, _ = step.double()
        expected += torch.stack([loss * words, correct, words])
    assert state["step"] == 15 and state["sums"] == expected.tolist()


def test_results_are_transferred_every_ten_steps(demo_data, tmp_path, monkeypatch):
    """Each transfer waits for the device: two within the 24 steps of the epoch, one at its end."""
    transfers, cpu = [], torch.Tensor.cpu

    def counted(tensor):
        transfers.append(tuple(tensor.shape))
        return cpu(tensor)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    train_run(demo_data, tmp_path, *ONE_IMAGE)
    assert transfers == [(10, 4), (10, 4), (4, 4)]


def test_losses_know_epoch_step_and_seeds(demo_data, tmp_path, monkeypatch):
    """The number of steps in all epochs; every image has other random numbers in each epoch."""
    batches, train_step = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda model, loss, passes, *args: (
        batches.append(passes), train_step(model, loss, passes, *args))[1])
    train_run(demo_data, tmp_path, *REGIONS, "--batch_size", "8", "--accumulate", "2")
    assert [[batch["step"] for batch in passes] for passes in batches] == [[i, i] for i in range(6)]
    assert [passes[0]["epoch"] for passes in batches] == [0, 0, 0, 1, 1, 1]
    seeds = [batch["seeds"] for passes in batches for batch in passes]
    assert torch.cat(seeds).unique().numel() == 48


def test_results_are_converted_after_the_transfer(monkeypatch):
    """MPS devices have no float64."""
    order = []
    for name in ("cpu", "double"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, name=name, method=method: (
            order.append(name), method(tensor))[1])
    state = {"epoch": 0, "step": 2, "sums": [1.0, 0.0, 0.0]}
    loop.add_results(None, state, [torch.ones(4), torch.ones(4)], is_scaled=False)
    assert order == ["cpu", "double"] and state["sums"] == [3.0, 2.0, 2.0]


def test_a_gradient_scaler_may_skip_steps():
    state = {"epoch": 0, "step": 1, "sums": [0.0, 0.0, 0.0]}
    result = torch.tensor([1.0, 2.0, 3.0, torch.inf])
    loop.add_results(None, state, [result], is_scaled=True)
    assert state["sums"] == [3.0, 2.0, 3.0]       # the loss is summed over the words


def test_validation_loss_is_the_mean_over_words(demo_data, tmp_path):
    content = train_run(demo_data, tmp_path, "--epochs", "1")
    model, _ = checkpoint.load(tmp_path / "checkpoint_last.pth")
    data = CaptionDataset(demo_data, "demo", "val", image_size=112)
    batch = data.__getitems__(list(range(len(data))))
    captions = batch["captions"]
    with torch.no_grad():
        trace = model.teacher_force(model.encode(batch["images"]), captions)
        log_p = model.output(trace.hidden).log_softmax(-1)
    log_p = log_p.gather(-1, captions[..., 1:, None]).squeeze(-1)
    loss = -log_p[captions[..., 1:] != 0].mean()
    row = content["training"]["state"]["log"][0]
    assert row[-1] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("supported", [True, False])
def test_amp_without_bfloat16_instructions_is_reported_once(demo_data, tmp_path, monkeypatch,
                                                            capsys, supported):
    for module in ("captioning.device", "captioning.training.loop"):
        monkeypatch.setattr(f"{module}.supports_amp", lambda device: supported)
    content = train_run(demo_data, tmp_path, *REGIONS, "--epochs", "1", "--amp")
    assert capsys.readouterr().out.count("--amp has no effect") == (0 if supported else 1)
    assert content["training"]["flags"]["amp"] is True
