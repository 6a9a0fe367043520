"""Hashes of everything that the scripts compute, to check that a change preserves behaviour:

    python tests/behaviour.py BEFORE > before.txt       # at the old commit; ten minutes on one core
    python tests/behaviour.py AFTER > after.txt         # at the new one, with the same hardware
    diff before.txt after.txt

Prints a line (hash, file, name) for every weight, optimizer state, array and table. Not a test.
"""
import csv
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
METHODS = "lrp lrp_specific gradient grad_cam guided_backprop guided_grad_cam attention"
EXPERIMENTS = "ablation correctness tpfp deletion_insertion pointing_game mask_mass sanity"


def commands(out):
    """The commands, in order: every script, both models, every fine-tuning mode and method."""
    demo = f"--dataset demo --data_folder {out}/data"
    images = f"--images {out}/data/demo/images/test_0000[0-2].png"
    yield (f"preparedataset.py --output_folder {out}/data --demo_size 600 60 60 --features cnn "
           "--encoder small")
    for model in ("gridtd", "aoa"):
        weight = f"--weight {out}/{model}/checkpoint_last.pth"
        yield (f"train.py {demo} --model_type {model} --encoder small --embed_dim 64 "
               "--hidden_dim 64 --attention_dim 32 --num_head 4 --dropout 0.1 --batch_size 10 "
               "--captions_per_epoch 2 --epochs 3 --region_epochs 1 --region_loss 1 "
               "--decoder_lr 1e-3 --encoder_lr 1e-3 --lr_schedule cosine --grad_clip 1 "
               f"--workers 1 --save_path {out}/{model}")
        for mode in ("erase_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "ce_tune"):
            yield (f"finetune.py {weight} --data_folder {out}/data --{mode} --epochs 1 --workers 1 "
                   f"--save_path {out}/{model}_{mode}")
        yield (f"evaluation.py {weight} {demo} --per_image --workers 0 --metrics bleu rouge_l "
               f"cider map chair --max_images 24 --explanations {EXPERIMENTS} "
               f"--methods {METHODS} random --save_path {out}/eval_{model}")
        for decoding in ("greedy", "diverse_beam_search"):
            yield (f"evaluation.py {weight} {demo} --decoding {decoding} --metrics bleu cider "
                   f"meteor --save_path {out}/eval_{model}_{decoding}")
        yield f"explain.py {weight} {images} --methods {METHODS} --save_path {out}/explain_{model}"
        yield (f"explain.py {weight} {images} --methods attention lrp --contrast cat "
               f"--caption 'a dog on the beach' --save_path {out}/contrast_{model}")


def digest(value):
    """A hash of a tensor, an array, bytes, or anything with a repr."""
    if isinstance(value, torch.Tensor):
        value = value.contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        value = value.tobytes() if value.dtype != object else repr(value.tolist())
    data = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def flatten(name, value):
    """(name, value) of everything in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in sorted(items, key=lambda item: str(item[0])):
            yield from flatten(f"{name}/{key}", part)
    else:
        yield name, value


def contents(path):
    """(name, value) of the contents of a file, without times."""
    if path.suffix == ".pth":
        content = torch.load(path, map_location="cpu", weights_only=True)
        for state in [content["training"]["state"]] if content.get("training") else []:
            state |= {"seconds": 0, "log": [[*row[:7], *row[8:]] for row in state["log"]]}
        yield from flatten("", content)
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            yield from arrays.items()
    elif path.suffix == ".hdf5":
        with h5py.File(path) as file:
            yield from ((f"@{name}", value) for name, value in file.attrs.items())
            names = []
            file.visit(names.append)
            datasets = [name for name in names if isinstance(file[name], h5py.Dataset)]
            yield from ((name, file[name][()]) for name in datasets)
    elif path.name == "log.csv":
        yield "", [row[:7] + row[8:] for row in csv.reader(path.read_text().splitlines())]
    else:
        yield "", path.read_bytes()


def main(out):
    for command in commands(out):
        print(command, file=sys.stderr)
        subprocess.run(["bash", "-c", f"{sys.executable} {command}"], cwd=ROOT, check=True,
                       stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
    suffixes = (".pth", ".npz", ".hdf5", ".json", ".csv")
    for path in sorted(path for path in Path(out).rglob("*") if path.is_file()):
        if path.name == "settings.json" or not (
                path.suffix in suffixes or path.parent.name == "images"):
            continue
        for name, value in contents(path):
            # neither flags and other attributes, which contain the folder's name, nor their hashes
            if not re.match("@|identity$|/training/(?!optimizer)", name):
                print(digest(value), path.relative_to(out), name)


if __name__ == "__main__":
    main(sys.argv[1])
