"""Several processes and several passes per batch: the same weights as one process with one pass; interruptions."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import prepare_flags, train_flags, train_run, write_region_features

from aoamodel import AOAModel
from captioning import checkpoint, processes
from captioning.data.dataset import features_path
from captioning.data.vocabulary import read
from captioning.training.parts import own_slices
from gridTDmodel import GridTDModel

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
MODES = {"ce": ("--ce_tune", "--region_loss", "0.5"), "lrp": ("--lrp_tune",), "erase": ("--erase_tune",),
         "cider": ("--cider_tune",), "lrp_cider": ("--lrp_cider_tune", "--samples", "2", "--baseline", "mean")}


@pytest.fixture(scope="module")
def bases(demo_data, tmp_path_factory):
    """{model type: checkpoint} of models of bottom-up features, which are written to demo_data."""
    write_region_features(demo_data)
    vocabulary, folder = read(demo_data / "demo" / "wordmap_demo.json"), tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    models = {"gridtd": GridTDModel(len(vocabulary), 8, 16, 5, encoder=None, feature_dim=6),
              "aoa": AOAModel(len(vocabulary), 8, 16, num_head=2, encoder=None, feature_dim=6, attention_dropout=0.0)}
    for name, model in models.items():
        checkpoint.save(folder / f"{name}.pth", model, vocabulary)
    return {name: folder / f"{name}.pth" for name in models}


def run_all(runs, tmp_path, launcher=(sys.executable,)):
    """Runs tests/distributed.py on [(script, flags)]."""
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([(script, list(map(str, flags))) for script, flags in runs]))
    result = subprocess.run([*launcher, "tests/distributed.py", str(path)], cwd=ROOT, capture_output=True, text=True,
                            env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]


def started_preparation(demo_data, folder):
    """Flags of the preparation of demo_data in another folder, where the first 7 images are done already."""
    partial = Path(f"{features_path(folder, 'demo', 'train', 'small')}.partial")
    partial.parent.mkdir(parents=True)
    shutil.copy(features_path(demo_data, "demo", "train", "small"), partial)
    with h5py.File(partial, "r+") as file:
        file["features"][7:], file["done"][7:] = 0, 0
    return "preparedataset", prepare_flags(folder)


def check_preparation(demo_data, folder):
    for name in ("features_small_train", "features_small_val", "features_small_test", "document_frequencies", "masks"):
        one, two = ((parent / "demo" / f"{name}_demo.hdf5").read_bytes() for parent in (demo_data, folder))
        assert one == two, name
    assert not list(folder.rglob("*.partial"))


def test_any_number_of_processes_and_passes_reaches_the_same_weights(demo_data, bases, tmp_path):
    """12 steps of 7 images, the last of each epoch 3, which are fewer than 2 processes × 2 passes."""
    common = ("--data_folder", demo_data, "--batch_size", "7", "--workers", "0", "--device", "cpu", "--dropout", "0")
    tuned = {f"{model}_{mode}": ("finetune", ("--weight", bases[model], *common, *flags, "--decoder_lr", "1e-2"))
             for model in bases for mode, flags in MODES.items()}
    pixels = {"pixels": ("train", train_flags(demo_data, "", *common, "--captions_per_epoch", "2"))}

    def runs(folder, selected, epochs=3, *extra):
        return [(script, (*flags, *extra, "--epochs", str(epochs), "--save_path", tmp_path / folder / name))
                for name, (script, flags) in selected.items()]
    resumed, accumulated = ({name: tuned[name] for name in names} for names in (
        ("gridtd_cider",), ("gridtd_erase", "aoa_lrp_cider")))
    everything = tuned | pixels
    run_all(runs("two", everything) + runs("resumed", resumed, 1)
            + runs("accumulated", accumulated, 3, "--accumulate", "2")
            + [started_preparation(demo_data, tmp_path / "data")], tmp_path, TORCHRUN)
    check_preparation(demo_data, tmp_path / "data")
    run_all(runs("one", everything) + runs("resumed", resumed), tmp_path)
    for folder, names in (("two", everything), ("resumed", resumed), ("accumulated", accumulated)):
        for name in names:
            one, other = (checkpoint.read(tmp_path / part / name / "checkpoint_last.pth") for part in ("one", folder))
            for key, value in one["state_dict"].items():
                assert (other["state_dict"][key] - value).abs().max() <= 1e-6, (folder, name, key)
            assert other["training"]["state"]["epoch"] == 3
            for row, expected in zip(other["training"]["state"]["log"], one["training"]["state"]["log"], strict=True):
                assert [*row[:7], row[8]] == pytest.approx([*expected[:7], expected[8]], rel=1e-5, abs=1e-6)   # no time
    start = checkpoint.read(bases["aoa"])["state_dict"]["W_o.weight"]
    assert (checkpoint.read(tmp_path / "one" / "aoa_cider" / "checkpoint_last.pth")["state_dict"]["W_o.weight"]
            - start).abs().max() > 1e-2


def test_parts_of_a_batch(monkeypatch):
    """Consecutive images, as equally many as possible; all images in each part if there are fewer than parts."""
    monkeypatch.setattr(processes, "count", lambda: 3)
    for size, expected in ((7, [1, 1, 1, 1, 1, 2]), (4, None), (6, [1] * 6)):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            parts += own_slices(size, 2)
        if expected is None:
            assert parts == [(slice(0, 4), 1 / 6)] * 6
        else:
            assert [images.stop - images.start for images, _ in parts] == expected
            assert sum([list(range(size))[images] for images, _ in parts], []) == list(range(size))


def start(data, save_path, *extra):
    """train.py on two processes, which writes a checkpoint at every step."""
    command = [*TORCHRUN, "train.py", *train_flags(data, save_path, "--save_every", "1e-9", *extra)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=ENVIRONMENT)


def workers(process):
    """Process ids of the training processes that torchrun started."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split() if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes as Linux does")
def test_interrupt_or_death_of_one_process_stops_all_and_leaves_a_checkpoint(demo_data, tmp_path):
    last = tmp_path / "checkpoint_last.pth"
    for number, stop in enumerate((signal.SIGINT, signal.SIGKILL), start=1):
        process, before = start(demo_data, tmp_path, "--epochs", "100"), last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.02)
        pids = workers(process)
        assert len(pids) == 2
        os.kill(process.pid if stop == signal.SIGINT else pids[1], stop)
        output, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and output.count("settings:") == 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        if stop == signal.SIGINT:
            assert "run the same command again" in errors
        state = checkpoint.read(last)["training"]["state"]
        assert state["step"] + 6 * state["epoch"] >= number
    steps = state["epoch"]
    resumed = train_run(demo_data, tmp_path, "--epochs", str(steps + 1))["training"]["state"]
    assert resumed["epoch"] == steps + 1 and len(resumed["log"]) == steps + 1


def test_explanations_do_not_depend_on_the_number_of_processes(demo_data, tmp_path):
    vocabulary = read(demo_data / "demo" / "wordmap_demo.json")
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "x.pth", GridTDModel(len(vocabulary), 8, 16, 5, encoder="small"), vocabulary)
    flags = ["explain.py", "--weight", str(tmp_path / "x.pth"), "--dataset", "demo", "--data_folder", str(demo_data),
             "--max_images", "3", "--batch_size", "1", "--max_len", "3", "--methods", "lrp", "--device", "cpu"]
    for launcher, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        result = subprocess.run([*launcher, *flags, "--save_path", str(tmp_path / name)], cwd=ROOT, capture_output=True,
                                text=True, env=ENVIRONMENT)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("index.html") == 1 and (tmp_path / name / "index.html").exists()
    paths = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npz"))
    assert len(paths) == 3
    for path in paths:
        one, two = (np.load(tmp_path / name / path) for name in ("one", "two"))
        assert sorted(one.files) == sorted(two.files)
        assert all(np.array_equal(one[key], two[key]) for key in one.files)
