"""Fine-tuning from end to end: all modes, killed and resumed, and what it refuses."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import same, train_run

import finetune
import preparedataset
from aoamodel import AOAModel
from captioning import checkpoint
from captioning.data.dataset import features_path, split_path
from captioning.data.vocabulary import read
from captioning.errors import InputError
from captioning.files import fingerprint
from captioning.training.reward import frequencies_path

ROOT = Path(__file__).parents[1]
MODES = ("--ce_tune", "--lrp_tune", "--cider_tune", "--lrp_cider_tune")


@pytest.fixture(scope="module")
def bases(demo_data, tmp_path_factory):
    """{model type: checkpoint} that say some words: enough for rewards to differ"""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("gridtd", "aoa"):
        train_run(demo_data, folder / name, "--model_type", name, "--epochs", "3", "--decoder_lr", "1e-2")
    return {name: folder / name / "checkpoint_last.pth" for name in ("gridtd", "aoa")}


def flags(base, save_path, *extra):
    return ["--weight", str(base), "--save_path", str(save_path), "--epochs", "2", "--workers", "0", "--device", "cpu",
            *extra]


def run(base, save_path, *extra):
    finetune.main(finetune.get_args_parser().parse_args(flags(base, save_path, *extra)))
    return checkpoint.read(Path(save_path) / "checkpoint_last.pth")


@pytest.mark.parametrize("model_type", ["gridtd", "aoa"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_on(bases, tmp_path, model_type, mode):
    before = checkpoint.read(bases[model_type])
    extra = () if mode == "--lrp_tune" else ("--amp",)
    content = run(bases[model_type], tmp_path, mode, *extra)
    assert content["config"] == before["config"] and content["wordmap"] == before["wordmap"]
    assert not torch.equal(content["state_dict"]["W_o.weight"], before["state_dict"]["W_o.weight"])
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    kept = content["training"]["flags"]
    assert (kept["batch_size"], kept["hidden_dim"], kept["finetune_encoder"]) == (4, 16, True)
    assert kept["epochs"] == 2 and kept["decoder_lr"] == 1e-4
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert len(rows) == 2 and {row["step"] for row in rows} == {"6"}
    assert float(rows[-1]["train_reward" if "cider" in mode else "train_accuracy"]) > 0
    assert checkpoint.load(tmp_path / "checkpoint_best.pth")[0].config == before["config"]


@pytest.mark.parametrize("model_type, extra", [("gridtd", ("--lrp_cider_tune", "--samples", "2", "--baseline", "mean")),
                                               ("aoa", ("--lrp_tune", "--amp"))])
def test_killed_run_ends_like_an_uninterrupted_one(bases, tmp_path, model_type, extra):
    whole = run(bases[model_type], tmp_path / "whole", *extra)
    killed = flags(bases[model_type], tmp_path / "killed", *extra)
    process = subprocess.Popen([sys.executable, "finetune.py", *killed, "--save_every", "1e-9"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    last = tmp_path / "killed" / "checkpoint_last.pth"
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.read(last)["training"]["state"]["epoch"] < 2
    resumed = run(bases[model_type], tmp_path / "killed", *extra)
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["training"]["optimizer"], resumed["training"]["optimizer"])


@pytest.mark.parametrize("mode", MODES)
def test_from_stored_features_of_regions(demo_data, tmp_path, mode):
    """Bottom-up features: 5 regions, some of them padding"""
    for split, size in (("train", 24), ("val", 8)):
        with h5py.File(split_path(demo_data, "demo", split)) as file:
            names = file["names"].asstr()[:].tolist()
        features = np.random.default_rng(0).random((size, 5, 6), dtype=np.float32)
        features[::2, 4] = 0
        with h5py.File(features_path(demo_data, "demo", split, "bottom_up"), "w") as file:
            file["features"] = features.astype(np.float16)
            file.attrs["names"] = fingerprint(names)
    words = read(demo_data / "demo" / "wordmap_demo.json")
    torch.manual_seed(0)
    model = AOAModel(len(words), 8, 16, num_head=2, encoder=None, feature_dim=6)
    base = tmp_path / "base" / "x.pth"
    base.parent.mkdir()
    checkpoint.save(base, model, words)
    content = run(base, tmp_path / "tuned", mode, "--data_folder", str(demo_data), "--batch_size", "8", "--epochs", "1")
    assert content["config"] == model.config and content["training"]["flags"]["encoder"] == "bottom_up"


def test_self_critical_training_is_without_dropout_and_with_all_references(bases, tmp_path):
    args = finetune.get_args_parser().parse_args(flags(bases["aoa"], tmp_path, "--cider_tune"))
    model, _ = checkpoint.load(bases["aoa"])
    finetune.complete(args, model, {"dataset": "demo", "captions_per_step": 2})
    finetune.set_dropout(model, args)
    assert model.dropout.p == model.attention_dropout.p == 0 and model.config["dropout"] == 0.3
    assert args.captions_per_step is None


def command_error(*arguments):
    """(exit status, last line on stderr) of the script"""
    done = subprocess.run([sys.executable, "finetune.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().split("\n")[-1]


@pytest.mark.parametrize("arguments, message", [
    (["--lrp_tune"], "required: --weight"),
    (["--weight", "x.pth"], "one of the arguments --lrp_tune --cider_tune --lrp_cider_tune --ce_tune is required"),
    (["--weight", "x.pth", "--lrp_tune", "--cider_tune"], "--cider_tune: not allowed with argument --lrp_tune"),
    (["--weight", "x.pth", "--lrp_tune"], "the checkpoint x.pth cannot be read"),
])
def test_command_line_errors(arguments, message):
    status, line = command_error(*arguments)
    assert status == 2 and message in line


@pytest.mark.parametrize("extra, message", [
    (("--cider_tune", "--baseline", "mean"), "--samples 2"),
    (("--lrp_cider_tune", "--ss_prob", "0.5"), "leave out --ss_prob"),
    (("--lrp_tune", "--hidden_dim", "32"), "has --hidden_dim 16, not 32: leave the flag out"),
    (("--lrp_tune", "--model_type", "aoa"), "has --model_type gridtd, not aoa"),
    (("--lrp_tune", "--stop_words", "missing.txt"), "stop words missing.txt"),
    (("--ce_tune", "--data_folder", "nowhere"), "nowhere.*preparedataset.py"),
])
def test_flags_that_do_not_fit(bases, tmp_path, extra, message):
    with pytest.raises(InputError, match=message):
        run(bases["gridtd"], tmp_path, *extra)


def test_the_base_is_not_overwritten(bases):
    with pytest.raises(InputError, match="choose another folder"):
        run(bases["gridtd"], bases["gridtd"].parent, "--ce_tune")


def test_another_vocabulary_is_noticed(bases, tmp_path):
    preparedataset.main(preparedataset.get_args_parser().parse_args(
        ["--dataset", "demo", "--output_folder", str(tmp_path), "--demo_size", "4", "2", "2", "--workers", "0"]))
    with pytest.raises(InputError, match="another vocabulary"):
        run(bases["gridtd"], tmp_path / "x", "--cider_tune", "--data_folder", str(tmp_path))


def test_missing_frequencies_and_references_are_named(bases, demo_data, tmp_path):
    path = frequencies_path(demo_data, "demo")
    path.rename(tmp_path / "away")
    try:
        with pytest.raises(InputError, match="document_frequencies_demo.hdf5.*preparedataset.py"):
            run(bases["gridtd"], tmp_path / "x", "--cider_tune")
    finally:
        (tmp_path / "away").rename(path)
    split = split_path(demo_data, "demo", "train")
    with h5py.File(split, "a") as file:
        whole, name = file["captions"][:], file["names"].asstr()[3]
        damaged = whole.copy()
        damaged[3, :, 1], damaged[3, :, 2:] = read(demo_data / "demo" / "wordmap_demo.json").end, 0
        file["captions"][:] = damaged
    try:
        with pytest.raises(InputError, match=f"{name} has no reference"):
            run(bases["gridtd"], tmp_path / "x", "--cider_tune")
    finally:
        with h5py.File(split, "a") as file:
            file["captions"][:] = whole


@pytest.mark.parametrize("mode", ["--ce_tune", "--cider_tune"])
def test_a_loss_that_is_no_number_stops_and_keeps_what_was_good(bases, tmp_path, mode):
    run(bases["gridtd"], tmp_path, mode, "--epochs", "1")
    good = checkpoint.read(tmp_path / "checkpoint_last.pth")
    broken = tmp_path / "broken.pth"
    model, words = checkpoint.load(bases["gridtd"])
    with torch.no_grad():
        model.W_v.weight[0, 0] = torch.nan
    content = checkpoint.read(bases["gridtd"])
    checkpoint.save(broken, model, words, content["training"])
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "checkpoint_last.pth").write_bytes((tmp_path / "checkpoint_last.pth").read_bytes())
    before = (folder / "checkpoint_last.pth").read_bytes()
    with pytest.raises(InputError, match="not a number.*epoch 1, step 1: lower --decoder_lr"):
        run(broken, folder, mode, "--resume", "never")
    assert (folder / "checkpoint_last.pth").read_bytes() == before
    assert all(value.isfinite().all() for value in good["state_dict"].values())
