"""Training from end to end: killed and resumed runs end with the same weights; the model learns."""
import csv
import shutil
import signal

import pytest
from fuzz import workspace
from helpers import REGIONS, call, refused, same, train_flags, train_run

import train
from captioning import checkpoint
from captioning.data.vocabulary import Vocabulary
from gridTDmodel import GridTDModel


@pytest.mark.parametrize("model_type, extra", [
    ("gridtd", ("--ss_prob", "0.3", "--region_loss", "0.1", "--region_epochs", "1")),
    ("aoa", ("--amp", "--captions_per_epoch", "2", "--lr_schedule", "cosine"))])
def test_killed_run_ends_like_an_uninterrupted_one(demo_data, tmp_path, model_type, extra):
    extra = ("--model_type", model_type, *extra)
    whole = train_run(demo_data, tmp_path / "whole", *extra)
    last = tmp_path / "killed" / "checkpoint_last.pth"
    killed = train_flags(demo_data, tmp_path / "killed", "--save_every", "1e-9", *extra)
    assert workspace.stop_once_exists(last, ["train", *killed])[0] == -signal.SIGKILL
    before = checkpoint.read(last)["training"]["state"]
    assert (before["epoch"], before["step"]) != (2, 0)
    resumed = train_run(demo_data, tmp_path / "killed", *extra, curves=True)
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["training"]["optimizer"], resumed["training"]["optimizer"])
    logs = []
    for name in ("whole", "killed"):
        rows = csv.DictReader((tmp_path / name / "log.csv").read_text().splitlines())
        logs.append([[row[key] for key in ("epoch", "train_loss", "cider")] for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert (tmp_path / "killed" / "curves.png").stat().st_size > 1000


def test_the_model_learns(demo_data, tmp_path):
    content = train_run(demo_data, tmp_path, "--epochs", "10", "--decoder_lr", "1e-2",
                        "--grad_clip", "1", "--dropout", "0", "--hidden_dim", "32",
                        "--captions_per_epoch", "2")
    rows = content["training"]["state"]["log"]
    assert rows[-1][2] < 0.7 * rows[0][2] and rows[-1][3] > 2 * rows[0][3]      # loss, accuracy
    model, vocabulary = checkpoint.load(tmp_path / "checkpoint_best.pth")
    assert isinstance(model, GridTDModel) and len(vocabulary) == model.config["vocab_size"]


def test_resuming_with_other_flags_is_refused(demo_data, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with refused("--batch_size 4, not 3.*same flags.*another --save_path.*"
                       "--resume never"):
        train_run(demo_data, tmp_path, *REGIONS, "--batch_size", "3")
    with refused("other sizes"):
        train_run(demo_data, tmp_path, *REGIONS, "--attention_dim", "12")
    last = tmp_path / "checkpoint_last.pth"
    content = checkpoint.read(last)
    words = dict(content["wordmap"])
    words["dog"], words["ball"] = words["ball"], words["dog"]
    checkpoint.save(last, checkpoint.load(last)[0], Vocabulary(words), content["training"])
    with refused("another vocabulary"):
        train_run(demo_data, tmp_path, *REGIONS)


def test_resuming_in_another_folder_writes_a_best_checkpoint(demo_data, trained, tmp_path):
    train_run(demo_data, tmp_path, *REGIONS, "--resume", str(trained / "checkpoint_last.pth"))
    assert (tmp_path / "checkpoint_best.pth").exists()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_region_epochs_do_not_count_against_patience(demo_data, tmp_path):
    content = train_run(demo_data, tmp_path, *REGIONS, "--region_epochs", "2", "--patience", "1")
    state = content["training"]["state"]
    assert state["epoch"] == 2 and state["bad_epochs"] == 0


@pytest.mark.parametrize("encoder, remedy", [
    ("vgg19", "--features cnn --encoder vgg19, or train with --from_pixels"),
    ("bottom_up", "--features bottom_up")])
def test_missing_features_are_named_with_the_remedy(tmp_path, encoder, remedy):
    message = f"features_{encoder}_train.* missing: run preparedataset.py with {remedy}$"
    with refused(message):
        train_run(tmp_path / "data", tmp_path / "run", "--encoder", encoder)


def test_default_number_of_epochs_and_recorded_flags(demo_data, tmp_path, monkeypatch):
    """The paper's number of epochs; what follows from flags is recorded."""
    seen = {}
    monkeypatch.setattr(train, "start_training", lambda settings, *_: seen.update(
        {settings.model_type: settings.epochs}))
    for model_type in ("gridtd", "aoa"):
        flags = train_flags(demo_data, tmp_path, "--model_type", model_type)
        del flags[flags.index("--epochs"):flags.index("--epochs") + 2]
        call(train, *flags)
    assert seen == {"gridtd": 20, "aoa": 50}
    monkeypatch.undo()
    flags = train_run(demo_data, tmp_path, "--epochs", "1")["training"]["flags"]
    assert len(flags["data_fingerprint"]) == 16 and flags["epochs"] == 1
    assert flags["finetune_encoder"] and flags["from_pixels"]       # as 'small' is always trained


def test_region_features_have_no_pixels(demo_data, tmp_path):
    with refused("no pixels"):
        train_run(demo_data, tmp_path, "--encoder", "bottom_up", "--finetune_encoder")
