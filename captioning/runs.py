"""What a script leaves in its output folder about its run: settings.json and log.txt."""
import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from captioning import processes
from captioning.errors import InputError
from captioning.files import check_file, make_folder, read_json, remove_leftovers, write_json

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "h5py", "pycocoevalcap", "matplotlib")
JSON_TYPES = (bool, int, float, str, list, type(None))


def record_run(folder, args, script):
    """Writes flags, versions and git commit to the folder's settings.json, which has one entry per
    script, appends to its log.txt what is printed from now on, and removes what killed processes
    left in the folder. Under torchrun only the first process does this."""
    if processes.rank():
        return
    folder = make_folder(folder)
    remove_leftovers(folder)
    path = folder / "settings.json"
    entries = {}
    if path.exists():
        entries = read_json(path)
        is_ours = isinstance(entries, dict) and all(
            isinstance(entry, dict) and "flags" in entry for entry in entries.values())
        if not is_ours:
            raise InputError(f"{path} is not of a run, and would be replaced: choose another "
                             "--save_path")
    log = folder / "log.txt"
    if log.exists():
        check_file(log, "remove it, or choose another --save_path")
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    flags = {name: value if isinstance(value, JSON_TYPES) else str(value)
             for name, value in vars(args).items()}
    entries[script] = {"started": started, "flags": flags, "git_commit": git_commit(),
                       "versions": versions()}
    write_json(path, entries)
    stream = sys.stdout.stream if isinstance(sys.stdout, Tee) else sys.stdout
    sys.stdout = Tee(stream, log)
    print(f"{script}, {started}")


@cache
def versions():
    """{name: version} of Python and of the packages on which results depend."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def git_commit():
    """Hash of the commit, followed by + if files were changed since; None without git."""
    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        is_changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if is_changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Tee:
    """A text stream that also appends to a file what is written to it."""

    def __init__(self, stream, path):
        self.stream = stream
        self.path = path

    def write(self, text):
        # a full disk must not end the run: what matters is written elsewhere
        with (contextlib.suppress(OSError),
              open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file):
            file.write(text)
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)
