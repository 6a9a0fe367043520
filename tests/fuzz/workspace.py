"""A folder with one small file of every format, commands that read them, and running a command in a
forked process."""
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from helpers import encoded
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import evaluation
import explain
import finetune
import preparedataset
import train
from captioning import checkpoint
from captioning.data.vocabulary import read
from captioning.errors import InputError, run_script
from captioning.files import read_json, write_json
from captioning.report.explanations import read_explanation
from gridTDmodel import GridTDModel
from studies import compare

SCRIPTS = {"preparedataset": preparedataset, "train": train, "finetune": finetune,
           "evaluation": evaluation, "explain": explain, "compare": compare}
MEMORY_LIMIT = 12 * 2**30      # bytes of address space, of which PyTorch takes about 5 GB at once
TIME_LIMIT = 120        # seconds; the slowest command takes about one on an idle machine
SPLITS = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
CAPTIONS = ["a dog runs", "two cats and a dog", "a cat sits on the left"]
PREPARE = ("preparedataset --dataset karpathy --karpathy_json captions.json --min_word_freq 1 "
           "--max_len 8 --captions_per_image 2 --image_folder images --workers 0 --device cpu "
           "--output_folder {} --features bottom_up --regions 3 --bottom_up ")
TRAIN = ("--data_folder data --device cpu --workers 0 --batch_size 4 --epochs 2 --embed_dim 4 "
         "--hidden_dim 6 --attention_dim 5 --save_path")
EXPLAIN = "explain --device cpu --methods attention lrp --max_len 3 --decoding greedy"
EVALUATE = ("evaluation --device cpu --workers 0 --data_folder data --dataset karpathy "
            "--save_path out --max_len 3")
PREDICTIONS = (f"{EVALUATE} --predictions predictions.json "
               "--references coco/captions_val2017.json")
BOTTOM_UP = "--dataset karpathy --data_folder data"
# for each command, the files that it reads (patterns)
COMMANDS = {
    PREPARE.format("new") + "regions": ["captions.json", "regions/*.tsv"],
    "preparedataset --dataset coco2017 --annotation_folder coco --output_folder new "
    "--min_word_freq 1": ["coco/*.json"],
    f"train --dataset karpathy --encoder bottom_up {TRAIN} run": [
        "run/checkpoint_last.pth", "data/karpathy/*train*", "data/karpathy/wordmap*",
        "data/karpathy/*val*"],
    f"finetune --weight regions.pth --cider_tune {BOTTOM_UP} --device cpu --workers 0 --epochs 1 "
    "--batch_size 4 --save_path tuned": ["regions.pth", "data/karpathy/document*"],
    f"{EVALUATE} --weight regions.pth --metrics cider chair": [
        "regions.pth", "data/karpathy/*test*", "data/karpathy/boxes*", "data/karpathy/wordmap*"],
    f"{EVALUATE} --weight regions.pth --metrics cider --explanations correctness --methods lrp": [
        "data/karpathy/boxes*", "data/karpathy/features*test*"],
    f"{PREDICTIONS} --metrics bleu cider": ["predictions.json", "coco/captions_val2017.json"],
    f"{PREDICTIONS} --boxes coco/instances_val2017.json --metrics chair map --object_words "
    "words.txt --synonyms synonyms.txt": ["coco/instances*", "*.txt"],
    "compare first second --save_path out": ["first/metrics_test.json"],
    f"{EXPLAIN} --weight pixels.pth --images images/0.png --save_path explained": [
        "pixels.pth", "images/0.png", "explained/0/*", "explained/index.html"],
    f"{EXPLAIN} --weight regions.pth {BOTTOM_UP} --save_path out": [
        "regions.pth", "data/karpathy/features*test*", "data/karpathy/test*", "images/6.png"]}


def call(command):
    """Runs a command, the name of a script and its flags, or a function in this process."""
    if callable(command):
        command()
        return
    script, *flags = command if isinstance(command, list) else command.split()
    module = SCRIPTS[script]
    run_script(module.main, module.get_args_parser().parse_args(flags))


def build(folder):
    """Fills `folder` with the files that COMMANDS read."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    rng = np.random.default_rng(0)
    for name in ("images", "regions", "coco"):
        Path(name).mkdir()

    # images, their captions and region features
    images, rows = [], []
    for i, split in enumerate(SPLITS):
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{i}.png")
        sentences = [{"raw": text} for text in CAPTIONS[:2 + i % 2]]
        images.append({"filename": f"{i}.png", "split": split, "sentences": sentences})
        corners = np.sort(rng.uniform(0, 24, (3, 2, 2)), axis=1).reshape(3, 4)
        rows.append(f"{i}\t32\t24\t3\t{encoded(corners)}\t{encoded(rng.random((3, 5)))}")
    Path("regions/a.tsv.0").write_text("\n".join(rows[:4]))
    Path("regions/b.tsv").write_text("\n".join(rows[4:]))
    write_json("captions.json", {"images": images})
    write_json("predictions.json", [{"image": f"val{i}.png", "caption": text}
                                    for i, text in enumerate(CAPTIONS)])

    # COCO's annotations
    for part, size in (("train", 12), ("val", 3)):
        write_json(f"coco/captions_{part}2017.json", {
            "images": [{"id": i, "file_name": f"{part}{i}.png"} for i in range(size)],
            "annotations": [{"image_id": i, "caption": CAPTIONS[i % 3]} for i in range(size)]})
    box = {"category_id": 1, "bbox": [1, 2, 3.5, 4]}
    write_json("coco/instances_val2017.json", {
        "images": [{"id": i, "file_name": f"val{i}.png", "width": 32, "height": 24}
                   for i in range(3)],
        "annotations": [{"image_id": i, **box} for i in range(3)],
        "categories": [{"id": 1, "name": "dog"}]})
    for name in ("first", "second"):
        write_json(f"{name}/metrics_test.json", {"cider": 0.5, "bleu_4": 0.25, "chair_i": 0})
    Path("words.txt").write_text("dog cat")
    Path("synonyms.txt").write_text("dog, puppy\ncat")

    # what the scripts write
    call(PREPARE.format("data") + "regions")
    entry = {"categories": {"dog": 3}, "bbox": {"3": [[1, 2, 20, 12.5]]}, "shape": [32, 24]}
    boxes = {f"{i}.png": entry for i in range(len(SPLITS))}
    write_json("data/karpathy/boxes_karpathy.json", boxes)
    words = read("data/karpathy/wordmap_karpathy.json")
    torch.manual_seed(0)
    for name, options in (("regions", {"encoder": None, "feature_dim": 5}),
                          ("pixels", {"encoder": "small"})):
        checkpoint.save(f"{name}.pth", GridTDModel(len(words), 4, 6, 5, **options), words)
    training = f"train --dataset karpathy --encoder bottom_up {TRAIN} run"
    call(training.replace("--epochs 2", "--epochs 1"))
    call(f"{EXPLAIN} --weight pixels.pth --images images/0.png --save_path explained")

    # every command once, so that forked processes need to import nothing
    loaded = folder.with_name("loaded")
    shutil.copytree(folder, loaded)
    os.chdir(loaded)
    for command in COMMANDS:
        call(command)


def states(folder):
    """{path: numbers that change whenever the file is written or replaced} in a folder."""
    result = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            times = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            result[path] = (info.st_mode, *(() if stat.S_ISDIR(info.st_mode) else times))
    return result


def snapshot(folder):
    """{path: hash} of all regular files in a folder."""
    return {path: _hash(path, state) for path, state in states(folder).items()
            if stat.S_ISREG(state[0])}


@functools.cache
def _hash(path, _):     # reads a file again only if its state is another one
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def start(command, folder, before=lambda: None):
    """Starts a command in a forked process in `folder`, with the signal handlers of a script -> the
    process's id. before: called in that process first."""
    signals = [signal.SIGINT, signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)       # until the child has its handlers
    child = os.fork()
    if child == 0:
        try:
            _run_child(command, folder, before, signals)
        finally:
            os._exit(99)        # whatever happens, it must not go on as a second test run
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return child


def _run_child(command, folder, before, signals):
    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for number, path in ((0, os.devnull), (1, os.devnull), (2, errors_of(folder))):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
    random.seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.import_module("captioning.interrupt")
    os.fsync = lambda handle: None      # nothing here tests a power failure
    gc.disable()        # it writes to every object, whose memory would have to be copied
    # instead of one that all processes share and a killed one would never release
    tqdm.set_lock(threading.RLock())
    before()
    status = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        call(command)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stderr.flush()
    os._exit(status)


def errors_of(folder):
    """The file that contains the standard error of the command that ran in `folder`."""
    return Path(folder).with_name(f"{Path(folder).name}.stderr")


def finish(child, folder, time_limit=TIME_LIMIT):
    """Waits for a process of `start` -> (exit status, or "hang" beyond the limit; its errors)."""
    deadline = time.monotonic() + time_limit
    ended = False
    while not ended and time.monotonic() < deadline:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(status) if ended else "hang"
    return status, errors_of(folder).read_text(errors="replace")


def stop_once_exists(path, command, number=signal.SIGKILL):
    """Stops a command and its workers with this signal once the file `path` exists -> (exit status,
    standard error)."""
    folder = Path(path).parents[1]
    child = start(command, folder)
    deadline = time.monotonic() + TIME_LIMIT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(child, number)
    return finish(child, folder)


def run(command, folder, before=lambda: None):
    """Runs a command in a forked process in `folder` -> (exit status, standard error)."""
    return finish(start(command, folder, before), folder)


def check(command, folder, place=None, with_plots=True):
    """Runs a command in `folder`, some of whose files or flags are unusual -> its status.

    AssertionError unless it is 0, with valid output, or 2 with one sentence, which names the
    `place`, and without changes of existing files. with_plots=False: plots of matplotlib, most of
    the time of many commands, are empty files."""
    before = snapshot(folder)
    status, errors = run(command, folder, (lambda: None) if with_plots else _without_plots)
    assert status in (0, 2), f"status {status}: {command}\n{errors}"
    after = snapshot(folder)
    leftovers = [name for name in after if name.endswith(".tmp")]
    assert not leftovers, leftovers
    if status == 2:
        lines = [line.split("\r")[-1] for line in errors.split("\n") if "error: " in line]
        assert len(lines) == 1 and "Traceback" not in errors and len(lines[0]) < 1000, errors
        changed = [name for name in before if before[name] != after.get(name)
                   and Path(name).name not in ("settings.json", "log.txt")]
        assert not changed, f"{lines[0]} changed {changed}"
        is_named = place is None or any(part in lines[0] for part in place)
        assert is_named, f"{lines[0]} does not name {place}"
    else:
        for path in after.keys() - before.keys():
            check_output(Path(path))
    return status


def _without_plots():
    Figure.savefig = lambda self, path, **_: Path(path).touch()


def check_output(path):
    """AssertionError if a file that a command wrote is invalid."""
    try:
        if path.name == "explanation.npz":
            read_explanation(path.parent)
        elif path.suffix == ".json":
            json.dumps(read_json(path), allow_nan=False)
        elif path.suffix == ".pth":
            checkpoint.load(path)
    except InputError as error:
        # paths need not be Unicode
        raise AssertionError(f"invalid output: {error!r}") from error


def restore(folder, base, intact):
    """Makes `folder`, whose states were `intact`, a copy of `base` again -> its states."""
    for path, state in states(folder).items():
        if state != intact.get(path) and stat.S_ISDIR(state[0]):
            shutil.rmtree(path, ignore_errors=True)
        elif state != intact.get(path):
            Path(path).unlink(missing_ok=True)      # its folder may have been removed
    for path in intact:
        if not os.path.lexists(path):
            original = base / Path(path).relative_to(folder)
            shutil.copytree(original, path) if original.is_dir() else shutil.copy2(original, path)
    return states(folder)
