"""Stores bottom-up features computed by other software, from tsv files (docs/method.md, section
8)."""
import base64
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.data.feature_store import FLOAT16_MAX, Store
from captioning.data.predictions import ImageNames
from captioning.errors import InputError
from captioning.files import expect, fingerprint, reading, write_text

# columns of py-bottom-up-attention, and of bottom-up-attention
NEW_COLUMNS = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf",
               "num_boxes", "boxes", "features")
OLD_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


def store(path, records, source, regions=36):
    """Stores the bottom-up features of the records' images in the HDF5 file `path`, with `boxes`
    (N, regions, 4) float32 (x0, y0, x1, y1 in pixels) and `counts` (N,) of regions. Of more than
    `regions` regions, the highest-scoring ones are kept, or the first if there are no scores.

    source: a tsv file of bottom-up-attention or py-bottom-up-attention, or a folder of such files.
    If it lacks images, these are listed in <path>.missing.txt."""
    tables = [Path(source)]
    if tables[0].is_dir():
        tables = sorted(path for path in tables[0].iterdir() if ".tsv" in path.suffixes)
    names = [record.name for record in records]
    images = ImageNames(names)
    indices = {name: i for i, name in enumerate(names)}
    first = next(_rows(tables, images.find, regions), None)
    if first is None:
        raise InputError(f"{source} has no features of {names[0]} or any other image of this "
                         "split: give --bottom_up a tsv of bottom-up-attention, or a folder of "
                         "such files")

    C = first[1].shape[1]
    # of computed again files the time differs
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in tables]
    attributes = {"encoder": "bottom_up", "names": fingerprint(names),
                  "source": f"{Path(source).resolve()} {fingerprint(states)}"}
    with Store(path, [1] * len(records), (regions, C), attributes, with_boxes=True) as output:
        rows = _rows(tables, lambda name: indices.get(images.find(name)) in output.missing, regions)
        for name, features, boxes in tqdm(rows if output.missing else (), desc=Path(path).name,
                                          unit="image"):
            if features.shape[1] != C:
                raise InputError(f"{source} has features of {features.shape[1]} channels for "
                                 f"{name!r}, and of {C} for others: give those of one detector")
            n = len(features)
            padding = ((0, regions - n), (0, 0))
            output.write(indices[images.find(name)], np.pad(features, padding)[None],
                        boxes=np.pad(boxes, padding)[None], counts=[n])
            if not output.missing:
                break

        # the images that the source lacks
        report = Path(f"{path}.missing.txt")
        report.unlink(missing_ok=True)
        missing = [names[i] for i in sorted(output.missing)]
        if missing:
            write_text(report, "\n".join(missing) + "\n")
            raise InputError(f"{source} has no features of {len(missing)} of the {len(names)} "
                             f"images, among them {', '.join(missing[:5])} (all are listed in "
                             f"{report}): add their features, or remove these images from the "
                             "annotations")


def _rows(tables, is_wanted, regions):
    """Yields (name, features (n, C), boxes (n, 4)), n ≤ regions, of the rows of tsv files whose
    names are wanted; the other rows are not decoded."""
    for path in tables:
        with reading(path, "give a tsv of bottom-up-attention"), open(path, "rb") as file:
            for line in file:
                values = line.rstrip(b"\r\n").split(b"\t")
                columns = NEW_COLUMNS if len(values) == len(NEW_COLUMNS) else OLD_COLUMNS
                row = dict(zip(columns, values, strict=True))
                name = values[0].decode()
                if is_wanted(name):
                    yield name, *_decoded(name, row, regions)


def _decoded(name, row, regions):
    """Features (n, C) and boxes (n, 4) of the n ≤ `regions` best regions in a row."""
    count = int(row["num_boxes"])
    features = _numbers(row["features"]).reshape(count, -1)
    boxes = _numbers(row["boxes"]).reshape(count, 4)
    if "objects_conf" in row:
        order = np.argsort(-_numbers(row["objects_conf"]).reshape(count), kind="stable")
        best = np.sort(order[:regions])
    else:
        best = slice(0, regions)
    features = features[best]
    boxes = boxes[best]
    expect((np.abs(features) <= FLOAT16_MAX).all() and features.any(),
           f"the features of {name!r} are all zero, not finite or above {FLOAT16_MAX}")
    expect(np.isfinite(boxes).all() and (boxes[:, :2] <= boxes[:, 2:]).all(),
           f"the boxes of {name!r} are not finite numbers x0 ≤ x1, y0 ≤ y1")
    return features, boxes


def _numbers(text):
    return np.frombuffer(base64.b64decode(text), np.float32)
