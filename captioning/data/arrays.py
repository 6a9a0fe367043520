"""Reading arrays: HDF5 files, and NumPy's .npz files."""
import contextlib
import zipfile

import h5py
import numpy as np

from captioning.files import check_memory, expect, reading

PREPARE = "create it with preparedataset.py"
COMPRESSION = 1100      # HDF5's filters compress at most by about this factor


@contextlib.contextmanager
def open_hdf5(path, names=(), remedy=PREPARE):
    """Yields the HDF5 file `path`, opened for reading; code within the context reads it as within
    `captioning.files.reading`. names: datasets that the file must contain."""
    with reading(path, remedy), h5py.File(path) as file:
        for name in names:
            checked_dataset(file, name)
        yield file


def checked_dataset(file, name, kinds="iufO", shape=None):
    """The dataset `name` of an open HDF5 file; ValueError if it cannot be what we wrote.

    kinds: allowed kinds of NumPy's types. shape: its lengths, None for any but zero."""
    dataset = file.get(name)
    expect(isinstance(dataset, h5py.Dataset), f"it has no dataset '{name}'")
    is_inside = isinstance(file.get(name, getlink=True), h5py.HardLink) and not dataset.external
    expect(is_inside and not dataset.is_virtual, f"its dataset '{name}' lies in another file")
    is_similar = dataset.dtype.kind in kinds
    if shape is not None:
        lengths = [own or -1 if length is None else length
                   for length, own in zip(shape, dataset.shape, strict=False)]
        is_similar &= len(shape) == dataset.ndim and list(dataset.shape) == lengths
    expect(is_similar, f"its dataset '{name}' of type {dataset.dtype} and shape {dataset.shape} "
                       "is empty or of another form")

    # a short file may announce terabytes, all of them zero
    stored = dataset.id.get_storage_size()
    expect(dataset.nbytes <= COMPRESSION * stored, f"most values of its dataset '{name}' are "
                                                   "missing")
    return dataset


def read_whole(file, name, kinds="iufO", shape=None):
    """The values of a `checked_dataset`; InputError if they do not fit into the main memory."""
    dataset = checked_dataset(file, name, kinds, shape)
    check_memory(dataset.nbytes, f"the dataset '{name}' of {file.filename}", PREPARE)
    return dataset[:]


def read_arrays(path, names=None):
    """The arrays {name: array} of an .npz file: numbers, booleans and strings.

    names: of the arrays to read (default: all)."""
    with reading(path), zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        check_memory(size, str(path), "create it again")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files
                      if names is None or name in names}
        for name, array in arrays.items():
            is_valid = isinstance(array, np.ndarray) and array.dtype.kind in "biufU"
            expect(is_valid, f"its member {name[:40]!r} is no array of numbers or strings")
    return arrays
