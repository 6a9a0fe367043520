"""Training goes on after any interruption as if nothing had happened, and learns."""
import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import same, train_flags, train_run

import train
from aoamodel import AOAModel
from captioning import checkpoint
from captioning.data.dataset import features_path
from captioning.data.vocabulary import Vocabulary, build
from captioning.errors import InputError
from captioning.explanation import encoders
from captioning.training.loop import epoch_batches
from captioning.training.losses import mix_in_predictions, region_loss, word_loss
from gridTDmodel import GridTDModel

ROOT = Path(__file__).parents[1]


def stopped_run(data, save_path, number, *extra):
    """A process group, as of a terminal, that gets the signal after its first steps; every step is saved. It has one
    thread like the tests' own process: sums over more threads have other last bits."""
    command = [sys.executable, "train.py", *train_flags(data, save_path, "--save_every", "1e-9", *extra)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    last = Path(save_path) / "checkpoint_last.pth"
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize("model_type, extra", [
    ("gridtd", ("--ss_prob", "0.3", "--region_loss", "0.1", "--region_epochs", "1")),
    ("aoa", ("--amp", "--captions_per_step", "2", "--lr_schedule", "cosine"))])
def test_killed_run_ends_like_an_uninterrupted_one(demo_data, tmp_path, model_type, extra):
    extra = ("--model_type", model_type, *extra)
    whole = train_run(demo_data, tmp_path / "whole", *extra)
    status, _ = stopped_run(demo_data, tmp_path / "killed", signal.SIGKILL, *extra)
    assert status == -signal.SIGKILL
    before = checkpoint.read(tmp_path / "killed" / "checkpoint_last.pth")["training"]["state"]
    assert (before["epoch"], before["step"]) != (2, 0)
    resumed = train_run(demo_data, tmp_path / "killed", *extra)
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["training"]["optimizer"], resumed["training"]["optimizer"])
    logs = []
    for name in ("whole", "killed"):
        rows = csv.DictReader((tmp_path / name / "log.csv").read_text().splitlines())
        logs.append([[row[key] for key in ("epoch", "train_loss", "cider")] for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert (tmp_path / "killed" / "curves.png").stat().st_size > 1000


def test_ctrl_c_saves_and_says_how_to_go_on(demo_data, tmp_path):
    status, errors = stopped_run(demo_data, tmp_path, signal.SIGINT, "--workers", "2")
    assert status == 130
    assert "run the same command again" in errors.strip().split("\n")[-1]
    assert "Traceback" not in errors
    assert checkpoint.read(tmp_path / "checkpoint_last.pth")["training"]["state"]["step"] > 0


def test_from_features_and_with_more_workers_too(demo_data, tmp_path):
    """Pictures are augmented by (seed, epoch, index): the number of workers changes nothing."""
    one = train_run(demo_data, tmp_path / "one", "--epochs", "1")
    two = train_run(demo_data, tmp_path / "two", "--epochs", "1", "--workers", "2")
    assert same(one["state_dict"], two["state_dict"])


def test_it_learns(demo_data, tmp_path):
    rows = train_run(demo_data, tmp_path, "--epochs", "10", "--decoder_lr", "1e-2", "--grad_clip", "1", "--dropout",
                     "0", "--hidden_dim", "32", "--captions_per_step", "2")["training"]["state"]["log"]
    assert rows[-1][2] < 0.7 * rows[0][2] and rows[-1][3] > 2 * rows[0][3]        # loss, accuracy
    model, vocabulary = checkpoint.load(tmp_path / "checkpoint_best.pth")
    assert isinstance(model, GridTDModel) and len(vocabulary) == model.config["vocab_size"]


def test_resuming_with_other_flags_is_refused(demo_data, tmp_path):
    train_run(demo_data, tmp_path, "--epochs", "1")
    with pytest.raises(InputError, match="--batch_size 4, not 3"):
        train_run(demo_data, tmp_path, "--batch_size", "3")
    with pytest.raises(InputError, match="other sizes"):
        train_run(demo_data, tmp_path, "--attention_dim", "12")
    words = dict(checkpoint.read(tmp_path / "checkpoint_last.pth")["wordmap"])
    words["dog"], words["ball"] = words["ball"], words["dog"]
    model, _ = checkpoint.load(tmp_path / "checkpoint_last.pth")
    training = checkpoint.read(tmp_path / "checkpoint_last.pth")["training"]
    checkpoint.save(tmp_path / "checkpoint_last.pth", model, Vocabulary(words), training)
    with pytest.raises(InputError, match="another vocabulary"):
        train_run(demo_data, tmp_path)


def test_resuming_elsewhere_keeps_a_best_checkpoint(demo_data, tmp_path):
    train_run(demo_data, tmp_path / "one", "--epochs", "1")
    train_run(demo_data, tmp_path / "two", "--resume", str(tmp_path / "one" / "checkpoint_last.pth"))
    assert (tmp_path / "two" / "checkpoint_best.pth").exists()
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 3


def test_epochs_on_regions_alone_do_not_count_against_patience(demo_data, tmp_path):
    state = train_run(demo_data, tmp_path, "--region_epochs", "2", "--patience", "1")["training"]["state"]
    assert state["epoch"] == 2 and state["bad_epochs"] == 0


def test_features_of_other_weights_are_refused(demo_data):
    model = GridTDModel(9, 4, 6, 5, encoder="small")
    stored = SimpleNamespace(features=features_path(demo_data, "demo", "train", "small"))
    with pytest.raises(InputError, match="other weights"):
        train.check_features(stored, model)
    torch.manual_seed(1)                    # preparedataset.py's --seed
    model.encoder = encoders.build("small")
    train.check_features(stored, model)


def test_region_features_have_no_pixels(demo_data, tmp_path):
    with pytest.raises(InputError, match="no pixels"):
        train_run(demo_data, tmp_path, "--encoder", "bottom_up", "--finetune_encoder")


def test_every_epoch_sees_every_picture_once_in_another_order():
    one, two = (epoch_batches(23, 5, seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(sum(one, [])) == sorted(sum(two, [])) == list(range(23))
    assert one != two and one == epoch_batches(23, 5, seed=1, epoch=0)


def test_word_loss_ignores_padding():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    captions = torch.tensor([[5, 1, 2, 6], [5, 3, 6, 0]])
    loss, _, words = word_loss(logits, captions)
    p = logits.log_softmax(-1)
    expected = -(p[0, 0, 1] + p[0, 1, 2] + p[0, 2, 6] + p[1, 0, 3] + p[1, 1, 6]) / 5
    assert words == 5
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("model_class", [GridTDModel, AOAModel])
def test_region_loss_asks_one_region_for_each_word(model_class):
    vocabulary = build([["a", "b", "c", "d"]], 1)
    own = {"attention_dim": 5} if model_class is GridTDModel else {"num_head": 2}
    model = model_class(len(vocabulary), embed_dim=4, hidden_dim=6, encoder=None, feature_dim=3, **own).double()
    features = torch.rand(2, 4, 3, dtype=torch.float64)
    sentences = [[["a", "b"], ["b", "d"]], [["c"], ["c", "c"]]]
    captions = torch.zeros(2, 2, 5, dtype=torch.long)
    for b, image in enumerate(sentences):
        for n, words in enumerate(image):
            ids = vocabulary.encode(words, 3)
            captions[b, n, :len(ids)] = torch.tensor(ids)
    expected, said, words = 0.0, 0, 0
    for b, image in enumerate(sentences):
        regions = [model.region_logits(features)[b, k] for k in range(4)]
        for word in "abcd":
            p = max(1 / (1 + math.exp(-logits[vocabulary.wordmap[word]].item())) for logits in regions)
            there = any(word in sentence for sentence in image)
            expected -= math.log(p if there else 1 - p)
            said, words = said + (there and p > 0.5), words + there
    padded = torch.cat([features, torch.zeros(2, 1, 3)], 1)       # a region that is not there says nothing
    loss, *counts = region_loss(model, padded, captions, vocabulary)
    assert loss.item() == pytest.approx(expected / words, rel=1e-5)
    assert [int(count) for count in counts] == [said, words]


def test_regions_say_what_the_predictor_says_of_them_alone():
    """gridtd: W_o of ĉ + h2 where attention is all on the region, the sentinel is off and the LSTM is silent."""
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()
    features = torch.rand(1, 4, 3)
    v = model.start(features).v
    torch.testing.assert_close(model.region_logits(features), model.output(v))


def test_scheduled_sampling_keeps_start_and_padding():
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3)
    captions = torch.tensor([[[7, 1, 2, 3, 4, 8, 0, 0]]]).expand(64, 1, -1)
    features = torch.rand(64, 4, 3)
    torch.manual_seed(0)
    read = mix_in_predictions(model, features, captions, 0.5)
    assert read.shape == captions.shape
    assert torch.equal(read[..., 0], captions[..., 0])
    assert torch.equal(read[..., 5:], captions[..., 5:])           # <end> and padding are never replaced
    changed = (read != captions)[..., 1:5].float().mean().item()
    assert 0.3 < changed < 0.55                                    # half of them, less those drawn right
    assert torch.equal(mix_in_predictions(model, features, captions, 0.0), captions)


def test_gpu_where_there_is_none(demo_data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "train.py", *train_flags(demo_data, tmp_path), "--device", "cuda"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: --device cuda") and "\n" not in result.stderr.strip()
