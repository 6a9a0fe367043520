"""Resuming: a damaged training state is refused before anything is loaded or written."""
import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import refused, same

from captioning import checkpoint
from captioning.data.vocabulary import build
from captioning.training import state
from gridTDmodel import GridTDModel

WORDS = build([["a", "dog"]], 1)
BATCHES = 3     # of an epoch
LOG = [[1, 3, 2.5, 0.3, 0.1, 0.2, 5e-4, 1.5]]


def make_run(folder):
    """The first arguments of `resume` for a run in `folder` that has trained for one step."""
    torch.manual_seed(0)
    model = GridTDModel(len(WORDS), 4, 6, 5, encoder=None, feature_dim=3)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.rand(2, 4, 3), torch.tensor([WORDS.encode(["a"], 1)] * 2)).sum().backward()
    optimizer.step()
    settings = SimpleNamespace(save_path=str(folder), resume="auto", seed=1, dataset="demo",
                               from_pixels=False, finetune_encoder=False, frozen_layers=0,
                               region_epochs=0)
    return settings, model, WORDS, optimizer, torch.amp.GradScaler("cpu", enabled=False)


def resume(arguments):
    return state.resume(*arguments, "accuracy", BATCHES)


@pytest.fixture
def run(tmp_path):
    settings, model, _, optimizer, scaler = make_run(tmp_path)
    progress = state.new_state() | {"epoch": 1, "best": 0.1, "log": copy.deepcopy(LOG)}
    state.Saver(settings, model, WORDS, optimizer, scaler, progress, []).save()


def test_an_intact_state_is_restored(run, tmp_path):
    restored = resume(make_run(tmp_path))
    assert restored["epoch"] == 1 and restored["log"] == LOG and (tmp_path / "log.csv").exists()


FIRST = ("optimizer", "state", 0)
PROGRESS = {"epoch": ["1", -1], "step": [1.5, BATCHES + 1, 1], "sums": [[0.0], [None] * 3],
            "best": [float("nan")],
            "log": [None, [[1, 2]], [["x"] * 8], [[float("inf")] * 8]]}
MOMENTS = {"exp_avg": [torch.zeros(1), torch.zeros(1).expand(len(WORDS), 4), 3,
                       torch.full((len(WORDS), 4), torch.nan)],
           "exp_avg_sq": [torch.zeros(0), -torch.ones(len(WORDS), 4)], "step": [torch.zeros(3)]}
GROUP = {"lr": ["fast", float("nan")], "params": [[0]]}
CHANGES = [
    ((), 3), ((), []), (("state",), None), (("state",), {}), (("state",), [1]),
    *((("state", name), value) for name, values in PROGRESS.items() for value in values),
    (("optimizer",), None), (("optimizer",), {}), (("optimizer", "state"), []),
    (("optimizer", "param_groups"), None), (("optimizer", "param_groups"), []),
    *((("optimizer", "param_groups", 0, name), value)
      for name, values in GROUP.items() for value in values),
    (("optimizer", "state", 99), {}), (FIRST, {}),
    *(((*FIRST, name), value) for name, values in MOMENTS.items() for value in values),
    (("scaler",), None), (("scaler",), {"scale": "big"}),
    (("flags",), None), (("flags",), [1]), (("flags",), {1: 2}), (("flags",), {"seed": {}})]


@pytest.mark.parametrize("path, value", CHANGES, ids=map(str, range(len(CHANGES))))
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
    before = copy.deepcopy(arguments[1].state_dict())
    with refused("checkpoint_last.pth"):
        resume(arguments)
    assert (tmp_path / "log.csv").read_text() == "earlier"
    assert same(before, arguments[1].state_dict())


def test_another_encoder_than_that_of_the_features_is_refused(tmp_path):
    """Otherwise features of other weights would meet a decoder trained on the old ones."""
    def arguments(seed):
        torch.manual_seed(seed)
        settings, _, _, _, scaler = make_run(tmp_path)
        torch.manual_seed(seed)
        model = GridTDModel(len(WORDS), 4, 6, 5, encoder="small")
        return settings, model, WORDS, torch.optim.Adam(model.parameters()), scaler
    state.Saver(*arguments(0), state.new_state(), []).save()
    with refused("other weights of the encoder"):
        resume(arguments(1))
    assert resume(arguments(0))["epoch"] == 0


@pytest.mark.parametrize("flag", [*state.FIXED_FLAGS, *state.ERASE_FLAGS])
def test_every_fixed_flag_is_compared(flag):
    flags = dict.fromkeys((*state.FIXED_FLAGS, *state.ERASE_FLAGS), 1) | {"mode": "erase_tune"}
    state.check_flags("run", flags, flags | {"epochs": 2})
    other = "erase_tune" if flag == "mode" else 2
    with refused(f"run was trained with --{flag} 1, not {other}: give the"):
        state.check_flags("run", flags | {flag: 1}, flags | {flag: other})


def test_flags_of_other_modes_and_of_earlier_versions():
    """Erasure's count in its mode alone; earlier names and modes are those of today."""
    flags = {"mode": "lrp_tune", "erase_weight": 1.0}
    state.check_flags("run", flags, flags | {"erase_weight": 2.0})
    earlier = {"erase_tune": True, "cider_tune": False, "captions_per_step": 2, "keep_weight": 0.1,
               "evidence": "lrp", "own_evidence": True}
    today = {"mode": "erase_tune", "captions_per_epoch": 2, "erase_keep_weight": 0.1,
             "erase_evidence": "lrp", "erase_own_evidence": True}
    assert state.current_flags(earlier) == today
    state.check_flags("run", earlier, today)
    with refused("--mode erase_tune, not cider_tune"):
        state.check_flags("run", earlier, today | {"mode": "cider_tune"})


@pytest.mark.parametrize("recorded, current", [(None, "mask"), ("mask", None), ("mask", "soft")])
def test_a_control_resumes_only_itself(recorded, current):
    """Runs of finetune.py have no such flag."""
    both = [{"control": control} if control else {} for control in (recorded, current)]
    with refused(f"--control {recorded}, not {current}"):
        state.check_flags("run", *both)
    state.check_flags("run", both[0], both[0])


@pytest.mark.parametrize("name, best", [("checkpoint_last.pth", 0.1), ("checkpoint_best.pth", 0.1),
                                        ("../other/checkpoint_last.pth", -1.0)])
def test_the_best_checkpoint_of_another_run_does_not_count(run, tmp_path, name, best):
    """The first epoch after resuming in its folder replaces it."""
    folder, other = tmp_path / "run", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        for file in ("checkpoint_last.pth", "checkpoint_best.pth"):
            (place / file).write_bytes((tmp_path / "checkpoint_last.pth").read_bytes())
    settings, *others = make_run(folder)
    settings.resume = str(folder / name)
    assert resume((settings, *others))["best"] == best
