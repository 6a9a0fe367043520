"""Files: written completely or not at all, read through one boundary, and names of files."""
import contextlib
import hashlib
import json
import os
import pickle
import platform
import re
import secrets
import shutil
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from captioning.errors import InputError

MACHINE = re.sub(r"\W", "-", platform.node())
TEMPORARY = re.compile(r"\.([^.]*)\.(\d{1,9})\.[0-9a-f]{8}\.tmp$")     # of a `temporary_path`
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@contextlib.contextmanager
def reading(path, remedy="create it again"):
    """The boundary: whatever fails while the file `path` is read becomes one InputError.

    Code within this context uses what it reads as if it were valid. It calls `expect` where an
    invalid value would not fail, but give a wrong result."""
    check_file(path, remedy)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or shortened(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it has no key {reason}"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it is no file of tensors alone"
        raise InputError(f"{path} is damaged or of another kind ({reason}): {remedy}") from error


def expect(condition, reason):
    """ValueError with this reason, for `reading`, unless the condition holds."""
    if not condition:
        raise ValueError(reason)


def check_file(path, remedy="check the path"):
    """InputError unless `path` is a regular file: a pipe or a device could block its reader."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        raise InputError(f"{path} cannot be read ({reason}): {remedy}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{path} cannot be read (it is {kind}): give a file")


def read_json(path, keys=(), lines=False):
    """The JSON value in `path`; with `keys`, it must be an object that has all of them. lines: a
    list of one value per line (JSON Lines) is read as well.

    NaN and infinity become None. Refused, as no caller could use them: integers of more than 64
    bits, objects that have a key twice, and halves of surrogate pairs."""
    def number(text):
        expect(len(text) < 21 and abs(int(text)) < 2 ** 63, f"the number {text[:25]} is too large")
        return int(text)

    def unique(pairs):
        value = dict(pairs)
        expect(len(value) == len(pairs), "one of its objects has a key twice")
        return value

    options = {"parse_int": number, "parse_constant": lambda text: None,
               "object_pairs_hook": unique}
    with reading(path, "check the path, or download the file again"):
        text = Path(path).read_text(encoding="utf-8-sig")
        try:
            value = json.loads(text, **options)
        except json.JSONDecodeError:
            if not lines:
                raise
            value = [json.loads(line, **options) for line in text.splitlines() if line.strip()]
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
        expect(not keys or isinstance(value, dict), f"it has no {' and '.join(keys)}")
        for key in keys:
            value[key]      # KeyError if it is missing
    return value


def temporary_path(path):
    """A path beside `path` that names this machine and process, and that nobody can prepare:
    <name>.<machine>.<process>.<random>.tmp."""
    name = f"{Path(path).name}.{MACHINE}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    return Path(path).with_name(name)


def remove_leftovers(folder):
    """Removes temporary files and folders that processes of this machine left when killed."""
    for path in Path(folder).iterdir():
        match = TEMPORARY.search(path.name)
        # on Windows os.kill would interrupt the process
        if not match or match[1] != MACHINE or os.name == "nt":
            continue
        try:
            os.kill(int(match[2]), 0)
        except ProcessLookupError:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:     # the process runs and belongs to another user
            continue


@contextlib.contextmanager
def atomic_path(path, sync=True):
    """Yields a temporary path beside `path`, which is renamed to `path` on success, else removed.

    sync=False: a power failure may lose the file; for files that are easily made again.
    InputError if the disk is full or the folder is not writable."""
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_path(path)
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): free some space "
                         "or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(path):
    """Returns when the content of a file, or the list of a folder's files, is on the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return      # which Windows cannot open
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path, content):
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path, text):
    # names of files, which texts contain, need not be Unicode
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path, value):
    """Writes JSON that `read_json` accepts; halves of surrogate pairs, which names of files may
    contain, become text such as \\udcff."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):x}", text)
    write_text(path, text)


def make_folder(folder):
    """Creates `folder`, if it does not exist -> its Path; InputError if it is not writable."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be created ({error.strerror}): choose "
                         "another") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} is not writable: choose another, or change its "
                         "permissions")
    return Path(folder)


def safe_name(name):
    """`name`, a relative path of an image that a data file contains; ValueError, for `reading`,
    if it names no file, cannot be printed, or could leave the image folder."""
    expect(isinstance(name, str) and PurePosixPath(name).parts and name.isprintable(),
           f"{name!r} in place of a file name is empty or not printable")
    path = PurePosixPath(name.replace("\\", "/"))
    is_inside = not (path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts)
    expect(is_inside, f"the file name {name!r} lies outside the image folder")
    return name


def folder_name(text):
    """A name for a folder that resembles `text`: at most 150 bytes, valid on every file system.

    It is never empty, has no separators, and is taken neither for a temporary file nor for the
    page index.html beside the folders."""
    name = "".join(character if character.isprintable() else "_" for character in text)
    name = re.sub(r'[<>:"/\\|?*]', "_", name).encode()[:150].decode(errors="ignore").rstrip(". ")
    is_taken = not name or name.lower() == "index.html" or name.endswith(".tmp")
    return f"_{name}_" if is_taken else name


def content_hash(path):
    """A short hash of a file's bytes."""
    with reading(path, "restore it"):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def fingerprint(value):
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def shortened(text, length=160):
    """`text` in one line of at most `length` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[:length - 1]}…"


def check_memory(size, what, remedy):
    """InputError if `size` bytes exceed the main memory. what, remedy: of the sentence."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, CGROUP_LIMITS):       # of a container
        text = path.read_text().strip() if path.exists() else ""
        limits += [int(text)] if text.isdigit() else []
    if size > min(limits):
        raise InputError(f"{what} needs {size / 1e9:,.1f} GB of memory, of which this machine "
                         f"has {min(limits) / 1e9:,.1f} GB: {remedy}")
