"""Reading NumPy files; whatever is wrong with them raises InputError."""
import zipfile

import numpy as np

from captioning.errors import InputError
from captioning.files import check_file, shortened
from captioning.memory import check_memory


def read_arrays(path, names=None):
    """The arrays {name: array} of an .npz file, or {"": array} of an .npy file: numbers, booleans and strings.

    names: of the arrays to read (default: all). InputError if the file is damaged or missing, has other contents, or
    does not fit into the main memory."""
    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_memory(sum(member.file_size for member in archive.infolist()), f"{path}", "create it again")
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            arrays = {"": content}
        else:
            with content:
                arrays = {name: content[name] for name in content.files if names is None or name in names}
    except InputError:
        raise
    except Exception as error:      # NumPy and zipfile raise many kinds for damaged files
        raise InputError(f"{path} cannot be read ({shortened(error)}): create it again") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufU":
            raise InputError(f"{path} cannot be read (its member {shortened(name, 40)!r} is no array of numbers or "
                             "strings): create it again")
    return arrays


def matches(array, kinds, shape):
    """Whether an array has one of NumPy's dtype `kinds`, the lengths `shape`, where None stands for any, and no values
    that are not finite."""
    return (array.dtype.kind in kinds and array.ndim == len(shape)
            and all(length in (None, own) for own, length in zip(array.shape, shape, strict=True))
            and (array.dtype.kind == "U" or bool(np.isfinite(array).all())))
