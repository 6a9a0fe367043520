"""Features of regions, made elsewhere: a tsv, or a folder with a file for each picture (method.md, section 8)."""
import base64
import os
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.data.annotations import trailing_number
from captioning.data.feature_store import FLOAT16_MAX, Store
from captioning.data.hdf5 import open_hdf5, reading
from captioning.errors import InputError
from captioning.files import fingerprint, write_text

FEATURES, BOXES = ("image_features", "features", "feat", "x"), ("image_boxes", "boxes", "bbox")


def store(path, records, source, regions=36):
    """Features (N, regions, C) float16, boxes (N, regions, 4) float32, x0, y0, x1, y1 in pixels, and how many regions
    each picture has, to `path`; goes on where it stopped.

    source: a tsv of bottom-up-attention or py-bottom-up-attention, a folder of such, or of <file name>.hdf5, .npz or
    .npy (named in full, without ending or by number), .npy without boxes. More regions than wanted: the surest, or the
    first, stay. Pictures without features are listed in <path>.missing.txt.
    """
    index = _finder([record.name for record in records])
    first = next(_regions(source, records, lambda name: index(name) is not None, regions), None)
    if first is None:
        raise InputError(f"{source} has no features of {records[0].name} or any other of these pictures: is it the "
                         "right file or folder?")
    C = first[1].shape[-1] if first[1].ndim else 0
    attributes = {"encoder": "bottom_up", "names": fingerprint([record.name for record in records]),
                  "source": str(Path(source).resolve())}
    with Store(path, [1] * len(records), (regions, C), attributes, with_boxes=True) as store:
        missing = store.missing
        found = _regions(source, [records[i] for i in sorted(missing)], lambda name: index(name) in missing, regions)
        for name, features, boxes in tqdm(found if missing else (), desc=Path(path).name, unit="image"):
            i = index(name)
            if features.ndim != 2 or features.shape[1] != C or boxes.shape != (len(features), 4) or not len(features):
                raise InputError(f"{source} has features {features.shape} and boxes {boxes.shape} for {name!r}: "
                                 f"(regions, {C}) and (regions, 4) are expected")
            if not ((np.abs(features) <= FLOAT16_MAX).all() and np.isfinite(boxes).all() and features.any()):
                raise InputError(f"{source} has features of {name!r} that are all zero or no finite numbers: make them "
                                 "anew")
            store.write(i, *(_padded(values, regions)[None] for values in (features, boxes)),
                        [min(len(features), regions)])
            missing.remove(i)
            if not missing:
                break
        listed = Path(f"{path}.missing.txt")
        listed.unlink(missing_ok=True)
        if missing:
            names = [records[i].name for i in sorted(missing)]
            write_text(listed, "\n".join(names) + "\n")
            raise InputError(f"{source} has no features of {len(names)} of the {len(records)} pictures, of "
                             f"{', '.join(names[:5])} for a start, all of them listed in {listed}: make them, or "
                             "leave the pictures out of the captions")


def _padded(values, regions):
    """The first rows of values (n, …), zero rows below."""
    padded = np.zeros((regions, *values.shape[1:]), np.float32)
    padded[:len(values)] = values[:regions]
    return padded


def _finder(names):
    """A function from what a features file calls a picture to its place in `names`, or None.

    It may be called by file name or stem; or by the number at the end, if one of the two names is but a number:
    '42' and 'COCO_val2014_000000000042' both mean 000000000042.jpg. A name that fits two pictures means none.
    """
    def keys(name, numbers):
        number = trailing_number(name)
        return [name, Path(name).stem] + ([] if number is None else [(number, kind) for kind in numbers])

    def bare(name):
        return Path(name).stem.isdigit()

    places = defaultdict(set)
    for i, name in enumerate(names):
        for key in keys(name, ("any", "bare") if bare(name) else ("any",)):
            places[key].add(i)

    def find(name):
        found = (places.get(key, ()) for key in keys(name, ("any",) if bare(name) else ("bare",)))
        return next((min(some) for some in found if len(some) == 1), None)
    return find


def _regions(source, records, is_wanted, regions):
    """(name, features, boxes) of what the source calls pictures of those records."""
    source = Path(source)
    tables = sorted(path for path in source.iterdir() if ".tsv" in path.suffixes) if source.is_dir() else [source]
    for path in tables:
        yield from _tsv(path, is_wanted, regions)
    if not tables:
        yield from _folder(source, records)


def _folder(folder, records):
    """(name, features, boxes) of those records that the folder has a file of."""
    for record in records:
        number = trailing_number(record.name)
        stems = [record.name, Path(record.name).with_suffix(""), *([] if number is None else [number])]
        paths = (Path(folder, f"{stem}.{kind}") for kind in ("hdf5", "npz", "npy") for stem in stems)
        path = next(filter(os.path.exists, paths), None)
        if path is not None:
            features, boxes = (_from_hdf5 if path.suffix == ".hdf5" else _from_numpy)(path)
            yield record.name, features, boxes


def _from_hdf5(path):
    with open_hdf5(path, ("image_features", "image_boxes")) as file, reading(path):
        return [file[name][:].astype(np.float32) for name in ("image_features", "image_boxes")]


def _from_numpy(path):
    """Features and boxes of an .npz; an .npy has features alone, whose boxes are zero."""
    try:
        content = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return content.astype(np.float32), np.zeros((len(content), 4), np.float32)
        with content:
            names = [next(name for name in known if name in content) for known in (FEATURES, BOXES)]
            return [content[name].astype(np.float32) for name in names]
    except StopIteration as error:
        raise InputError(f"{path} lacks its features ({', '.join(FEATURES)}) or boxes ({', '.join(BOXES)}): make it "
                         "anew") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}): make it anew") from error


def _tsv(path, is_wanted, regions):
    """Rows of py-bottom-up-attention's or bottom-up-attention's tsv whose names are wanted; others are not decoded."""
    new = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
           "features")
    old = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
    try:
        with open(path, "rb") as file:
            for line in file:
                values = line.rstrip(b"\r\n").split(b"\t")
                row = dict(zip(new if len(values) == len(new) else old, values, strict=True))
                name = values[0].decode()
                if not is_wanted(name):
                    continue
                n = int(row["num_boxes"])
                boxes, features = (_decoded(row[key]).reshape(n, -1) for key in ("boxes", "features"))
                if "objects_conf" in row and len(features) > regions:
                    surest = np.sort(np.argsort(-_decoded(row["objects_conf"]), kind="stable")[:regions])
                    boxes, features = boxes[surest], features[surest]
                yield name, features, boxes
    except (OSError, ValueError) as error:
        raise InputError(f"the features {path} cannot be read ({error}): give a tsv of bottom-up-attention") from error


def _decoded(text):
    """float32 numbers of base64 text."""
    return np.frombuffer(base64.b64decode(text), np.float32)
