"""Resuming: a damaged training state is refused before anything is loaded or written."""
import copy
from types import SimpleNamespace

import pytest
import torch

from captioning import checkpoint
from captioning.data.vocabulary import build
from captioning.errors import InputError
from captioning.training import state
from gridTDmodel import GridTDModel

WORDS = build([["a", "dog"]], 1)
BATCHES = 3     # of an epoch
LOG = [[1, 3, 2.5, 0.3, 0.1, 0.2, 5e-4, 1.5]]


def make_run(folder):
    """The arguments of `resume` for a run in `folder` that has trained for one step."""
    torch.manual_seed(0)
    model = GridTDModel(len(WORDS), 4, 6, 5, encoder=None, feature_dim=3)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.rand(2, 4, 3), torch.tensor([WORDS.encode(["a"], 1)] * 2)).sum().backward()
    optimizer.step()
    options = SimpleNamespace(save_path=str(folder), resume="auto", flags={"seed": 1, "dataset": "demo"},
                              from_features=True, finetune_encoder=False, region_epochs=0)
    return options, model, WORDS, optimizer, torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def run(tmp_path):
    options, model, _, optimizer, scaler = arguments = make_run(tmp_path)
    progress = state.new_state() | {"epoch": 1, "best": 0.1, "log": copy.deepcopy(LOG)}
    state.Saver(options, model, WORDS, optimizer, scaler, progress, []).save()
    return arguments


def test_an_intact_state_is_restored(run, tmp_path):
    restored = state.resume(*make_run(tmp_path), "accuracy", BATCHES)
    assert restored["epoch"] == 1 and restored["log"] == LOG and (tmp_path / "log.csv").exists()


FIRST = ("optimizer", "state", 0)
CHANGES = [
    ((), 3), ((), []), (("state",), None), (("state",), {}), (("state",), [1]), (("state", "epoch"), "1"),
    (("state", "epoch"), -1), (("state", "step"), 1.5), (("state", "step"), BATCHES + 1), (("state", "step"), 1),
    (("state", "sums"), [0.0]), (("state", "sums"), [None] * 3),
    (("state", "best"), float("nan")), (("state", "log"), None), (("state", "log"), [[1, 2]]),
    (("state", "log"), [["x"] * 8]), (("state", "log"), [[float("inf")] * 8]), (("optimizer",), None),
    (("optimizer",), {}), (("optimizer", "state"), []), (("optimizer", "param_groups"), None),
    (("optimizer", "param_groups"), []), (("optimizer", "param_groups", 0, "lr"), "fast"),
    (("optimizer", "param_groups", 0, "lr"), float("nan")), (("optimizer", "param_groups", 0, "params"), [0]),
    (("optimizer", "state", 99), {}), (FIRST, {}), ((*FIRST, "exp_avg"), torch.zeros(1)),
    ((*FIRST, "exp_avg_sq"), torch.zeros(0)), ((*FIRST, "exp_avg"), 3), ((*FIRST, "step"), torch.zeros(3)),
    ((*FIRST, "exp_avg"), torch.full((len(WORDS), 4), torch.nan)), ((*FIRST, "exp_avg_sq"), -torch.ones(len(WORDS), 4)),
    (("scaler",), None), (("scaler",), {"scale": "big"}), (("flags",), None), (("flags",), [1]), (("flags",), {1: 2}),
    (("flags",), {"seed": {}})]


@pytest.mark.parametrize("path, value", CHANGES, ids=[str(number) for number in range(len(CHANGES))])
def test_a_damaged_state_is_refused_and_nothing_is_written(run, tmp_path, path, value):
    last = tmp_path / "checkpoint_last.pth"
    content = checkpoint.read(last)
    parent = content
    for key in ("training", *path)[:-1]:
        parent = parent[key]
    parent[("training", *path)[-1]] = value
    torch.save(content, last)
    (tmp_path / "log.csv").write_text("earlier")
    arguments = make_run(tmp_path)
    before = {name: value.clone() for name, value in arguments[1].state_dict().items()}
    with pytest.raises(InputError, match="checkpoint_last.pth") as raised:
        state.resume(*arguments, "accuracy", BATCHES)
    assert "\n" not in str(raised.value) and (tmp_path / "log.csv").read_text() == "earlier"
    assert all(torch.equal(before[name], value) for name, value in arguments[1].state_dict().items())


def test_another_encoder_than_that_of_the_features_is_refused(tmp_path):
    """Features that were computed again with other weights would otherwise meet a decoder trained on the old ones."""
    def arguments(seed):
        torch.manual_seed(seed)
        model = GridTDModel(len(WORDS), 4, 6, 5, encoder="small")
        return make_run(tmp_path)[0], model, WORDS, torch.optim.Adam(model.parameters()), torch.amp.GradScaler("cpu")
    options, model, _, optimizer, scaler = arguments(0)
    state.Saver(options, model, WORDS, optimizer, scaler, state.new_state(), []).save()
    with pytest.raises(InputError, match="other weights of the encoder"):
        state.resume(*arguments(1), "accuracy", BATCHES)
    assert state.resume(*arguments(0), "accuracy", BATCHES)["epoch"] == 0


@pytest.mark.parametrize("flag", [*state.FIXED_FLAGS, *state.ERASE_FLAGS])
def test_every_fixed_flag_is_compared(flag):
    flags = dict.fromkeys((*state.FIXED_FLAGS, *state.ERASE_FLAGS), 1)
    state.check_flags("run", flags, flags | {"epochs": 2})
    with pytest.raises(InputError, match=f"run was trained with --{flag} 1, not 2: give the same flags"):
        state.check_flags("run", flags, flags | {flag: 2})


def test_flags_of_erasure_count_in_its_fine_tuning_alone():
    flags = {"erase_tune": False, "erase_weight": 1.0}
    state.check_flags("run", flags, flags | {"erase_weight": 2.0})


def test_stop_words_are_compared_where_the_checkpoint_records_them():
    state.check_flags("run", {}, {"stop_words_fingerprint": "b"})
    with pytest.raises(InputError, match="other words in the file of --stop_words"):
        state.check_flags("run", {"stop_words_fingerprint": "a"}, {"stop_words_fingerprint": "b"})


@pytest.mark.parametrize("recorded, current", [(None, "mask"), ("mask", None), ("mask", "soft")])
def test_a_control_resumes_only_itself(tmp_path, recorded, current):
    """Runs of finetune.py have no such flag."""
    path = tmp_path / "x.pth"
    both = [{"control": control} if control else {} for control in (recorded, current)]
    with pytest.raises(InputError, match=f"--control {recorded}, not {current}"):
        state.check_flags(path, *both)
    state.check_flags(path, both[0], both[0])


@pytest.mark.parametrize("name, best", [("checkpoint_last.pth", 0.1), ("checkpoint_best.pth", 0.1),
                                        ("../other/checkpoint_last.pth", -1.0)])
def test_the_best_checkpoint_of_another_run_does_not_count(run, tmp_path, name, best):
    """The first epoch after resuming in its folder replaces it."""
    folder, other = tmp_path / "run", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        for file in ("checkpoint_last.pth", "checkpoint_best.pth"):
            (place / file).write_bytes((tmp_path / "checkpoint_last.pth").read_bytes())
    options, *others = make_run(folder)
    options.resume = str(folder / name)
    assert state.resume(options, *others, "accuracy", BATCHES)["best"] == best
