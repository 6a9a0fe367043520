"""Stores bottom-up features computed by other software, from tsv files or one file per image (docs/method.md,
section 8)."""
import base64
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.data.annotations import trailing_number
from captioning.data.arrays import read_arrays
from captioning.data.feature_store import FLOAT16_MAX, Store
from captioning.data.hdf5 import open_hdf5, read_whole, reading
from captioning.errors import InputError
from captioning.files import check_file, fingerprint, shortened, write_text

FEATURES, BOXES = ("image_features", "features", "feat", "x"), ("image_boxes", "boxes", "bbox")    # names in .npz files
NEW_COLUMNS = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
               "features")                                                      # tsv of py-bottom-up-attention
OLD_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")      # tsv of bottom-up-attention


def store(path, records, source, regions=36):
    """Stores the bottom-up features of the records' images in the HDF5 file `path`; resumes an interrupted run.

    The file contains `features` (N, regions, C) float16, `boxes` (N, regions, 4) float32 (x0, y0, x1, y1 in pixels) and
    `counts` (N,), the number of regions of each image; the rest is zero. Of more than `regions` regions, the
    highest-scoring ones are kept where the source has scores, otherwise the first.

    source: a tsv file of bottom-up-attention or py-bottom-up-attention, or a folder of such files, or a folder of
    .hdf5, .npz or .npy files (without boxes), each named after an image: <file name>.npz, <stem>.npz or <number>.npz.
    Raises InputError if the source is malformed; if it lacks images, these are listed in <path>.missing.txt.
    """
    index = _name_index([record.name for record in records])
    first = next(_regions(source, records, lambda name: index(name) is not None, regions), None)
    if first is None:
        raise InputError(f"{source} has no features of {records[0].name} or any other image of this split: check "
                         "--bottom_up")
    C = first[1].shape[-1] if first[1].ndim else 0
    _check(source, *first, C)
    attributes = {"encoder": "bottom_up", "names": fingerprint([record.name for record in records]),
                  "source": str(Path(source).resolve())}
    with Store(path, [1] * len(records), (regions, C), attributes, with_boxes=True) as store:
        missing = store.missing
        entries = _regions(source, [records[i] for i in sorted(missing)], lambda name: index(name) in missing, regions)
        for name, features, boxes in tqdm(entries if missing else (), desc=Path(path).name, unit="image"):
            _check(source, name, features, boxes, C)
            i = index(name)
            store.write(i, _padded(features, regions)[None], boxes=_padded(boxes, regions)[None],
                        counts=[min(len(features), regions)])
            missing.remove(i)
            if not missing:
                break
        _report_missing(Path(f"{path}.missing.txt"), source, records, missing)


def _check(source, name, features, boxes, C):
    if features.ndim != 2 or features.shape[1] != C or boxes.shape != (len(features), 4) or not features.size:
        raise InputError(f"{source} has features of shape {features.shape} and boxes of shape {boxes.shape} for "
                         f"{name!r}: (regions, {C}) and (regions, 4) are expected")
    if not ((np.abs(features) <= FLOAT16_MAX).all() and features.any()):
        raise InputError(f"{source} has features of {name!r} that are all zero, not finite or above {FLOAT16_MAX}: "
                         "compute them again")
    if not (np.isfinite(boxes).all() and (boxes[:, :2] <= boxes[:, 2:]).all()):
        raise InputError(f"{source} has boxes of {name!r} that are not finite numbers x0 ≤ x1, y0 ≤ y1: compute them "
                         "again")


def _report_missing(path, source, records, missing):
    """Lists the images without features in `path` and raises InputError; removes the list if there are none."""
    path.unlink(missing_ok=True)
    if missing:
        names = [records[i].name for i in sorted(missing)]
        write_text(path, "\n".join(names) + "\n")
        raise InputError(f"{source} has no features of {len(names)} of the {len(records)} images, among them "
                         f"{', '.join(names[:5])} (all are listed in {path}): add their features, or remove these "
                         "images from the annotations")


def _padded(values, regions):
    """The first `regions` rows of values (n, …), padded with zero rows."""
    padded = np.zeros((regions, *values.shape[1:]), np.float32)
    padded[:len(values)] = values[:regions]
    return padded


def _name_index(names):
    """Returns a function from the name that a features file uses for an image to its index in `names`, or None.

    A name matches by file name, by stem, or by the number at the end if one of the two stems is only a number: '42' and
    'COCO_val2014_000000000042' both match 000000000042.jpg. A name that matches several images is ignored.
    """
    def keys(name, numbers):
        number = trailing_number(name)
        return [name, Path(name).stem] + ([] if number is None else [(number, kind) for kind in numbers])

    def is_number(name):
        return Path(name).stem.isdigit()

    matches = defaultdict(set)
    for i, name in enumerate(names):
        for key in keys(name, ("any", "bare") if is_number(name) else ("any",)):
            matches[key].add(i)

    def find(name):
        candidates = (matches.get(key, ()) for key in keys(name, ("any",) if is_number(name) else ("bare",)))
        return next((min(indices) for indices in candidates if len(indices) == 1), None)
    return find


def _regions(source, records, is_wanted, regions):
    """Yields (name, features, boxes) of the source's images: of a tsv file those whose name satisfies `is_wanted`, of a
    folder of single files those in `records`."""
    source = Path(source)
    tables = sorted(path for path in source.iterdir() if ".tsv" in path.suffixes) if source.is_dir() else [source]
    for path in tables:
        yield from _from_tsv(path, is_wanted, regions)
    if not tables:
        yield from _from_folder(source, records)


def _from_folder(folder, records):
    """Yields (name, features, boxes) of the records for which the folder contains a file."""
    for record in records:
        number = trailing_number(record.name)
        stems = [record.name, Path(record.name).with_suffix(""), *([] if number is None else [number])]
        paths = (Path(folder, f"{stem}.{kind}") for kind in ("hdf5", "npz", "npy") for stem in stems)
        path = next(filter(os.path.exists, paths), None)
        if path is not None:
            features, boxes = (_from_hdf5 if path.suffix == ".hdf5" else _from_numpy)(path)
            yield record.name, features, boxes


def _from_hdf5(path):
    with open_hdf5(path) as file, reading(path):
        return [read_whole(file, name, "iuf", (None, None)).astype(np.float32)
                for name in ("image_features", "image_boxes")]


def _from_numpy(path):
    """Features and boxes of an .npz file, or features and zero boxes of an .npy file."""
    arrays = read_arrays(path)
    if path.suffix == ".npy" and arrays.keys() == {""} and arrays[""].ndim:
        arrays |= {FEATURES[0]: arrays[""], BOXES[0]: np.zeros((len(arrays[""]), 4))}
    found = [next((arrays[name] for name in names if name in arrays), None) for names in (FEATURES, BOXES)]
    if any(values is None or values.dtype.kind == "U" for values in found):
        raise InputError(f"{path} lacks features ({', '.join(FEATURES)}) or boxes ({', '.join(BOXES)}): create it "
                         "again with both")
    return [values.astype(np.float32) for values in found]


def _from_tsv(path, is_wanted, regions):
    """Yields (name, features, boxes) of the rows whose names are wanted; the other rows are not decoded."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            for line in file:
                values = line.rstrip(b"\r\n").split(b"\t")
                row = dict(zip(NEW_COLUMNS if len(values) == len(NEW_COLUMNS) else OLD_COLUMNS, values, strict=True))
                name = values[0].decode()
                if not is_wanted(name):
                    continue
                n = int(row["num_boxes"])
                boxes, features = (_decoded(row[key]).reshape(n, -1) for key in ("boxes", "features"))
                if "objects_conf" in row and len(features) > regions:
                    scores = _decoded(row["objects_conf"]).reshape(n)
                    best = np.sort(np.argsort(-scores, kind="stable")[:regions])
                    boxes, features = boxes[best], features[best]
                yield name, features, boxes
    except (OSError, ValueError) as error:
        raise InputError(f"the features {path} cannot be read ({shortened(error)}): give a tsv of "
                         "bottom-up-attention") from error


def _decoded(text):
    """The float32 numbers of a base64 text."""
    return np.frombuffer(base64.b64decode(text), np.float32)
