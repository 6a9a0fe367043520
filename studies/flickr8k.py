"""Tables of configs/flickr8k_experiments.sh: python studies/flickr8k.py output/flickr8k

Reads <folder>/<model>_<seed>/<mode>/{metrics,predictions}_test.json. Prints, in percent, means over random seeds, and
differences to the control, paired by seed, with their standard errors; then the number of object words in the captions
and of those that no reference names, and the difference of CHAIR_i with its 95 % interval over the test images.
"""
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning.cli import Parser
from captioning.data.dataset import CaptionDataset
from captioning.data.predictions import read_predictions
from captioning.errors import InputError, run_script
from captioning.files import read_json
from captioning.metrics.object_metrics import named_and_present_categories
from captioning.metrics.object_words import load_objects
from studies.hallucination import CONTROL, METRICS, MODES

SHOWN = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "meteor": "METEOR", "cider": "CIDEr"} | {
    name: METRICS[name] for name in ("map", "map_recall", "map_f1", "chair_i", "chair_s")}
SAMPLES = 2000      # of the bootstrap


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of the runs")
    parser.add_argument("--dataset", default="flickr8k", help="name of the data set")
    parser.add_argument("--data_folder", default="data", help="folder of prepared data sets")
    return parser


def read_folders(folder):
    """{model: {mode: {seed: folder of the run}}} of the finished runs; InputError if there are none of the control."""
    runs = {}
    for path in sorted(Path(folder).glob("*_*/*/metrics_test.json")):
        model, seed = path.parts[-3].rsplit("_", 1)
        if path.parent.name in MODES:
            runs.setdefault(model, {}).setdefault(path.parent.name, {})[seed] = path.parent
    runs = {model: modes for model, modes in runs.items() if CONTROL in modes}
    if not runs:
        raise InputError(f"{folder} contains no finished runs: run configs/flickr8k_experiments.sh first")
    return runs


def percent(values, signed=False):
    """Text "mean", or with a sign "mean ± standard error", of values from 0 to 1, in percent."""
    values = [100 * value for value in values]
    if not signed:
        return f"{statistics.fmean(values):.1f}"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{error}"


def score_rows(model, modes):
    """Rows of the table of scores of one model: means, then differences to the control."""
    scores = {mode: {seed: read_json(path / "metrics_test.json", ["cider"]) for seed, path in seeds.items()}
              for mode, seeds in modes.items()}
    every = [each for seeds in scores.values() for each in seeds.values()]
    metrics = [metric for metric in SHOWN if all(metric in each for each in every)]
    yield "| | " + " | ".join(SHOWN[metric] for metric in metrics) + " |"
    yield "|---" * (len(metrics) + 1) + "|"
    for mode, seeds in scores.items():
        yield f"| `{model}`, {mode} | " + " | ".join(percent([s[m] for s in seeds.values()]) for m in metrics) + " |"
    for mode, seeds in scores.items():
        common = [seed for seed in seeds if seed in scores[CONTROL]]
        if mode not in ("base", CONTROL) and common:
            cells = [percent([seeds[s][m] - scores[CONTROL][s][m] for s in common], signed=True) for m in metrics]
            yield f"| `{model}`, {mode} − {CONTROL} | " + " | ".join(cells) + " |"


def count_objects(captions, references, objects):
    """(images, 2) numbers of object words in each caption, and of those that no reference of its image names."""
    return np.array([[len(named), sum(category not in present for category in named)] for named, present in
                     named_and_present_categories(captions, references, [None] * len(captions), objects)])


def chair(counts):
    """Mean CHAIR_i over runs of counts (runs, images, 2)."""
    total = counts.sum(1)
    return (total[:, 1] / total[:, 0]).mean()


def interval(counts, of_control):
    """95 % interval of the difference of `chair` over bootstrap samples of the images; both (runs, images, 2)."""
    rng, images = np.random.default_rng(0), counts.shape[1]
    samples = [rng.integers(images, size=images) for _ in range(SAMPLES)]
    return np.percentile([chair(counts[:, k]) - chair(of_control[:, k]) for k in samples], [2.5, 97.5])


def object_rows(model, modes, data, objects):
    """Rows of the table of object words of one model."""
    counts = {mode: {seed: count_objects(
        read_predictions(path / "predictions_test.json", data.names, {}).values(), data.references, objects)
        for seed, path in seeds.items()} for mode, seeds in modes.items()}
    yield "| | object words | absent | CHAIR_i | difference to the control, 95 % interval over images |"
    yield "|---" * 5 + "|"
    for mode, seeds in counts.items():
        runs, difference = np.stack(list(seeds.values())), ""
        words, absent = runs.sum(1).mean(0)
        common = [seed for seed in seeds if seed in counts[CONTROL]]
        if mode not in ("base", CONTROL) and common:
            own, control = (np.stack([counts[name][seed] for seed in common]) for name in (mode, CONTROL))
            low, high = interval(own, control)
            difference = f"{100 * (chair(own) - chair(control)):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        yield f"| `{model}`, {mode} | {words:.0f} | {absent:.0f} | {percent([chair(runs)])} | {difference} |"


def main(args):
    runs, data = read_folders(args.folder), CaptionDataset(args.data_folder, args.dataset, "test")
    objects = load_objects(args.data_folder, args.dataset, {})
    for model, modes in runs.items():
        modes = {mode: modes[mode] for mode in ("base", *MODES[1:]) if mode in modes}
        print("\n".join([*score_rows(model, modes), "", *object_rows(model, modes, data, objects), ""]))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
