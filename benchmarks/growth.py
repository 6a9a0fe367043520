"""Time and memory as functions of T, K, V, d and the batch size: python benchmarks/growth.py

One caption per image, stored features, random weights; each size is varied alone, from T = 10, K = 196, V = 9586,
d = e = 512, B = 4. Writes docs/figures/growth.png; every point is measured in a process of its own. On Linux, since it
needs the peak memory of a process.
"""
import math
import multiprocessing
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.explain import resident
from benchmarks.measure import MODELS, Sizes, Table, build, get_parser, in_turn, random_captions, vocabulary, write
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.files import atomic_path

BASE = {"T": 10, "K": 196, "V": 9586, "d": 512, "B": 4}
VALUES = {"T": (5, 10, 20, 40), "K": (49, 98, 196, 392), "V": (2500, 5000, 10000, 20000), "d": (128, 256, 512, 1024),
          "B": (1, 2, 4, 8, 16)}
TASKS = ("training step", "LRP")
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "growth.png"


def get_args_parser():
    parser = get_parser(__doc__, repeats=1)
    parser.add_argument("--figure", default=str(FIGURE), help="image file of the figure")
    parser.add_argument("--vary", nargs="+", choices=list(VALUES), default=list(VALUES), help="sizes to vary")
    return parser


def function_of(task, name, T, K, V, d, B):
    """The task as a function without arguments."""
    model, words = build(name, Sizes(V=V, d=d, K=K), torch.device("cpu")), vocabulary(V)
    features, captions = torch.rand(B, K, Sizes().C), random_captions((B,), words, T)

    def train():
        loss = torch.nn.functional.cross_entropy(model(features, captions).flatten(0, 1), captions[:, 1:].flatten())
        return torch.autograd.grad(loss, list(model.parameters()))
    return train if task == "training step" else partial(model.lrp, features, captions)


def point(task, name, values, repeats):
    """Median seconds, and MiB beyond the model and its inputs."""
    torch.set_num_threads(1)        # several threads are not safe in a forked process
    function = function_of(task, name, **values)
    Path("/proc/self/clear_refs").write_text("5")       # sets the peak memory to the present one
    before = resident()
    seconds = in_turn({"": function}, repeats, torch.device("cpu"))[""]
    return statistics.median(seconds), resident() - before


def draw(path, points):
    """One panel per size, time above memory; points {(size, task, model): [(value, seconds, MiB)]}."""
    figure = Figure(figsize=(2.6 * len(VALUES) + 1.5, 5), layout="constrained")
    axes = figure.subplots(2, len(VALUES), sharey="row")
    for (size, task, name), rows in points.items():
        column = list(VALUES).index(size)
        for axis, measured in zip(axes[:, column], list(zip(*rows, strict=True))[1:], strict=True):
            axis.loglog([row[0] for row in rows], measured, marker="o", markersize=4, label=f"{name}, {task}",
                        color=f"C{list(MODELS).index(name)}", linestyle="-" if task == "LRP" else "--")
            axis.set_xticks([row[0] for row in rows], [f"{row[0]}" for row in rows])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(size)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MiB")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def exponent(rows, column):
    """The slope of the last two points, on logarithmic axes."""
    (x0, y0), (x1, y1) = ((row[0], row[column]) for row in rows[-2:])
    return math.log(y1 / y0) / math.log(x1 / x0)


def main(args):
    device = pick_device("cpu")
    values = {"T": (2, 4), "K": (8, 16), "V": (100, 200), "d": (16, 32), "B": (1, 2)} if args.quick else VALUES
    base = {size: numbers[-1] for size, numbers in values.items()} if args.quick else BASE
    points, rows = {}, []
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for size in args.vary:
            numbers = values[size]
            for name in MODELS:
                for task in TASKS:
                    measured = [(value, *pool.apply(point, (task, name, base | {size: value}, args.repeats)))
                                for value in numbers]
                    points[size, task, name] = measured
                    rows.append([size, name, task, exponent(measured, 1), exponent(measured, 2)])
    draw(args.figure, points)
    write("growth", args, device, [Table(
        "Growth: exponents of the last doubling", ["size", "model", "task", "time", "memory"], rows,
        "1 is proportional, 0 is constant. ![Time and memory by caption length T, regions K, vocabulary V, width d and "
        "batch size B](figures/growth.png)")])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
