"""Hashes of everything that the scripts compute on small data, to check that a change preserves behaviour bit for bit:

    python tests/behaviour.py BEFORE > before.txt       # at the old commit; about ten minutes on one core
    python tests/behaviour.py AFTER > after.txt         # at the new one, with the same hardware
    diff before.txt after.txt

Prints a line (hash, file, name) for every weight, optimizer state, array and table. Not part of the test suite.
"""
import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
SIZES = "--embed_dim 64 --hidden_dim 64 --attention_dim 32 --num_head 4"
METHODS = "lrp lrp_specific gradient grad_cam guided_backprop guided_grad_cam attention"
EXPERIMENTS = "ablation correctness tpfp deletion_insertion pointing_game mask_mass sanity"


def commands(out):
    """The command lines, in order: every script, both models, every fine-tuning mode and every explanation method."""
    demo, images = f"--dataset demo --data_folder {out}/data", f"{out}/data/demo/images"
    yield (f"preparedataset.py --dataset demo --output_folder {out}/data --demo_size 600 60 60 --features cnn "
           "--encoder small")
    for model in ("gridtd", "aoa"):
        weight = f"--weight {out}/{model}/checkpoint_last.pth"
        yield (f"train.py {demo} --model_type {model} --encoder small {SIZES} --dropout 0.1 --batch_size 10 "
               "--captions_per_step 2 --epochs 3 --region_epochs 1 --region_loss 1 --decoder_lr 1e-3 --encoder_lr "
               f"1e-3 --lr_schedule cosine --grad_clip 1 --workers 1 --save_path {out}/{model}")
        for mode in ("erase_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "ce_tune"):
            yield (f"finetune.py {weight} --data_folder {out}/data --{mode} --epochs 1 --workers 1 "
                   f"--save_path {out}/{model}_{mode}")
        yield (f"evaluation.py {weight} {demo} --per_image --workers 0 --metrics bleu rouge_l cider map chair "
               f"--max_images 24 --explanations {EXPERIMENTS} --methods {METHODS} random "
               f"--save_path {out}/eval_{model}")
        for decoding in ("greedy", "diverse_beam_search"):
            yield (f"evaluation.py {weight} {demo} --decoding {decoding} --metrics bleu cider meteor "
                   f"--save_path {out}/eval_{model}_{decoding}")
        yield (f"explain.py {weight} --images {images}/test_0000[0-2].png --methods {METHODS} "
               f"--save_path {out}/explain_{model}")
        yield (f"explain.py {weight} --images {images}/test_0000[0-1].png --methods attention lrp --contrast cat "
               f"--caption 'a dog on the beach' --save_path {out}/contrast_{model}")


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def flatten(name, value):
    """(name, hash) of every tensor and number in nested dicts."""
    if isinstance(value, torch.Tensor):
        yield name, digest(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from flatten(f"{name}/{key}", value[key])
    else:
        yield name, digest(repr(value).encode())


def hashes(path):
    """(name, hash) of the contents of a file, without times."""
    if path.suffix == ".pth":
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = {name: content[name] for name in ("state_dict", "config", "wordmap")}
        yield from flatten("", parts | {"optimizer": content["training"]["optimizer"]})
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            yield from ((name, digest(arrays[name].tobytes())) for name in arrays.files if name != "identity")
    elif path.suffix == ".hdf5":
        with h5py.File(path) as file:
            names = []
            file.visit(names.append)
            yield from ((name, digest(repr(file[name][()].tolist()).encode())) for name in names
                        if isinstance(file[name], h5py.Dataset))
    elif path.name == "log.csv":
        yield "", digest(repr([row[:7] + row[8:] for row in csv.reader(path.read_text().splitlines())]).encode())
    elif path.suffix in (".json", ".csv") and path.name != "settings.json" or path.parent.name == "images":
        yield "", digest(path.read_bytes())


def main(out):
    for command in commands(out):
        print(command, file=sys.stderr)
        subprocess.run(["bash", "-c", f"{sys.executable} {command}"], cwd=ROOT, check=True, stdout=sys.stderr,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    for path in sorted(Path(out).rglob("*")):
        for name, value in hashes(path) if path.is_file() else ():
            print(value, path.relative_to(out), name)


if __name__ == "__main__":
    main(sys.argv[1])
