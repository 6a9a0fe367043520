"""Files that are written completely or not at all, and names that cannot leave their folder."""
import contextlib
import hashlib
import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from captioning.errors import InputError


@contextlib.contextmanager
def atomic_path(path, sync=True):
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`, else removed.

    sync=False: a power failure may lose the file; for files that can be regenerated. InputError if the disk is full or
    the folder is not writable.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): free some space or choose another "
                         "folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes `text` in UTF-8, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes `value` as JSON, completely or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def read_json(path, keys=()):
    """The JSON value in `path`; InputError if it is missing, not JSON, or an object without one of `keys`."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
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
    """`name`, a relative path read from the data file `source`; InputError if it could leave its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{source} contains {name!r} in place of a file name: correct the file")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts:
        raise InputError(f"{source} contains the file name {name!r}, which lies outside the image folder: correct the "
                         "file")
    return name


def fingerprint(value):
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
