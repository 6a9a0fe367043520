"""Files that are written completely or not at all, and names that cannot leave their folder."""
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from captioning.errors import InputError

LARGEST_INTEGER = 2 ** 63 - 1       # in JSON files; larger numbers are errors
# names that Windows reserves, and the file beside the folders that `folder_name` names
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{device}{i}" for device in ("COM", "LPT") for i in range(10)), "INDEX.HTML"}
TEMPORARY = re.compile(r"\.([^.]*)\.(\d{1,9})\.tmp$")      # the end of the names of `temporary_path`


def temporary_path(path):
    """A path beside `path` that names this machine and process: <name>.<machine>.<process id>.tmp."""
    return Path(path).with_name(f"{Path(path).name}.{_machine()}.{os.getpid()}.tmp")


def _machine():
    return re.sub(r"\W", "-", platform.node())


def remove_leftovers(folder):
    """Removes the temporary files and folders in `folder` that processes of this machine left when they were killed."""
    for path in Path(folder).iterdir():
        match = TEMPORARY.search(path.name)
        if match and match[1] == _machine() and not _is_running(int(match[2])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:         # it belongs to another user
        return True
    return True


def check_file(path, remedy="check the path"):
    """InputError unless `path` is a regular file: a directory, a pipe or a device could block its reader forever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise InputError(f"{path} cannot be read ({reason}): {remedy}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{path} cannot be read (it is {kind}): give a file")


@contextlib.contextmanager
def atomic_path(path, sync=True):
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`, else removed.

    sync=False: a power failure may lose the file; for files that can be regenerated. InputError if the disk is full or
    the folder is not writable.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_path(path)
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): free some space or choose another "
                         "folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(path):
    """Returns when the contents of a file, or the list of a folder's files, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text):
    """Writes `text` in UTF-8, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")     # file names need not be Unicode


def write_json(path, value):
    """Writes `value` as JSON that `read_json` accepts, completely or not at all: halves of surrogate pairs, which file
    names that are not Unicode contain, become text such as \\udcff."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    write_text(path, re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):x}", text))


def read_json(path, keys=()):
    """The JSON value in `path`, in which integers have at most 64 bits and strings are valid Unicode.

    InputError if the file is missing, not JSON, or an object without one of `keys`; NaN, infinity and objects that name
    a key twice are not JSON."""
    check_file(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, parse_int=_integer, parse_constant=_no_number, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()      # fails if half a surrogate pair is missing
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} cannot be read as JSON ({reason}): check the path, or download the file again"
                         ) from error
    if keys and not isinstance(value, dict):
        raise InputError(f"{path} must contain a JSON object with the keys {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise InputError(f"{path} has no key '{key}': is it the right file?")
    return value


def _integer(text):
    value = int(text) if len(text) < 21 else None
    if value is None or abs(value) > LARGEST_INTEGER:
        raise ValueError(f"the number {shortened(text, 25)} is too large")
    return value


def _no_number(text):
    raise ValueError(f"{text} is not a number")


def _object(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shortened(next(key for key in keys if keys.count(key) > 1), 40)!r} occurs twice")
    return value


def shortened(text, length=160):
    """`text` in one line; if it has more than `length` characters, its first sentences or words that fit."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    cut = text[:length - 1]
    sentences = cut.rpartition(". ")[0]
    return sentences or f"{cut.rpartition(' ')[0] or cut}…"


def make_folder(folder):
    """Creates `folder`, if it does not exist -> its Path; InputError if that fails or it is not writable."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be created ({error.strerror}): choose another") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} is not writable: choose another, or change its permissions")
    return Path(folder)


def safe_name(name, source):
    """`name`, a relative path read from the data file `source`; InputError if it is not the name of a file, cannot be
    printed, or could leave its folder."""
    if not isinstance(name, str) or "\0" in name or not PurePosixPath(name).parts:
        raise InputError(f"{source} contains {name!r} in place of a file name: correct the file")
    if not name.isprintable():
        raise InputError(f"{source} contains the file name {name!r}, which is not printable: correct the file")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts:
        raise InputError(f"{source} contains the file name {name!r}, which lies outside the image folder: correct the "
                         "file")
    return name


def folder_name(text):
    """A name for an output folder that resembles `text`: at most 150 bytes, and valid on every file system.

    It is never empty, reserved, "." or "..", contains no separators, and is never taken for a temporary file."""
    name = "".join(character if character.isprintable() else "_" for character in text)
    name = re.sub(r'[<>:"/\\|?*]', "_", name).encode()[:150].decode(errors="ignore").rstrip(". ")
    is_valid = name and name.upper() not in RESERVED and name.split(".")[0].upper() not in RESERVED
    return name if is_valid and not name.endswith(".tmp") else f"_{name}_"


def fingerprint(value):
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
