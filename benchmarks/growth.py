"""How time grows with T, K, V, d and the batch size: python benchmarks/growth.py

One caption per image, stored features, random weights; each size is doubled alone, to T = 40,
K = 392, V = 20,000, d = e = 1024, B = 16. A ratio of 2 is proportional, one of 1 constant.
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measure
from captioning.device import pick_device
from captioning.errors import run_script

BASE = {"T": 10, "K": 196, "V": 9586, "d": 512, "B": 4}
LARGEST = {"T": 40, "K": 392, "V": 20000, "d": 1024, "B": 16}


def get_args_parser():
    return measure.get_parser(__doc__, repeats=2)


def functions(name, T, K, V, d, B, device):
    """{task: function without arguments} of a new model."""
    size = measure.Sizes(V=V, d=d, K=K)
    model = measure.build(name, size, device)
    features = torch.rand(B, K, size.C, device=device)
    captions = measure.random_captions((B,), measure.vocabulary(V), T).to(device)

    def train():
        logits = model(features, captions).flatten(0, 1)
        loss = F.cross_entropy(logits, captions[:, 1:].flatten())
        return torch.autograd.grad(loss, list(model.parameters()))
    return {"training step": train, "LRP": partial(model.lrp, features, captions)}


def main(args):
    device = pick_device(args.device)
    base = {"T": 4, "K": 16, "V": 200, "d": 32, "B": 2} if args.quick else BASE
    rows = []
    for size, value in (base if args.quick else LARGEST).items():
        for name in measure.MODELS:
            full = functions(name, **base | {size: value}, device=device)
            half = functions(name, **base | {size: value // 2}, device=device)
            for task in full:
                alternatives = {f"{name}, {task}, {size} = {value}": full[task],
                                f"{size} = {value // 2}": half[task]}
                rows += measure.compare(alternatives, args.repeats, device)
    measure.write("growth", args, device, [measure.Table("Growth", measure.COMPARISON, rows)])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
