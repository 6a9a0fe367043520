"""A folder of explanations: one folder per image, of ExplainedImage.save, and index.html.

What is ours, and may be replaced: in a folder with an explanation.npz the files `own_names`, and
an index.html that is such a page."""
import json
import os
from itertools import count
from pathlib import Path

import numpy as np

from captioning.data.arrays import read_arrays
from captioning.errors import InputError
from captioning.explanation.methods import METHODS
from captioning.files import TEMPORARY, content_hash, expect, folder_name, reading
from captioning.report.page import ENTRY, PAGE, THUMBNAIL, has_entry, write_page

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


def choose_folders(paths, save_path, model=""):
    """A folder in `save_path` for each image in `paths`, never one that belongs to another image.

    An image that was explained before keeps its folder. Otherwise the folder has the stem of the
    image as its name, with a number appended if that is taken, also by files of the user. model:
    the name of one of several that are compared, which have folders of their own."""
    names = {}          # {image: name of its folder}
    taken = set()
    for folder in reversed(stored_folders(save_path)):
        image = stored_array(folder, "image")
        if image is not None:
            if str(stored_array(folder, "model") or "") == model:
                names[str(image)] = folder.name
            taken.add(folder.name)
    for path in paths:
        name = stem = folder_name(f"{path.stem}_{model}" if model else path.stem)
        numbers = count(2)
        while name in taken or foreign_file(Path(save_path, name)):
            name = f"{stem}_{next(numbers)}"
        taken.add(names.setdefault(os.path.abspath(path), name))
    return [Path(save_path, names[os.path.abspath(path)]) for path in paths]


def own_names():
    """Names of the files of an explanation."""
    return {ARRAYS, ENTRY, THUMBNAIL, PAGE, *(f"{method}.png" for method in METHODS)}


def foreign_file(folder):
    """A file in place of the folder or of one of `own_names` that is not ours, or None."""
    if folder.exists() and not folder.is_dir():
        return folder
    is_ours = (folder / ARRAYS).exists()
    for name in sorted(own_names()):
        path = folder / name
        if path.exists() and not (is_ours and path.is_file()):
            return path
    return None


def read_explanation(folder):
    """The arrays of the folder's explanation.npz; InputError if it is damaged or incomplete."""
    path = Path(folder, ARRAYS)
    arrays = read_arrays(path)
    with reading(path, "explain the image again"):
        words = arrays["words"]
        unknown = set(arrays["methods"].tolist()) - set(METHODS)
        expect(words.dtype.kind == "U" and not unknown, "its words or methods are unknown")
        for name in (*OF_WORDS, "contrast", "image", "identity", "upright"):
            arrays[name]        # KeyError if it is missing
        for name, array in arrays.items():
            if name in OF_WORDS or name.endswith(("_pixels", "_regions", "_words")):
                expect(len(array) == len(words) - 1, f"its array {name} has another length")
            if array.dtype.kind == "f":     # only objects have a presence, other words NaN
                is_valid = np.isfinite(array) | (np.isnan(array) & (name == "presence"))
                expect(is_valid.all(), f"its array {name} has values that are not finite")
    return arrays


def is_explained(folder, identity):
    """Whether the folder has an explanation with this `identity`, whose files are as written."""
    try:
        arrays = read_explanation(folder)
        with reading(folder / ARRAYS):
            hashes = json.loads(str(arrays["files"]))
            return str(arrays["identity"]) == identity and all(
                content_hash(folder / name) == value for name, value in hashes.items())
    except InputError:
        return False


def write_index(save_path, first):
    """Writes index.html with every explanation in `save_path`.

    Those in the folders `first` come first, then the others by name. Explanations that cannot be
    shown are omitted and named in one printed sentence."""
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
    path = Path(save_path, PAGE)
    if omitted:
        print(f"omitted from {path}: {', '.join(omitted)}")
    write_page(path, captions)


def caption_of(words):
    """The words between <start> and <end> as a string."""
    return " ".join(word for word in words if word not in ("<start>", "<end>"))
