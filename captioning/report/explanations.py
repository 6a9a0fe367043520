"""Folders of explanations: each image has one, with plots, explanation.npz and its part of the page, entry.html."""
import os
import shutil
from collections import Counter
from itertools import chain, count
from pathlib import Path

import numpy as np

from captioning.data.arrays import matches, read_arrays
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, SPLIT
from captioning.files import TEMPORARY, folder_name, make_folder, sync_to_disk, temporary_path
from captioning.report.heatmaps import draw_heatmaps, draw_words
from captioning.report.page import (
    ENTRY,
    THUMBNAIL,
    caption_text,
    has_entry,
    is_shared,
    maps_of,
    page_entry,
    write_entry,
    write_page,
)

ARRAYS = "explanation.npz"
# kinds of NumPy's dtypes and shapes of arrays in explanation.npz; T: words explained, W: T + 1
COMMON = {"words": ("U", "W"), "methods": ("U", "M"), "contrast": ("U", ""), "image": ("U", ""), "identity": ("U", ""),
          "upright": ("b", ""), "logits": ("f", "T"), "probabilities": ("f", "T"), "alternatives": ("U", "TA"),
          "alternative_probabilities": ("f", "TA")}


def stored_folders(save_path):
    """The folders in `save_path` that contain an explanation, sorted by name."""
    return sorted(path.parent for path in Path(save_path).glob(f"*/{ARRAYS}") if not TEMPORARY.search(path.parent.name))


def stored_value(folder, key):
    """One array of the folder's explanation as a string; None if it cannot be read."""
    try:
        return str(read_arrays(folder / ARRAYS, [key])[key])
    except (InputError, KeyError):
        return None


def choose_folders(paths, save_path):
    """A folder in `save_path` for each image in `paths`, never one that belongs to another image.

    An image that was explained before keeps its folder. Otherwise the folder is named after the image: its stem, or its
    full name and position if several of the `paths` have that stem; with a number appended if that name is taken.
    """
    images = {folder.name: stored_value(folder, "image") for folder in stored_folders(save_path)}
    taken = {name for name, image in images.items() if image is not None}
    names = {images[name]: name for name in sorted(taken, reverse=True)}
    stems, folders = Counter(path.stem for path in paths), []
    for position, path in enumerate(paths):
        name = names.get(os.path.abspath(path))
        if name is None:
            preferred = folder_name(path.stem if stems[path.stem] == 1 else f"{path.name}_{position}")
            candidates = chain([preferred], (f"{preferred}_{number}" for number in count(2)))
            name = next(candidate for candidate in candidates if candidate not in taken
                        and not Path(save_path, candidate).is_file())
            taken.add(name)
        folders.append(Path(save_path, name))
    return folders


def read_explanation(folder):
    """The arrays of the folder's explanation.npz; InputError if it is damaged, incomplete, or of an earlier version."""
    arrays = read_arrays(folder / ARRAYS)
    shapes = dict(COMMON)
    methods = arrays["methods"].tolist() if "methods" in arrays and arrays["methods"].ndim == 1 else []
    if "boxes" in arrays:
        shapes["boxes"] = ("f", "K4")
    for method in methods:
        if "boxes" in arrays:
            shapes[f"{method}_regions"] = ("f", "TK")
        elif method != "attention":
            shapes[f"{method}_pixels"] = ("f", "TSS")
        shapes |= {f"{method}_words": ("f", "TT")} if METHODS[method].has_words else {}
    lengths = {"4": 4}
    for name, (kinds, shape) in shapes.items():
        if name not in arrays:
            raise InputError(f"{folder / ARRAYS} has no array '{name}': explain the image again")
        array = arrays[name]
        for letter, length in zip(shape, array.shape, strict=False):
            lengths.setdefault(letter, length)
        if not matches(array, kinds, [lengths.get(letter) for letter in shape]) or 0 in array.shape:
            raise InputError(f"{folder / ARRAYS} has an unsuitable array '{name}': explain the image again")
    if lengths["W"] != lengths["T"] + 1 or not set(methods) <= set(METHODS):
        raise InputError(f"{folder / ARRAYS} has other words than methods explain: explain the image again")
    return arrays


def is_explained(folder, identity):
    """Whether the folder has an explanation whose hash of all settings is `identity` and whose files are complete."""
    try:
        arrays = read_explanation(folder)
    except InputError:
        return False
    plots = [folder / name for method in arrays["methods"].tolist() for name in plot_names(method)]
    return str(arrays["identity"]) == identity and all(map(_is_complete_png, plots)) and has_entry(folder)


def plot_names(method):
    """Names of the plots of a method."""
    return [f"{method}.png"] + ([f"words_{method}.png"] if METHODS[method].has_words else [])


def _is_complete_png(path):
    """Whether the file ends with the last chunk of a PNG."""
    return path.is_file() and path.read_bytes()[-8:] == b"IEND\xaeB`\x82"


def write_explanation(folder, image, arrays):
    """Writes explanation.npz, the plots and entry.html of one image, which replace those of an earlier explanation.

    A new folder appears only once it is complete. image: uint8 (3, H, W). arrays: those of explanation.npz; with a true
    `shared_scale` all words of the caption are drawn on one colour scale. Raises InputError if writing fails.
    """
    temporary = temporary_path(folder)
    try:
        write_files(make_folder(temporary), folder.name, image, arrays)
        for path in (*temporary.iterdir(), temporary):
            sync_to_disk(path)
        if not folder.exists():
            os.replace(temporary, folder)
            return
        for name in [ARRAYS, *(name for method in METHODS for name in plot_names(method))]:
            (folder / name).unlink(missing_ok=True)     # other files in the folder are the user's
        for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".npz"):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): free some space or choose another "
                         "--save_path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder, name, image, arrays):
    """The files of an explanation in an existing folder; name: of the image, in the page. See `write_explanation`."""
    words, image = arrays["words"].tolist(), channels_last(image)
    contrast = f" rather than “{arrays['contrast']}”" if arrays["contrast"] else ""
    split = {part: arrays[f"lrp_{part}"] for part in SPLIT} if "lrp_rest" in arrays else None
    for method in arrays["methods"].tolist():
        title = f"{caption_text(words)}{contrast}   [{method}]"
        draw_heatmaps(folder / f"{method}.png", image, words[1:], maps_of(arrays, method), title, method,
                      arrays.get("boxes"), split, arrays.get("flags"), is_shared(arrays))
        if METHODS[method].has_words:
            draw_words(folder / f"words_{method}.png", words[:-1], words[1:], arrays[f"{method}_words"], title, method)
    write_entry(folder, page_entry(name, image, arrays), image)
    np.savez_compressed(folder / ARRAYS, **{key: compact(value) if key.endswith("_pixels") else value
                                            for key, value in arrays.items()})


def compact(maps):
    """Maps (T, h, w) rounded to at most 1/256 of each one's largest absolute value, which more than halves the file:
    float16 where it represents these numbers, else float32."""
    largest = np.abs(maps).max((1, 2), keepdims=True)
    step = np.exp2(np.ceil(np.log2(np.where(largest == 0, 1, largest))) - 8)
    rounded = (np.rint(maps / step) * step).astype(np.float32)
    with np.errstate(over="ignore"):
        half = rounded.astype(np.float16)
    return half if np.array_equal(half, rounded) else rounded


def channels_last(image):
    """uint8 tensor (3, H, W) -> array (H, W, 3)."""
    return image.permute(1, 2, 0).numpy()


def write_index(save_path, first):
    """Writes index.html with every explanation in `save_path`: those in the folders `first`, then the others by name.

    Explanations that cannot be shown are omitted and named in one printed sentence.
    """
    folders, omitted = [], []
    for folder in dict.fromkeys([*first, *stored_folders(save_path)]):
        if not has_entry(folder):
            omitted.append(f"{folder.name} (its {ENTRY} or {THUMBNAIL} is missing or damaged: explain its image again)")
        elif stored_value(folder, "words") is None:
            omitted.append(f"{folder.name} (its {ARRAYS} cannot be read)")
        else:
            folders.append(folder)
    path = Path(save_path, "index.html")
    if omitted:
        print(f"omitted from {path}: {', '.join(omitted)}")
    write_page(path, folders)
