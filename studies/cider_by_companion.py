"""CIDEr with and without a planted companion in the image: python studies/cider_by_companion.py output/hallucination

Reads the test captions in <folder>/<model>_<seed>/{ce,<mode>}/predictions_test.json and prints, for three groups of
images, the mean CIDEr of both modes and their difference, paired by random seed, with its standard error.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning.cli import Parser
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.predictions import read_predictions
from captioning.errors import InputError, run_script
from captioning.metrics.object_words import load_objects
from pycocoevalcap.caption_metrics import cider
from studies.hallucination import CONTROL, mean_and_error

GROUPS = ("companion present", "companion missing", "no object of a pair")


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", help="folder of the runs")
    add("--mode", default="erase", help="mode to compare with the control")
    add("--dataset", default="demo", help="name of the data set")
    add("--data_folder", default="data/hallucination", help="folder of prepared data sets")
    return parser


def group(categories, pairs):
    """One of GROUPS for an image that shows these categories; pairs {object: companion}. An image with several of the
    objects counts as "companion missing" if one of their companions is missing."""
    companions = {companion for first, companion in pairs.items() if first in categories}
    return GROUPS[2] if not companions else GROUPS[0] if companions <= set(categories) else GROUPS[1]


def main(args):
    data = CaptionDataset(args.data_folder, args.dataset, "test")
    boxes = load_boxes(Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    objects = load_objects(args.data_folder, args.dataset, boxes)
    groups = [group(boxes[name]["categories"], objects.pairs) for name in data.names]
    means = {}      # {(model, group): {mode: [mean CIDEr of each seed]}}
    for path in sorted(Path(args.folder).glob(f"*_*/{CONTROL}/predictions_test.json")):
        if not (path.parents[1] / args.mode / path.name).exists():
            continue
        model = path.parts[-3].rsplit("_", 1)[0]
        for mode in (CONTROL, args.mode):
            captions = read_predictions(path.parents[1] / mode / path.name, data.names, {})
            each = cider(list(captions.values()), data.references)[1]["cider"]
            for name in GROUPS:
                values = [value for value, other in zip(each, groups, strict=True) if other == name]
                means.setdefault((model, name), {}).setdefault(mode, []).append(statistics.fmean(values))
    if not means:
        raise InputError(f"{args.folder} contains no captions of {CONTROL} and {args.mode}: run "
                         "configs/hallucination_experiment.sh first")
    print(f"| | images | {CONTROL} | {args.mode} | difference |\n|---|---|---|---|---|")
    for (model, name), values in means.items():
        changes = [after - before for before, after in zip(values[CONTROL], values[args.mode], strict=True)]
        cells = [str(groups.count(name)), *map(mean_and_error, (values[CONTROL], values[args.mode], changes))]
        print(f"| `{model}`, {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
