"""What fine-tuning changed: python benchmarks/before_after.py output/demo output/demo_lrp_tune

Both folders hold checkpoint_best.pth and what evaluation.py wrote for the test split. Prints both runs' scores, writes
<after>/before_after.png: test pictures that lack a planted companion, both captions, and LRP of the companion where it
was said all the same, else of the object that it belongs to.
"""
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning import checkpoint
from captioning.cli import Parser, positive_int
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.images import preprocess, read_image
from captioning.data.predictions import read_predictions
from captioning.errors import InputError, run_script
from captioning.files import atomic_path, read_json
from captioning.metrics.object_words import load_objects
from captioning.report.plots import colours

METRICS = ("cider", "bleu_4", "chair_i", "chair_s", "companions_invented")


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("before", help="folder of the model before")
    add("after", help="folder of the model after")
    add("--dataset", default="demo", help="name of the data set")
    add("--data_folder", default="data", help="where preparedataset.py wrote it")
    add("--pictures", type=positive_int, default=6, help="pictures to show")
    return parser


def lacking(data, boxes, objects):
    """[(index, object, companion)] of the pictures that show a pair's first object without its companion."""
    there = [boxes[name]["categories"] for name in data.names]
    return [(i, first, companion) for i, categories in enumerate(there)
            for first, companion in objects.pairs.items() if first in categories and companion not in categories]


def choose(cases, captions, objects, count):
    """`count` of the cases, with who invented the companion (before, after): changes first, then what both invented."""
    said = [tuple(any(found == companion for _, found in objects.named(own[i].split())) for own in captions)
            for i, _, companion in cases]
    order = sorted(range(len(cases)), key=lambda k: (said[k][0] == said[k][1], not said[k][0]))
    cured, new = said.count((True, False)), said.count((False, True))
    return [(*cases[k], said[k]) for k in order[:count]], cured, new


def explained_step(words, objects, first, companion):
    """(step, word) of the companion in a caption, else of the first object, else of the last word."""
    named = {category: t for t, category in reversed(objects.named(words))}
    t = named.get(companion, named.get(first, len(words) - 1))
    return t, words[t]


def draw(path, rows, title):
    """rows: [(picture (3, H, W), [(caption, word, map, whether invented)] of both models)]."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.4, 2.75 * len(rows) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes, (picture, both) in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        photo = picture.permute(1, 2, 0).numpy()
        H, W = photo.shape[:2]
        axes[0].imshow(photo)
        for axis, when, (caption, word, heat, invented) in zip(axes[1:], ("before", "after"), both, strict=True):
            axis.imshow(photo.mean(2) / 255 * 0.6 + 0.35, cmap="gray", vmin=0, vmax=1, extent=(0, W, H, 0))
            axis.imshow(colours(heat, True), extent=(0, W, H, 0), interpolation="bilinear")
            axis.set_title(textwrap.fill(f"{when}: {caption}", 38), fontsize=9)
            axis.set_xlabel(f"“{word}”" + (" is not there" if invented else ""), fontsize=9, fontweight="bold",
                            color="crimson" if invented else "black")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def main(args):
    data = CaptionDataset(args.data_folder, args.dataset, "test")
    boxes = load_boxes(Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    objects = load_objects(args.data_folder, args.dataset, boxes)
    folders = [Path(args.before), Path(args.after)]
    metrics = [read_json(folder / "metrics_test.json", METRICS) for folder in folders]
    captions = [list(read_predictions(folder / "predictions_test.json", data.names, {}).values()) for folder in folders]
    cases, cured, new = choose(lacking(data, boxes, objects), captions, objects, args.pictures)
    if not cases:
        raise InputError(f"no test picture of {args.dataset} lacks the companion of an object: take the demo data")
    models = [checkpoint.load(folder / "checkpoint_best.pth") for folder in folders]
    rows = []
    for i, first, companion, said in cases:
        picture = read_image(Path(data.image_folder, data.paths[i]))
        both = []
        for (model, vocabulary), own, invented in zip(models, captions, said, strict=True):
            words = own[i].split()
            t, word = explained_step(words, objects, first, companion)
            ids = torch.tensor([vocabulary.encode(words, len(words))])
            image = preprocess(picture, checkpoint.image_size(model))[None]
            both.append((own[i], word, model.lrp(image, ids).pixels[0, t].sum(0).numpy(), invented))
        rows.append((picture, both))
    path = folders[1] / "before_after.png"
    draw(path, rows, f"companions that are not there: {cured} are not said any more, {new} are said anew")
    print(f"{'':24}{'before':>8}{'after':>8}")
    for name in METRICS:
        print(f"{name:24}{metrics[0][name]:8.3f}{metrics[1][name]:8.3f}")
    print(path)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
