"""Preparation of captions, and reading of features, at the size of COCO 2017: python benchmarks/coco_size.py

Generates annotations of 118,287 + 5,000 images with 5 captions each, and prepares them; then writes random features of
14 × 14 × 512 for --images images of it, of 0.2 MB each, and reads each third of them in random batches of 32: their
bytes alone, and as training does without and with workers. Before each reading the file is removed from the operating
system's cache. On Linux.
"""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import Table, get_parser, write
from captioning.cli import positive_int
from captioning.data.dataset import CaptionDataset, features_path, split_path
from captioning.data.feature_store import Store
from captioning.data.hdf5 import open_hdf5
from captioning.data.loader import make_loader
from captioning.errors import InputError, run_script
from captioning.files import fingerprint, make_folder
from captioning.memory import readable

ROOT = Path(__file__).parents[1]
IMAGES = {"train": 118_287, "val": 5_000}
CAPTIONS = {"train": 591_753, "val": 25_014}
WORDS = 30_000              # distinct words of COCO's captions, about
SHAPE, BATCH = (196, 512), 32
KEEP_FREE = 15e9            # bytes of disk


def get_args_parser():
    parser = get_parser(__doc__)
    add = parser.add_argument
    add("--images", type=positive_int, default=20_000, help="images whose features are written and read (0.2 MB each)")
    add("--folder", default="output/coco_size", help="folder for the data, which is removed afterwards")
    return parser


def write_annotations(folder, scale):
    """Files in COCO's format with random captions of 8 to 13 words, whose frequencies follow Zipf's law."""
    generator, weights = random.Random(0), np.cumsum(1 / np.arange(1, WORDS + 1)).tolist()
    words = [f"word{i}" for i in range(WORDS)]
    for part, count in IMAGES.items():
        images = [{"id": i, "file_name": f"{part}_{i:012}.jpg"} for i in range(count // scale)]
        captions = [{"image_id": i % len(images), "caption": " ".join(generator.choices(
            words, cum_weights=weights, k=generator.randint(8, 13)))} for i in range(CAPTIONS[part] // scale)]
        (folder / f"captions_{part}2017.json").write_text(json.dumps({"images": images, "annotations": captions}))


def prepare(folder):
    """Runs preparedataset.py -> (seconds, peak memory in MiB)."""
    command = [sys.executable, "preparedataset.py", "--dataset", "coco2017", "--annotation_folder", folder,
               "--output_folder", folder, "--features", "none"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError("preparedataset.py failed: see its message above")
    return time.monotonic() - started, usage.ru_maxrss / 2 ** 10


def shortened_split(folder, count):
    """Copies the training split's captions for its first `count` images as data set "part"; returns the names."""
    target = split_path(folder, "part", "train")
    make_folder(target.parent)
    shutil.copy(folder / "coco2017" / "wordmap_coco2017.json", target.parent / "wordmap_part.json")
    with open_hdf5(split_path(folder, "coco2017", "train")) as source, h5py.File(target, "w") as file:
        for name in ("captions", "names", "paths", "references"):
            file.create_dataset(name, data=source[name][:count], dtype=source[name].dtype)
        file.attrs.update(source.attrs)
        return file["names"].asstr()[:].tolist()


def write_features(folder, names):
    """Random features as preparedataset.py writes them -> (path, seconds)."""
    path = features_path(folder, "part", "train", "vgg16")
    block = np.maximum(np.random.default_rng(0).standard_normal((BATCH, *SHAPE), np.float32), 0).astype(np.float16)
    started = time.monotonic()
    with Store(path, [1] * len(names), SHAPE, {"names": fingerprint(names)}) as store:
        for i in range(0, len(names), BATCH):
            block[:, 0, 0] = i % 2000
            store.write(i, block[:len(names) - i])
    return path, time.monotonic() - started


def forget(path):
    """Removes a file from the operating system's cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(pids):
    """Memory of the processes in MiB; what they share counts once."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.search(r"^Pss:\s*(\d+) kB", text, re.MULTILINE)[1]) for text in texts) / 2 ** 10


def read_epoch(data, batches, workers):
    """Seconds of one epoch, and memory at its beginning, in its middle and at its end."""
    forget(data.features)
    started, memory = time.monotonic(), []
    for number, _ in enumerate(make_loader(data, batches, workers, torch.device("cpu")), start=1):
        if number in (max(1, len(batches) // 10), len(batches) // 2, len(batches)):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            memory.append(resident([os.getpid(), *children]))
    return time.monotonic() - started, memory


def read_raw(path, batches):
    """Seconds to read the bytes of the same images in the same order, without doing anything with them."""
    with open_hdf5(path) as file:
        offset = file["features"].id.get_offset()
    size = 2 * int(np.prod(SHAPE))
    forget(path)
    started = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        for batch in batches:
            for i in batch:
                os.pread(file.fileno(), size, offset + i * size)
    return time.monotonic() - started


def main(args):
    scale, count = (1000, 4 * BATCH) if args.quick else (1, args.images)
    folder = make_folder(args.folder)
    need = count * 2 * int(np.prod(SHAPE))
    if shutil.disk_usage(folder).free < need + KEEP_FREE:
        raise InputError(f"--images {count} needs {readable(need)}, and {readable(KEEP_FREE)} must remain free on the "
                         "disk: lower it")
    try:
        write_annotations(folder, scale)
        seconds, peak = prepare(folder)
        preparation = Table("Preparation of captions: `preparedataset.py --dataset coco2017 --features none`",
                            ["images", "captions", "seconds", "peak memory in MiB"],
                            [[sum(IMAGES.values()) // scale, sum(CAPTIONS.values()) // scale, seconds, peak]])
        names = shortened_split(folder, count)
        path, written = write_features(folder, names)
        data = CaptionDataset(folder, "part", "train", features=path)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        # each way reads other images, as a disk may have a cache of its own
        raw, *parts = ([batch.tolist() for batch in part.split(BATCH)] for part in order.chunk(3))
        rows = [["raw read", sum(map(len, raw)) / read_raw(path, raw), "", "", ""]]
        for workers, part in zip((0, 2), parts, strict=True):
            seconds, memory = read_epoch(data, part, workers)
            rows.append([f"`--workers {workers}`", sum(map(len, part)) / seconds, *memory])
        reading = Table(
            f"Reading {len(data) // 3:,} images' features in random order: float32 batches of {BATCH} with captions",
            ["", "images/s", "MiB at the beginning", "in the middle", "at the end"], rows,
            f"Each row reads other images; all {len(data):,} were written with {len(data) / written:,.0f} images/s. "
            "An image's features are consecutive bytes of the file, so that one read fetches them; each worker opens "
            "the file itself. Reading includes the conversion from float16 to float32, the raw read does not.")
        write("coco_size", args, torch.device("cpu"), [preparation, reading])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
