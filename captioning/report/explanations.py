"""A folder of explanations: one folder per image, of ExplainedImage.save, and index.html."""
import os
from collections import Counter
from itertools import chain, count
from pathlib import Path

import numpy as np

from captioning.data.arrays import read_arrays
from captioning.errors import InputError
from captioning.explanation.methods import METHODS
from captioning.files import TEMPORARY, folder_name
from captioning.report.page import ENTRY, THUMBNAIL, has_entry, write_page

ARRAYS = "explanation.npz"
# its arrays with one entry for each of the T words
OF_WORDS = ("logits", "probabilities", "alternatives", "alternative_probabilities", "attention")


def stored_folders(save_path):
    """The folders in `save_path` that contain an explanation, sorted by name."""
    folders = [path.parent for path in Path(save_path).glob(f"*/{ARRAYS}")]
    return sorted(folder for folder in folders if not TEMPORARY.search(folder.name))


def stored_array(folder, name):
    """One array of the folder's explanation; None if it cannot be read."""
    try:
        return read_arrays(folder / ARRAYS, [name])[name]
    except (InputError, KeyError):
        return None


def choose_folders(paths, save_path):
    """A folder in `save_path` for each image in `paths`, never one that belongs to another image.

    An image that was explained before keeps its folder. Otherwise the folder is named after the
    image: its stem, or its full name and position if several of the `paths` have that stem; with a
    number appended if that name is taken.
    """
    names = {}          # {image: name of its folder}
    taken = set()
    for folder in reversed(stored_folders(save_path)):
        image = stored_array(folder, "image")
        if image is not None:
            names[str(image)] = folder.name
            taken.add(folder.name)

    stems = Counter(path.stem for path in paths)
    folders = []
    for position, path in enumerate(paths):
        name = names.get(os.path.abspath(path))
        if name is None:
            own_stem = stems[path.stem] == 1
            preferred = folder_name(path.stem if own_stem else f"{path.name}_{position}")
            candidates = chain([preferred], (f"{preferred}_{number}" for number in count(2)))
            name = next(candidate for candidate in candidates if candidate not in taken
                        and not Path(save_path, candidate).is_file())
            taken.add(name)
        folders.append(Path(save_path, name))
    return folders


def read_explanation(folder):
    """The arrays of the folder's explanation.npz; InputError if it is damaged or incomplete."""
    path = Path(folder, ARRAYS)
    arrays = read_arrays(path)
    try:
        T = len(arrays["words"]) - 1
        is_valid = arrays["words"].dtype.kind == "U" and set(arrays["methods"].tolist()) <= set(
            METHODS) and {"contrast", "image", "identity", "upright"} <= arrays.keys()
        for name, array in arrays.items():
            if name in OF_WORDS or name.endswith(("_pixels", "_regions", "_words")):
                is_valid &= len(array) == T
            if array.dtype.kind == "f":
                is_valid &= np.isfinite(array).all()
        is_valid &= all(name in arrays for name in OF_WORDS)
    except (KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise InputError(f"{path} is damaged or of another version: explain the image again")
    return arrays


def is_explained(folder, identity):
    """Whether the folder has an explanation with this `identity`, whose files are complete."""
    try:
        arrays = read_explanation(folder)
    except InputError:
        return False
    plots = [folder / f"{method}.png" for method in arrays["methods"].tolist()]
    return (str(arrays["identity"]) == identity and all(map(_is_complete_png, plots))
            and has_entry(folder))


def _is_complete_png(path):
    """Whether the file ends with the last chunk of a PNG."""
    return path.is_file() and path.read_bytes()[-8:] == b"IEND\xaeB`\x82"


def write_index(save_path, first):
    """Writes index.html with every explanation in `save_path`.

    Those in the folders `first` come first, then the others by name. Explanations that cannot be
    shown are omitted and named in one printed sentence.
    """
    captions = {}
    omitted = []
    for folder in dict.fromkeys([*first, *stored_folders(save_path)]):
        words = stored_array(folder, "words")
        if words is None:
            omitted.append(f"{folder.name} (its {ARRAYS} cannot be read)")
        elif not has_entry(folder):
            omitted.append(f"{folder.name} (its {ENTRY} or {THUMBNAIL} is missing, damaged or of "
                           "another version: explain its image again)")
        else:
            captions[folder] = caption_of(words.tolist())
    path = Path(save_path, "index.html")
    if omitted:
        print(f"omitted from {path}: {', '.join(omitted)}")
    write_page(path, captions)


def caption_of(words):
    """The words between <start> and <end> as a string."""
    return " ".join(word for word in words if word not in ("<start>", "<end>"))
