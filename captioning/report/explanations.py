"""Folders of explanations: each image has one, with plots and explanation.npz; index.html shows them all."""
import os
import re
import shutil
import zipfile
import zlib
from collections import Counter
from itertools import chain, count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.data.images import read_image
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, WITHOUT_WORDS
from captioning.files import make_folder
from captioning.report.page import caption_text, page_entry, write_page
from captioning.report.plots import draw_heatmaps, draw_words

ARRAYS = "explanation.npz"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # errors of np.load


def stored_folders(save_path):
    """The folders in `save_path` that contain an explanation, sorted by name."""
    return sorted(path.parent for path in Path(save_path).glob(f"*/{ARRAYS}")
                  if not re.search(r"\.\d+\.tmp$", path.parent.name))      # left behind by a killed process


def stored_value(folder, key):
    """One array of the folder's explanation as a string; None if it cannot be read."""
    try:
        with np.load(folder / ARRAYS) as arrays:
            return str(arrays[key])
    except UNREADABLE:
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
            preferred = path.stem if stems[path.stem] == 1 else f"{path.name}_{position}"
            candidates = chain([preferred], (f"{preferred}_{number}" for number in count(2)))
            name = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(name)
        folders.append(Path(save_path, name))
    return folders


def write_explanation(folder, image, arrays):
    """Writes explanation.npz and the plots of one image, which replace those of an earlier explanation.

    A new folder appears only once it is complete. image: uint8 (3, H, W). Raises InputError if writing fails.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        _write_files(make_folder(temporary), image, arrays)
        if not folder.exists():
            os.replace(temporary, folder)
            return
        for name in [f"{prefix}{method}.png" for method in METHODS for prefix in ("", "words_")] + [ARRAYS]:
            (folder / name).unlink(missing_ok=True)     # other files in the folder are the user's
        for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".npz"):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): free some space or choose another "
                         "--save_path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder, image, arrays):
    words = arrays["words"].tolist()
    contrast = f" rather than “{arrays['contrast']}”" if arrays["contrast"] else ""
    for method in arrays["methods"].tolist():
        title = f"{caption_text(words)}{contrast}   [{method}]"
        maps = arrays[f"{method}_regions" if "boxes" in arrays else f"{method}_pixels"]
        draw_heatmaps(folder / f"{method}.png", channels_last(image), words[1:], maps, title, method,
                      boxes=arrays.get("boxes"))
        if method not in WITHOUT_WORDS:
            draw_words(folder / f"words_{method}.png", words[:-1], words[1:], arrays[f"{method}_words"], title, method)
    np.savez_compressed(folder / ARRAYS, **arrays)


def channels_last(image):
    """uint8 tensor (3, H, W) -> array (H, W, 3)."""
    return image.permute(1, 2, 0).numpy()


def write_index(save_path, first):
    """Writes index.html with every explanation in `save_path`: those in the folders `first`, then the others by name.

    Explanations that cannot be shown are omitted and named in one printed sentence.
    """
    path = Path(save_path, "index.html")
    folders = list(dict.fromkeys([*first, *stored_folders(save_path)]))
    entries, omitted = [], []
    for folder in tqdm(folders, desc=path.name, unit="image"):
        try:
            entries.append(_read_entry(folder))
        except InputError as error:
            omitted.append(f"{folder.name} ({error})")
    if omitted:
        print(f"omitted from {path}: {', '.join(omitted)}")
    write_page(path, entries)


def _read_entry(folder):
    """The page's entry of the explanation in `folder`. Raises InputError with the reason why it cannot be shown."""
    try:
        with np.load(folder / ARRAYS) as file:
            arrays = dict(file)
        image = read_image(str(arrays["image"]), upright=bool(arrays["upright"]))
        return page_entry(folder.name, channels_last(image), arrays)
    except KeyError as error:
        raise InputError(f"its {ARRAYS} has no array {error}") from error
    except UNREADABLE as error:
        raise InputError(f"its {ARRAYS} cannot be read") from error
    except InputError as error:
        raise InputError(f"its image {arrays['image']} is missing or cannot be read") from error
