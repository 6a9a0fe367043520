"""Runs scripts, train.py and finetune.py in float64, one after the other, also under torchrun:
python tests/distributed.py RUNS

RUNS: a JSON file with a list of [script's name, flags]. In float64, since Adam turns the rounding
errors of gradients that are exactly zero, such as those of the keys' bias, into steps as large as
any other.
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import finetune  # noqa: E402
import preparedataset  # noqa: E402
import train  # noqa: E402
from captioning import checkpoint  # noqa: E402
from captioning.data.dataset import CaptionDataset  # noqa: E402
from captioning.training import log  # noqa: E402


def in_double(function, convert):
    """The function, with its result converted."""
    return lambda *args, **options: convert(function(*args, **options))


if __name__ == "__main__":
    torch.set_num_threads(1)
    log.draw_training_curves = lambda *_: None      # takes longer than the small models' training
    CaptionDataset.__getitems__ = in_double(
        CaptionDataset.__getitems__, lambda batch: batch | {"images": batch["images"].double()})
    train.make_model = in_double(train.make_model, torch.nn.Module.double)
    checkpoint.load = in_double(checkpoint.load, lambda loaded: (loaded[0].double(), loaded[1]))
    for script, flags in json.loads(Path(sys.argv[1]).read_text()):
        module = {"preparedataset": preparedataset, "train": train, "finetune": finetune}[script]
        module.main(module.get_args_parser().parse_args(flags))
