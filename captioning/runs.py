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
from captioning.files import make_folder, read_json, remove_leftovers, write_json

SETTINGS, LOG = "settings.json", "log.txt"
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "h5py", "pycocoevalcap", "matplotlib")


def record_run(folder, args, script):
    """Removes what killed processes left in `folder`; writes flags, versions and git commit to its settings.json, and
    appends everything that is printed afterwards to its log.txt. Under torchrun only the first process does this.

    settings.json has one entry per script, as training and evaluation can share a folder. args: a namespace of flags.
    """
    if processes.rank():
        return
    folder = make_folder(folder)
    remove_leftovers(folder)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    entry = {"started": started, "flags": {name: _json_value(value) for name, value in vars(args).items()},
             "git_commit": git_commit(), "versions": versions()}
    write_json(folder / SETTINGS, _earlier(folder / SETTINGS) | {script: entry})
    stream = sys.stdout.stream if isinstance(sys.stdout, Tee) else sys.stdout
    sys.stdout = Tee(stream, folder / LOG)
    print(f"{script}, {started}")


def _json_value(value):
    return value if isinstance(value, bool | int | float | str | list | None) else str(value)


def _earlier(path):
    try:
        return dict(read_json(path))
    except (InputError, TypeError, ValueError):     # there is none, or it is not ours
        return {}


@cache
def git_commit():
    """Hash of the repository's commit, followed by + if files were changed since; None without git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def versions():
    """{package: version} of Python and of the packages that results depend on."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


class Tee:
    """A text stream that also appends to a file what is written to it."""

    def __init__(self, stream, path):
        self.stream, self.path = stream, path

    def write(self, text):
        with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)        # a full disk must not end the run: what matters is written elsewhere
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)
