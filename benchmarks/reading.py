"""Speed of reading stored features in training: python benchmarks/reading.py

Prepares --images images with generated captions, writes random features of 14 × 14 × 512, 0.2 MB
each, and reads each third of them in random batches of 32: the bytes alone, and as training does,
without and with workers. Before each reading the file leaves the system's cache. On Linux."""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measure
from captioning.cli import positive_int
from captioning.data.arrays import open_hdf5
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.feature_store import Store
from captioning.data.loader import make_loader
from captioning.files import fingerprint, make_folder

SHAPE = 196, 512
BATCH = 32
FLAGS = {"--images": {"type": positive_int, "default": 20_000, "help": "images that are read"},
         "--folder": {"default": "output", "help": "folder on the disk that is measured"}}


def prepare(folder, count):
    """A data set of `count` training images with random features -> its CaptionDataset."""
    generator = random.Random(0)
    images = []
    for i in range(count + 2):
        words = [f"word{generator.randrange(10_000)}" for _ in range(10)]
        images.append({"filename": f"{i}.jpg", "sentences": [{"raw": " ".join(words)}] * 5,
                       "split": ("val", "test")[i - count] if i >= count else "train"})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    script = Path(__file__).parents[1] / "preparedataset.py"
    subprocess.run([sys.executable, script, "--dataset", "karpathy", "--karpathy_json",
                    folder / "captions.json", "--output_folder", folder], check=True)
    data = CaptionDataset(folder, "karpathy", "train")
    block = np.random.default_rng(0).random((BATCH, *SHAPE), np.float32).astype(np.float16)
    path = features_path(folder, "karpathy", "train", "vgg16")
    with Store(path, [1] * count, SHAPE, {"names": fingerprint(list(data.names))}) as store:
        for i in range(0, count, BATCH):
            store.write(i, block[:count - i])
    return CaptionDataset(folder, "karpathy", "train", features=path)


def read_bytes(path, batches):
    """Reads the bytes of the images of the batches, without doing anything with them."""
    with open_hdf5(path) as file:
        offset = file["features"].id.get_offset()
    size = 2 * int(np.prod(SHAPE))
    with open(path, "rb", buffering=0) as file:
        for batch in batches:
            for i in batch:
                os.pread(file.fileno(), size, offset + i * size)


def tables(args, size, device):
    with tempfile.TemporaryDirectory(dir=make_folder(args.folder)) as folder:
        data = prepare(Path(folder), 4 * BATCH if args.quick else args.images)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        rows = []
        # each way reads other images, as a disk may have a cache of its own
        for name, third in zip(("bytes alone", 0, 2), order.chunk(3), strict=True):
            batches = [batch.tolist() for batch in third.split(BATCH)]
            with open(data.features, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.monotonic()
            if name == "bytes alone":
                read_bytes(data.features, batches)
            else:
                for _ in make_loader(data, batches, name, torch.device("cpu")):
                    pass
                name = f"`--workers {name}`"
            rows.append([name, len(third) / (time.monotonic() - started)])
    rows = [[name, speed, rows[0][1] / speed] for name, speed in rows]
    title = f"Reading {len(data) // 3:,} images' features (`--workers`: as float32, with captions)"
    return [measure.Table(title, ["", "images/s", "ratio of times"], rows)]


if __name__ == "__main__":
    measure.run("reading", __doc__, tables, flags=FLAGS)
