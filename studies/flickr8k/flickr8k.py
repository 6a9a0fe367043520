"""Tables of studies/flickr8k/run.sh: python studies/flickr8k/flickr8k.py output/flickr8k

Reads <folder>/<model>_<seed>/<mode>/{metrics,predictions}_test.json. Prints, in percent, means over
random seeds and paired differences to the control; then the number of object words in the captions
and of those that no reference names, and the difference of CHAIR_i with its 95 % interval over the
test images."""
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2]))
from captioning.cli import Parser
from captioning.data.dataset import CaptionDataset
from captioning.data.predictions import read_predictions
from captioning.errors import run_script
from captioning.metrics.object_metrics import named_and_present_categories
from captioning.metrics.object_words import load_objects
from studies.hallucination.hallucination import (
    CONTROL,
    METRICS,
    MODES,
    format_table,
    markdown,
    read_runs,
)

SHOWN = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "meteor": "METEOR", "cider": "CIDEr"} | {
    name: METRICS[name] for name in ("map", "map_recall", "map_f1", "chair_i", "chair_s")}


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of the runs")
    parser.add_argument("--dataset", default="flickr8k", help="name of the data set")
    parser.add_argument("--data_folder", default="data", help="folder of prepared data sets")
    return parser


def count_objects(path, data, objects):
    """(images, 2): object words in each caption of a run, and those that no reference names."""
    captions = read_predictions(path / "predictions_test.json", data.names, {}).values()
    counts = []
    for named, present in named_and_present_categories(
            captions, data.references, [None] * len(captions), objects):
        counts.append([len(named), len([name for name in named if name not in present])])
    return np.array(counts)


def chair(counts):
    """Mean CHAIR_i over runs of counts (runs, images, 2)."""
    total = counts.sum(1)
    return (total[:, 1] / total[:, 0]).mean()


def interval(counts, of_control):
    """95 % interval of the difference of `chair` over bootstrap samples of the images."""
    def difference(images):
        return chair(counts[:, images]) - chair(of_control[:, images])
    result = stats.bootstrap([np.arange(counts.shape[1])], difference, n_resamples=2000,
                             vectorized=False, method="percentile", random_state=0)
    return result.confidence_interval


def object_table(folder, model, modes, data, objects):
    """Object words of one model's captions, mean numbers per run."""
    counts = {mode: {seed: count_objects(Path(folder, f"{model}_{seed}", mode), data, objects)
                     for seed in runs.index} for mode, runs in modes.items()}
    rows = []
    for mode, of_seeds in counts.items():
        runs = np.stack(list(of_seeds.values()))
        words, absent = runs.sum(1).mean(0)
        difference = ""
        common = [seed for seed in of_seeds if seed in counts[CONTROL]]
        if mode not in ("base", CONTROL) and common:
            own = np.stack([of_seeds[seed] for seed in common])
            control = np.stack([counts[CONTROL][seed] for seed in common])
            low, high = interval(own, control)
            difference = (f"{100 * (chair(own) - chair(control)):+.1f} "
                          f"[{100 * low:+.1f}, {100 * high:+.1f}]")
        rows.append([f"`{model}`, {mode}", f"{words:.0f}", f"{absent:.0f}",
                     f"{100 * chair(runs):.1f}", difference])
    return markdown(["", "object words", "absent", "CHAIR_i",
                     "difference to the control, 95 % interval over images"], rows)


def main(args):
    runs = read_runs(args.folder, ["cider"], "studies/flickr8k/run.sh")
    data = CaptionDataset(args.data_folder, args.dataset, "test")
    objects = load_objects(args.data_folder, args.dataset, {})
    for model, modes in runs.items():
        modes = {mode: modes[mode] for mode in MODES if mode in modes}
        shown = {name: title for name, title in SHOWN.items()
                 if all(name in table for table in modes.values())}
        print(format_table(model, modes, shown, ".1f", 100))
        print(object_table(args.folder, model, modes, data, objects))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
