"""Several processes and several passes per batch: the same weights as one process with one pass."""
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
from distributed import run_all, run_each
from helpers import REGIONS, prepare_flags, small_model, train_flags, train_run

from captioning import checkpoint
from captioning.data.dataset import features_path, split_path
from captioning.data.vocabulary import read
from captioning.training.loop import epoch_batches

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
MODES = {"ce": ("--ce_tune", "--region_loss", "0.5", "--ss_prob", "0.3"), "lrp": ("--lrp_tune",),
         "erase": ("--erase_tune",), "cider": ("--cider_tune",),
         "lrp_cider": ("--lrp_cider_tune", "--samples", "2", "--baseline", "mean")}


@pytest.fixture(scope="module")
def bases(demo_data, tmp_path_factory):
    """{model type: checkpoint} of models of region features."""
    vocabulary = read(demo_data / "demo" / "wordmap_demo.json")
    folder = tmp_path_factory.mktemp("bases")
    bases = {name: folder / f"{name}.pth" for name in ("gridtd", "aoa")}
    for name, path in bases.items():
        options = {"attention_dropout": 0.0} if name == "aoa" else {}
        model = small_model(name, vocabulary, hidden_dim=16, encoder=None, feature_dim=6, **options)
        checkpoint.save(path, model, vocabulary)
    return bases


def started_preparation(demo_data, folder):
    """Flags of the preparation of demo_data in another folder, where 7 images are done already."""
    partial = Path(f"{features_path(folder, 'demo', 'train', 'small')}.partial")
    partial.parent.mkdir(parents=True)
    shutil.copy(features_path(demo_data, "demo", "train", "small"), partial)
    with h5py.File(partial, "r+") as file:
        file["features"][7:], file["done"][7:] = 0, 0
    return "preparedataset", prepare_flags(folder)


def test_any_number_of_processes_and_passes_reaches_the_same_weights(demo_data, bases, tmp_path):
    """4 or 8 steps of 6 images, in 2 processes × 2 passes of different sizes; without dropout."""
    common = ("--data_folder", demo_data, "--batch_size", "7", "--workers", "0", "--device", "cpu",
              "--dropout", "0")
    everything = {f"{model}_{mode}": ("finetune", ("--weight", bases[model], *common, *flags,
                                                   "--decoder_lr", "1e-2"))
                  for model in bases for mode, flags in MODES.items()}
    pixels = train_flags(demo_data, "", *common, "--captions_per_epoch", "2")
    everything["pixels"] = ("train", pixels)

    resumed = ("gridtd_cider",)
    epochs = dict.fromkeys(everything, 1) | dict.fromkeys([*resumed, "pixels"], 2)

    def runs(folder, names, *extra):
        return [(script, (*flags, "--epochs", epochs[name], *extra, "--save_path",
                          tmp_path / folder / name))
                for name, (script, flags) in everything.items() if name in names]
    accumulated = ("gridtd_erase", "aoa_lrp_cider", "aoa_ce")
    together = (runs("two", everything) + runs("resumed", resumed, "--epochs", "1")
                + runs("accumulated", accumulated, "--accumulate", "2")
                + [started_preparation(demo_data, tmp_path / "data")])
    output = run_all(together, tmp_path, 2, in_double=True)
    assert output.count("settings: ") == len(together)      # of the first process
    for name in ("features_small_train", "features_small_val", "features_small_test",
                 "document_frequencies", "masks"):
        prepared, expected = ((parent / "demo" / f"{name}_demo.hdf5").read_bytes()
                              for parent in (tmp_path / "data", demo_data))
        assert prepared == expected, name
    assert not list(tmp_path.rglob("*.partial"))
    run_all(runs("one", everything) + runs("resumed", resumed), tmp_path, in_double=True)

    def last(folder, name):
        return checkpoint.read(tmp_path / folder / name / "checkpoint_last.pth")
    names = {"two": everything, "resumed": resumed, "accumulated": accumulated}
    pairs = [(folder, name) for folder, selected in names.items() for name in selected]
    for folder, name in pairs:
        one, other = last("one", name), last(folder, name)
        for key, value in one["state_dict"].items():
            difference = (other["state_dict"][key] - value).abs().max()
            assert difference <= 1e-6, (folder, name, key)
        assert other["training"]["state"]["epoch"] == epochs[name]
        assert (other["training"]["flags"]["encoder"] == "bottom_up") == (name != "pixels")
        logs = [np.array(content["training"]["state"]["log"]) for content in (one, other)]
        logs = [np.delete(log, 7, axis=1) for log in logs]          # without the time
        np.testing.assert_allclose(*logs, rtol=1e-5, atol=1e-6)
    start = checkpoint.read(bases["aoa"])["state_dict"]["W_o.weight"]
    assert (last("one", "aoa_cider")["state_dict"]["W_o.weight"] - start).abs().max() > 1e-2


def start(data, save_path, *extra):
    """train.py on two processes, which writes a checkpoint at every step."""
    flags = train_flags(data, save_path, *REGIONS, "--save_every", "1e-9", *extra)
    command = [*TORCHRUN, "train.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, env=ENVIRONMENT)


def workers(process):
    """Process ids of the training processes that torchrun started."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()
            if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes as Linux does")
def test_interrupt_or_death_of_one_process_stops_all_and_leaves_a_checkpoint(demo_data, tmp_path):
    last = tmp_path / "checkpoint_last.pth"
    for number, stop in enumerate((signal.SIGINT, signal.SIGKILL), start=1):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = start(demo_data, tmp_path, "--epochs", "100")
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.02)
        pids = workers(process)
        assert len(pids) == 2
        os.kill(process.pid if stop == signal.SIGINT else pids[1], stop)
        output, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and output.count("settings:") == 1
        assert "[rank0]: Traceback" not in errors
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        if stop == signal.SIGINT:
            assert "run the same command again" in errors
        state = checkpoint.read(last)["training"]["state"]
        assert state["step"] + 6 * state["epoch"] >= number
    steps = state["epoch"]
    content = train_run(demo_data, tmp_path, *REGIONS, "--epochs", str(steps + 1))
    resumed = content["training"]["state"]
    assert resumed["epoch"] == steps + 1 and len(resumed["log"]) == steps + 1


def test_explanations_do_not_depend_on_the_number_of_processes(demo_data, tmp_path):
    vocabulary = read(demo_data / "demo" / "wordmap_demo.json")
    checkpoint.save(tmp_path / "x.pth", small_model("gridtd", vocabulary), vocabulary)
    flags = ["--weight", tmp_path / "x.pth", "--dataset", "demo", "--data_folder", demo_data,
             "--max_images", "3", "--batch_size", "1", "--decoding", "sample", "--max_len", "3",
             "--methods", "lrp", "--device", "cpu", "--save_path"]
    for count, name in ((1, "one"), (2, "two")):
        output = run_all([("explain", [*flags, tmp_path / name])], tmp_path, count)
        assert output.count("index.html") == output.count("settings: ") == 1
        assert (tmp_path / name / "index.html").exists()
    one = tmp_path / "one"
    paths = sorted(path.relative_to(one) for path in one.rglob("*.npz"))
    assert len(paths) == 3
    for path in paths:
        one, two = (np.load(tmp_path / name / path) for name in ("one", "two"))
        assert sorted(one.files) == sorted(two.files)
        assert all(np.array_equal(one[key], two[key]) for key in one.files)


def test_broken_image_of_one_process_ends_each_with_one_sentence(demo_data, tmp_path):
    data = shutil.copytree(demo_data, tmp_path / "data")
    with h5py.File(split_path(data, "demo", "train"), "r+") as file:
        file.attrs["image_folder"] = str(data / "demo" / "images")
    order = epoch_batches(24, batch_size=4, seed=1, epoch=0)
    broken = data / "demo" / "images" / f"train_{order[0][-1]:05d}.png"
    broken.write_text("no image")
    flags = train_flags(data, tmp_path / "out")
    results = run_each([("train", flags)], tmp_path, 2)
    sentences = "error: another process of torchrun has ended", f"error: {broken} is damaged"
    for (status, errors, _), sentence in zip(results, sentences, strict=True):
        lines = [line.split("\r")[-1] for line in errors.splitlines() if "it/s" not in line]
        assert status == 2 and lines[-1].startswith(sentence), errors
        assert "Traceback" not in errors and errors.count("error: ") == 1
