"""Fine-tuning from end to end: all modes, interruption and resuming, and refused settings."""
import csv
import shutil
import signal
from pathlib import Path

import h5py
import pytest
import torch
from fuzz import workspace
from helpers import call, refused, run_training, same, train_run

import finetune
import preparedataset
from captioning import checkpoint
from captioning.data.dataset import split_path
from captioning.data.vocabulary import read
from captioning.training.reward import frequencies_path

ROOT = Path(__file__).parents[1]
MODES = ("--ce_tune", "--erase_tune", "--lrp_tune", "--cider_tune", "--lrp_cider_tune")


@pytest.fixture(scope="module")
def bases(demo_data, tmp_path_factory):
    """{model type: checkpoint}, trained long enough for rewards to differ."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("gridtd", "aoa"):
        train_run(demo_data, folder / name, "--model_type", name, "--epochs", "3", "--decoder_lr",
                  "1e-2")
    return {name: folder / name / "checkpoint_last.pth" for name in ("gridtd", "aoa")}


def flags(base, save_path, *extra):
    return ["--weight", str(base), "--save_path", str(save_path), "--epochs", "2", "--workers", "0",
            "--device", "cpu", *extra]


def run(base, save_path, *extra):
    return run_training(finetune, flags(base, save_path, *extra), save_path)


@pytest.mark.parametrize("model_type", ["gridtd", "aoa"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains(bases, tmp_path, model_type, mode):
    before = checkpoint.read(bases[model_type])
    extra = () if mode == "--lrp_tune" else ("--amp",)
    content = run(bases[model_type], tmp_path, mode, *extra, "--epochs", "1")
    assert content["config"] == before["config"] and content["wordmap"] == before["wordmap"]
    weights = content["state_dict"]
    assert not torch.equal(weights["W_o.weight"], before["state_dict"]["W_o.weight"])
    assert all(value.isfinite().all() for value in weights.values())
    expected = {"batch_size": 4, "hidden_dim": 16, "finetune_encoder": True, "epochs": 1,
                "decoder_lr": 1e-4, "mode": mode.removeprefix("--")}
    assert content["training"]["flags"].items() >= expected.items()
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert len(rows) == 1 and rows[0]["step"] == "6"
    assert float(rows[-1]["train_reward" if "cider" in mode else "train_accuracy"]) > 0
    assert checkpoint.load(tmp_path / "checkpoint_best.pth")[0].config == before["config"]


@pytest.mark.parametrize("model_type, extra", [
    ("gridtd", ("--lrp_cider_tune", "--samples", "2", "--baseline", "mean")),
    ("aoa", ("--lrp_tune", "--amp")),
    ("gridtd", ("--erase_tune", "--erase_every", "2", "--amp"))])
def test_killed_run_ends_like_an_uninterrupted_one(bases, tmp_path, model_type, extra):
    whole = run(bases[model_type], tmp_path / "whole", *extra)
    last = tmp_path / "killed" / "checkpoint_last.pth"
    killed = flags(bases[model_type], tmp_path / "killed", *extra, "--save_every", "1e-9")
    assert workspace.stop_once_exists(last, ["finetune", *killed])[0] == -signal.SIGKILL
    assert checkpoint.read(last)["training"]["state"]["epoch"] < 2
    resumed = run(bases[model_type], tmp_path / "killed", *extra)
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["training"]["optimizer"], resumed["training"]["optimizer"])


def complete(base, recorded, *extra):
    """The settings of these flags and a checkpoint that recorded others, and the model."""
    args = finetune.get_args_parser().parse_args(["--weight", str(base), *extra])
    model, _ = checkpoint.load(base)
    settings = finetune.with_recorded_flags(args, {"training": {"flags": recorded}}, model)
    finetune.complete(settings)
    return settings, model


def test_self_critical_training_has_no_dropout_and_all_references(bases):
    recorded = {"dataset": "demo", "captions_per_epoch": 2}
    settings, model = complete(bases["aoa"], recorded, "--cider_tune")
    finetune.set_dropout(model, settings)
    assert model.dropout.p == model.attention_dropout.p == 0 and model.config["dropout"] == 0.3
    assert settings.captions_per_epoch is None and settings.dataset == "demo"


def test_flags_recorded_by_earlier_versions_are_defaults(bases):
    recorded = {"captions_per_step": 2, "batch_size": 7, "grad_clip": 0.5}
    settings, _ = complete(bases["aoa"], recorded, "--erase_tune", "--batch_size", "3")
    assert (settings.captions_per_epoch, settings.batch_size, settings.grad_clip) == (2, 3, 0.5)
    assert settings.weight_decay == 0 and settings.model_type == "aoa"


@pytest.mark.parametrize("extra, message", [
    (("--cider_tune", "--baseline", "mean"), "--samples 2"),
    (("--lrp_cider_tune", "--ss_prob", "0.5"), "omit --ss_prob"),
    (("--erase_tune", "--region_loss", "1"), "omit --ss_prob, --region_loss"),
    (("--erase_tune", "--synonyms", "missing.txt"), "missing.txt cannot be read"),
    (("--cider_tune", "--label_smoothing", "0.1"), "and --label_smoothing"),
    (("--lrp_tune", "--label_smoothing", "0.1"), "omit --label_smoothing"),
    (("--lrp_tune", "--hidden_dim", "32"), "has --hidden_dim 16, not 32: omit the flag"),
    (("--lrp_tune", "--model_type", "aoa"), "has --model_type gridtd, not aoa"),
    (("--lrp_tune", "--stop_words", "missing.txt"), "missing.txt cannot be read"),
    (("--ce_tune", "--data_folder", "nowhere"), "nowhere.*preparedataset.py"),
])
def test_contradicting_flags_are_refused(bases, tmp_path, extra, message):
    with refused(message):
        run(bases["gridtd"], tmp_path, *extra)


@pytest.mark.parametrize("flag, value", [
    ("batch_size", "many"), ("batch_size", 4.5), ("batch_size", True), ("grad_clip", float("nan")),
    ("amp", 3), ("dropout", [0.5])])
def test_unsuitable_flags_in_the_checkpoint_are_refused(bases, tmp_path, flag, value):
    content = checkpoint.read(bases["gridtd"])
    content["training"]["flags"][flag] = value
    torch.save(content, tmp_path / "damaged.pth")
    with refused(f"damaged.pth is damaged .*{flag}"):
        run(tmp_path / "damaged.pth", tmp_path / "tuned", "--ce_tune")


def test_erasure_needs_object_words_of_the_vocabulary(bases, tmp_path):
    (tmp_path / "synonyms.txt").write_text("zeppelin, airship")
    with refused("no object word.*--synonyms"):
        run(bases["gridtd"], tmp_path / "x", "--erase_tune", "--synonyms",
            str(tmp_path / "synonyms.txt"))


def test_the_initial_checkpoint_is_not_overwritten(bases):
    with refused("choose another folder"):
        run(bases["gridtd"], bases["gridtd"].parent, "--ce_tune")


def test_another_vocabulary_is_refused(bases, tmp_path):
    call(preparedataset, "--dataset", "demo", "--output_folder", tmp_path, "--demo_size", 4, 2, 2,
         "--workers", "0")
    with refused("another vocabulary"):
        run(bases["gridtd"], tmp_path / "x", "--cider_tune", "--data_folder", str(tmp_path))


def test_missing_frequencies_and_references_are_named(bases, demo_data, tmp_path):
    data = shutil.copytree(demo_data, tmp_path / "data")
    extra = ("--cider_tune", "--data_folder", data)
    path = frequencies_path(data, "demo")
    path.rename(tmp_path / "renamed")
    with refused("document_frequencies_demo.hdf5.*preparedataset.py"):
        run(bases["gridtd"], tmp_path / "x", *extra)
    (tmp_path / "renamed").rename(path)
    with h5py.File(split_path(data, "demo", "train"), "a") as file:
        name = file["names"].asstr()[3]
        file["captions"][3, :, 1:] = 0
        file["captions"][3, :, 1] = read(demo_data / "demo" / "wordmap_demo.json").end
    with refused(f"{name} has no reference"):
        run(bases["gridtd"], tmp_path / "x", *extra)


@pytest.mark.parametrize("mode", ["--ce_tune", "--cider_tune"])
def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(bases, tmp_path, mode):
    content = checkpoint.read(bases["gridtd"])
    # finite, as other weights are refused, but the logits are not
    content["state_dict"]["W_v.weight"].fill_(1e38)
    torch.save(content, tmp_path / "broken.pth")
    last = tmp_path / "run" / "checkpoint_last.pth"
    last.parent.mkdir()
    last.write_bytes(bases["gridtd"].read_bytes())
    with refused("at epoch 1, step 1: lower --decoder_lr"):
        run(tmp_path / "broken.pth", last.parent, mode, "--resume", "never")
    assert last.read_bytes() == bases["gridtd"].read_bytes()


def test_settings_are_printed_before_the_checkpoint_is_read(bases, tmp_path, capsys):
    with refused("cannot be read"):
        run(tmp_path / "missing.pth", tmp_path / "tuned", "--ce_tune")
    assert capsys.readouterr().out.startswith("settings: --weight")
    run(bases["gridtd"], tmp_path / "tuned", "--ce_tune", "--epochs", "1")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("settings: ") and "--epochs 1 " in first and "None" not in first
    assert second.startswith("of the checkpoint: gridtd with small, data set demo;")


def test_an_encoder_that_is_not_trained_does_not_change(bases, tmp_path):
    """Nor do its batch-norms; so the run can be resumed, which needs the encoder of --weight."""
    extra = ("--ce_tune", "--no-finetune_encoder")
    run(bases["gridtd"], tmp_path, *extra, "--epochs", "1")
    content = run(bases["gridtd"], tmp_path, *extra)
    training, weights = content["training"], content["state_dict"]
    assert training["state"]["epoch"] == 2 and not training["from_features"]
    changed = {name.split(".")[0]
               for name, value in checkpoint.read(bases["gridtd"])["state_dict"].items()
               if not torch.equal(weights[name], value)}
    assert "encoder" not in changed and "W_o" in changed


@pytest.mark.parametrize("mode, flag, words, others, what", [
    ("--lrp_tune", "--stop_words", "The,\nA a", "a", "--stop_words"),
    ("--erase_tune", "--synonyms", "dog, puppy\nball", "dog\nball",
     "other object words.*--synonyms")])
def test_resuming_with_other_words_is_refused(bases, tmp_path, mode, flag, words, others, what):
    """But in another order and case. Checkpoints of earlier versions, which have no fingerprint of
    the words, still resume."""
    file, tuned = tmp_path / "words.txt", tmp_path / "tuned"
    extra = (mode, flag, str(file))
    file.write_text(words)
    content = run(bases["gridtd"], tuned, *extra, "--epochs", "1")
    file.write_text("a the" if flag == "--stop_words" else words)
    run(bases["gridtd"], tuned, *extra, "--epochs", "1")
    file.write_text(others)
    with refused(f"{what}.*same flags to resume.*--resume never"):
        run(bases["gridtd"], tuned, *extra)
    recorded = content["training"]["flags"]
    content["training"]["flags"] = {name: value for name, value in recorded.items()
                                    if "fingerprint" not in name}
    assert len(content["training"]["flags"]) == len(recorded) - 2       # of words and data
    torch.save(content, tuned / "checkpoint_last.pth")
    assert run(bases["gridtd"], tuned, *extra)["training"]["state"]["epoch"] == 2


def test_default_save_path_is_not_used_by_the_demo(bases, monkeypatch):
    """With its checkpoint, finetune.py starts a new run."""
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *_: load(bases["gridtd"]))
    settings, _ = complete("output/demo/checkpoint_best.pth", {}, "--lrp_tune")
    assert settings.save_path == "output/demo_lrp_tune"
    assert settings.save_path not in (ROOT / "configs" / "demo.sh").read_text()
