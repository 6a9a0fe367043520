"""Runs scripts in a group of processes as torchrun makes it, but forked from the tests, as each new
Python would import PyTorch for seconds."""
import os
import socket
import sys
from functools import partial

import torch
from fuzz import workspace

import train
from captioning import checkpoint
from captioning.data.dataset import CaptionDataset
from captioning.training import log


def run_all(commands, folder, count=1, in_double=False):
    """`run_each` -> what the processes print; AssertionError if one fails."""
    results = run_each(commands, folder, count, in_double)
    for status, errors, _ in results:
        assert status == 0, f"{status}: {errors[-3000:]}"
    return "".join(output for _, _, output in results)


def run_each(commands, folder, count=1, in_double=False):
    """Runs [(script's name, flags)] one after the other in a group of `count` processes -> the
    exit status, errors and output of each. in_double: train and tune in float64."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def before(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = open("output.txt", "w")        # noqa: SIM115
        log.draw_training_curves = lambda *_: None      # slower than the small models' training
        if in_double:
            compute_in_double()

    def run():
        for script, flags in commands:
            workspace.call([script, *map(str, flags)])
        sys.stdout.flush()

    folders = [folder / f"process_{count}_{rank}" for rank in range(count)]
    for own in folders:
        own.mkdir(parents=True, exist_ok=True)
    children = [workspace.start(run, own, partial(before, rank))
                for rank, own in enumerate(folders)]
    return [(*workspace.finish(child, own, time_limit=600), (own / "output.txt").read_text())
            for child, own in zip(children, folders, strict=True)]


def compute_in_double():
    """Adam turns the rounding errors of gradients that are exactly zero, such as those of the keys'
    bias, into steps as large as any other; with float64 they are small."""
    def converted(function, convert):
        return lambda *args, **options: convert(function(*args, **options))
    CaptionDataset.__getitems__ = converted(
        CaptionDataset.__getitems__, lambda batch: batch | {"images": batch["images"].double()})
    train.make_model = converted(train.make_model, torch.nn.Module.double)
    checkpoint.load = converted(checkpoint.load, lambda loaded: (loaded[0].double(), loaded[1]))
