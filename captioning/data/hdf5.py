"""Reading HDF5 files; errors in them raise InputError."""
import contextlib
import os

import h5py

from captioning.errors import InputError


def open_hdf5(path, names=()):
    """Opens `path` for reading; raises InputError if it is missing, truncated, or lacks one of the datasets `names`."""
    try:
        file = h5py.File(path, "r")
    except (OSError, ValueError, RuntimeError) as error:
        reason = "it is truncated or not an HDF5 file" if os.path.exists(path) else "no such file"
        raise InputError(f"{path} cannot be opened ({reason}): create it with preparedataset.py") from error
    with reading(path):
        for name in names:
            if not isinstance(file.get(name), h5py.Dataset):
                raise InputError(f"{path} has no dataset '{name}': regenerate it with preparedataset.py")
    return file


@contextlib.contextmanager
def reading(path):
    """Context manager that replaces the exceptions of h5py in a damaged file by InputError."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"{path} is damaged ({error}): regenerate it with preparedataset.py") from error
