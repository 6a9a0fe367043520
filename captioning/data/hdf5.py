"""Reading HDF5 files; errors in them raise InputError."""
import contextlib

import h5py

from captioning.errors import InputError
from captioning.files import check_file
from captioning.memory import check_memory

COMPRESSION = 1100      # HDF5's filters compress at most by about this factor


def open_hdf5(path, names=()):
    """Opens `path` for reading; raises InputError if it is missing, truncated, or lacks one of the datasets `names`."""
    check_file(path, "create it with preparedataset.py")
    try:
        file = h5py.File(path, "r")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be opened (it is truncated or not an HDF5 file): create it with "
                         "preparedataset.py") from error
    with reading(path):
        for name in names:
            checked_dataset(file, name)
    return file


def checked_dataset(file, name, kinds="iufO", shape=None):
    """The dataset `name` of an open file; InputError if it is missing, or cannot be what preparedataset.py wrote.

    kinds: allowed kinds of NumPy's dtypes. shape: its lengths, None for one that may be anything but zero. A dataset
    must fit into the main memory, and its file must contain its values: a short file may announce terabytes."""
    path, dataset = file.filename, file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path} has no dataset '{name}': regenerate it with preparedataset.py")
    if dataset.dtype.kind not in kinds or dataset.shape is None or (shape is not None and (
            len(dataset.shape) != len(shape) or any(length != own and (length is not None or own == 0)
                                                    for own, length in zip(dataset.shape, shape, strict=True)))):
        raise InputError(f"{path} is damaged (its dataset '{name}' is empty or of another form: type "
                         f"{dataset.dtype}, shape {dataset.shape}): regenerate it with preparedataset.py")
    if dataset.nbytes > COMPRESSION * dataset.id.get_storage_size():
        raise InputError(f"{path} is damaged (most values of its dataset '{name}' are missing): regenerate it with "
                         "preparedataset.py")
    return dataset


def read_whole(file, name, kinds="iufO", shape=None):
    """The values of a `checked_dataset`; InputError if they do not fit into the main memory."""
    dataset = checked_dataset(file, name, kinds, shape)
    check_memory(dataset.nbytes, f"the dataset '{name}' of {file.filename}", "regenerate it with preparedataset.py")
    return dataset[:]


@contextlib.contextmanager
def reading(path):
    """Context manager that replaces the exceptions of h5py in a damaged file by InputError."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"{path} is damaged ({error}): regenerate it with preparedataset.py") from error
