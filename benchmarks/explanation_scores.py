"""Speed of the explanation experiments, batched against one image and one word at a time.

    python benchmarks/explanation_scores.py --weight output/demo/checkpoint_best.pth

Both use the same functions, methods, images and captions, without the sanity checks. Also prints how many of their
values differ.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluation
from captioning import checkpoint
from captioning.cli import Parser, add_device, positive_int
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.experiments.batch import RANDOM, Batch
from captioning.experiments.registry import EXPERIMENTS
from captioning.experiments.runner import measure
from captioning.explanation.methods import METHODS
from captioning.metrics.object_words import frequent_words, load_objects

NAMES = [name for name in EXPERIMENTS if name != "sanity"]


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weight", required=True, help="checkpoint of a captioning model")
    add("--dataset", default="demo", help="name of a data set with boxes and masks")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--images", type=positive_int, default=16, help="number of images")
    add("--batch_size", type=positive_int, default=16, help="images per batch")
    add_device(parser)
    return parser


def run(make_batch, groups):
    """({(image, step, word, method, measure): value}, seconds) of one batch for each of `groups`, arguments of
    make_batch."""
    started = time.perf_counter()
    rows = [row for group in groups for batch in [make_batch(*group)] for name in NAMES
            for row in measure(EXPERIMENTS[name], batch)]
    return {row[:5]: float(row[5]) for row in rows}, time.perf_counter() - started


def main(args):
    device = pick_device(args.device)
    model, vocabulary = checkpoint.load(args.weight, device)
    split = args.data_folder, args.dataset, "test"
    data = evaluation.open_images(*split, model)
    boxes = evaluation.open_boxes(args.data_folder, args.dataset, required_by="this benchmark")
    objects = load_objects(args.data_folder, args.dataset, boxes)
    study = evaluation.make_study(model, vocabulary, (*METHODS, RANDOM), objects, boxes,
                                  frequent_words(args.dataset, objects),
                                  evaluation.open_masks(*split, len(data)), {"method": "beam_search"}, seed=1)
    images = data.__getitems__(list(range(min(args.images, len(data)))))["images"].to(device)
    with torch.no_grad():
        words = [vocabulary.decode(ids) for ids in study.decode(model.encode(images)).tolist()]

    def make_batch(indices, step=None):
        T = max(len(words[i]) for i in indices) + 1
        only = None if step is None else (torch.arange(T, device=device) == step)[None]
        return Batch(study, indices, [data.names[i] for i in indices], images[indices], [words[i] for i in indices],
                     [data.references[i] for i in indices], only)

    n = len(images)
    run(make_batch, [([0],)])       # warm up
    batched_values, batched_seconds = run(make_batch, [(list(range(i, min(i + args.batch_size, n))),)
                                                       for i in range(0, n, args.batch_size)])
    single_values, single_seconds = run(make_batch, [([i], step) for i in range(n) for step in range(len(words[i]))])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{type(model).__name__}, {n} images, {len(NAMES)} experiments, {len(METHODS) + 1} methods, "
          f"{len(batched_values)} values; {hardware}")
    print(f"    {args.batch_size} images per batch: {60 * n / batched_seconds:.0f} images per minute")
    print(f"    one image and one word at a time: {60 * n / single_seconds:.0f} images per minute, "
          f"{single_seconds / batched_seconds:.1f} times as long")
    differences = [abs(value - single_values[key]) for key, value in batched_values.items() if key in single_values]
    print(f"    {len(differences)} common values; {sum(d > 1e-3 for d in differences)} differ by more than 0.001")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
