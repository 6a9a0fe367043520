"""Reading HDF5 files: what is wrong in them is an InputError."""
import contextlib
import os

import h5py

from captioning.errors import InputError


def open_hdf5(path, names=()):
    """h5py.File of `path`, for reading; InputError if it is missing, truncated or lacks one of the datasets `names`."""
    try:
        file = h5py.File(path, "r")
    except (OSError, ValueError, RuntimeError) as error:
        reason = "it is truncated or no HDF5 file" if os.path.exists(path) else "no such file"
        raise InputError(f"{path} cannot be opened ({reason}): make it with preparedataset.py") from error
    with reading(path):
        for name in names:
            if not isinstance(file.get(name), h5py.Dataset):
                raise InputError(f"{path} has no dataset '{name}': make it anew with preparedataset.py")
    return file


@contextlib.contextmanager
def reading(path):
    """InputError in place of what h5py raises within a damaged file."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"{path} is damaged ({error}): make it anew with preparedataset.py") from error
