"""Killed, stopped, on a full disk or in a folder without write permission: the same command again
ends as if nothing had happened, and nothing that existed is damaged. Few open files are enough."""
import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest
from behaviour import contents, digest
from fuzz import workspace

from captioning import runs

# saves every step
TRAIN = workspace.TRAIN.replace("--workers 0", "--workers 1") + " out --save_every 1e-9"
SCRIPTS = {
    "preparedataset": workspace.PREPARE.format("out").split("--features")[0].replace(
        "--workers 0", "--workers 1") + "--features cnn --encoder small --batch_size 1",
    "train": f"train --dataset karpathy --encoder bottom_up {TRAIN}",
    "finetune": f"finetune --weight regions.pth --lrp_tune {workspace.BOTTOM_UP} --device cpu "
                "--workers 0 --epochs 2 --batch_size 2 --save_path out --save_every 1e-9",
    "evaluation": f"{workspace.EVALUATE} --weight regions.pth --metrics cider --explanations "
                  "correctness --methods lrp --batch_size 1",
    "explain": f"{workspace.EXPLAIN} --weight pixels.pth --images images/0.png images/1.png "
               "--batch_size 1 --save_path out"}
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
NOBODY = 65534      # user id without permissions


def pytest_generate_tests(metafunc):
    if "stop" in metafunc.fixturenames:
        metafunc.parametrize("stop", range(metafunc.config.getoption("crash_runs")))


@pytest.fixture(scope="module")
def fresh(small_files, tmp_path_factory):
    """A function that returns a folder with new copies of the small files, always the same folder,
    as explanations contain the absolute paths of their images."""
    folder = tmp_path_factory.mktemp("crash") / "copy"

    def create():
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(small_files, folder)
    return create


@pytest.fixture(scope="module")
def undisturbed(fresh):
    """A function: script -> (seconds that it runs, sizes of what it writes, `results`)."""
    @functools.cache
    def run(script):
        folder = fresh()
        before, started = set(workspace.snapshot(folder)), time.monotonic()
        status, errors = workspace.run(SCRIPTS[script], folder)
        assert status == 0, errors
        seconds = time.monotonic() - started
        sizes = [Path(path).stat().st_size for path in workspace.snapshot(folder).keys() - before]
        return seconds, sizes, results(folder)
    return run


def results(folder):
    """{file and name: hash of what it contains} in the folder except the time of runs."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {f"{path.relative_to(folder)} {name}": digest(value)
            for path in paths if path.name not in ("settings.json", "log.txt")
            for name, value in contents(path)}


def assert_ends_like(expected, script, folder, before=lambda: None):
    """Runs the script again, whose results are the `expected` ones. before: see workspace.start."""
    status, errors = workspace.run(SCRIPTS[script], folder, before)
    assert status == 0, errors
    assert results(folder) == expected


def assert_no_process_left(group):
    """Within 10 seconds: workers end with their parent, whatever killed it."""
    deadline = time.monotonic() + 10
    while any(running_in(group)):
        assert time.monotonic() < deadline, f"processes {list(running_in(group))} are still running"
        time.sleep(0.05)


def running_in(group):
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                yield path.parent.name


def test_stopped_at_any_moment(fresh, undisturbed, stop):
    """SIGKILL, SIGINT or SIGTERM, of which the latter two end with one line, at a random moment."""
    script, number = list(SCRIPTS)[stop % len(SCRIPTS)], SIGNALS[stop % len(SIGNALS)]
    seconds, _, expected = undisturbed(script)
    moment = random.Random(stop).uniform(0, 0.8 * seconds)
    folder = fresh()
    child = workspace.start(SCRIPTS[script], folder)
    time.sleep(moment)
    os.kill(child, number)
    status, errors = workspace.finish(child, folder)
    print(f"{script}: {number.name} after {moment:.2f} seconds, exit status {status}")
    assert_no_process_left(child)
    assert status in ((-signal.SIGKILL, 0) if number == signal.SIGKILL else (130, 0)), errors
    if status == 130:
        assert "Traceback" not in errors and errors.endswith("\n")
        last = errors.splitlines()[-1].split("\r")[-1]
        assert last.startswith(("interrupted", "terminated")), errors
        assert not list(folder.rglob("*.tmp"))
    assert_ends_like(expected, script, folder)


def test_stopped_while_workers_start(fresh, undisturbed):
    """Python ignores a KeyboardInterrupt that is raised while a process is forked."""
    def stop_at_every_fork():
        os.register_at_fork(before=functools.partial(os.kill, os.getpid(), signal.SIGINT))
        runs.git_commit = lambda: None      # starts a process, too
    expected, folder = undisturbed("preparedataset")[-1], fresh()
    status, errors = workspace.run(SCRIPTS["preparedataset"], folder, stop_at_every_fork)
    assert status == 130 and errors.endswith("interrupted\n"), errors
    assert_ends_like(expected, "preparedataset", folder)


@contextlib.contextmanager
def small_disk(folder, size, largest):
    """Yields (a function that limits what its process can write, a function that lifts the limit):
    a file system of `size` bytes where one can be mounted, else `largest` bytes for each file."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    if subprocess.run([*options, f"size={size}"], capture_output=True).returncode:
        yield functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE,
                                (largest, largest)), lambda: None
        return
    try:
        yield lambda: None, lambda: subprocess.run([*options, "remount,size=1g"], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def in_pages(sizes, page=4096):
    """Bytes that files of these sizes occupy."""
    return sum(-(-size // page) * page for size in sizes)


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_disk(small_files, fresh, undisturbed, script):
    _, sizes, expected = undisturbed(script)
    folder, share = fresh(), random.Random(script).uniform(0.1, 0.9)
    before = in_pages(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    size = before + in_pages([int(share * in_pages(sizes))])
    with small_disk(folder, size, int(share * max(sizes))) as (limit, lift):
        shutil.copytree(small_files, folder, dirs_exist_ok=True)
        intact = workspace.snapshot(folder)
        assert_refused_in_one_sentence(*workspace.run(SCRIPTS[script], folder, limit))
        assert not list(folder.rglob("*.tmp"))
        assert intact.items() <= workspace.snapshot(folder).items()
        lift()
        assert_ends_like(expected, script, folder)


def assert_refused_in_one_sentence(status, errors):
    assert status == 2 and "Traceback" not in errors
    assert errors.count("error: ") == 1, f"{status}: {errors}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_folder_that_is_not_writable(fresh, script):
    folder = fresh()
    intact = workspace.snapshot(folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        # root may write anywhere
        drop = functools.partial(os.setuid, NOBODY) if os.getuid() == 0 else lambda: None
        assert_refused_in_one_sentence(*workspace.run(SCRIPTS[script], folder, drop))
        assert workspace.snapshot(folder) == intact
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


def few_files():
    """Lets this process open files up to number 15 alone."""
    os.closerange(3, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


@pytest.mark.parametrize("script", SCRIPTS)
def test_few_open_files(fresh, undisturbed, script):
    """There are no workers, whose batches would never arrive."""
    assert_ends_like(undisturbed(script)[-1], script, fresh(), few_files)


def test_few_open_files_for_the_demo(fresh):
    command = ("preparedataset --dataset demo --demo_size 2 1 1 --image_size 48 --device cpu "
               "--output_folder out")
    assert workspace.run(command, fresh(), few_files) == (0, mock.ANY)
