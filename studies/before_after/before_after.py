"""What fine-tuning changed: python studies/before_after/before_after.py BEFORE AFTER

Both folders contain checkpoint_best.pth and predictions_test.json. Prints how many hallucinated
companions fine-tuning removed and added, and writes AFTER/before_after.png: test images without a
planted companion in which fine-tuning removed or added it; both captions; and LRP of the companion
if the caption names it, which is a hallucination, else of the object that it accompanies."""
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from captioning import checkpoint
from captioning.cli import Parser, positive_int
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.images import read_image
from captioning.data.predictions import read_predictions
from captioning.errors import InputError, run_script
from captioning.metrics.object_words import load_objects
from captioning.report.colours import colour_maps
from captioning.report.explained_image import as_pil
from captioning.report.heatmaps import overlay
from captioning.report.plots import save


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("before", help="folder of the model before fine-tuning")
    add("after", help="folder of the model after fine-tuning")
    add("--dataset", default="demo", help="name of the data set")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--images", type=positive_int, default=6, help="number of images in the figure")
    return parser


def images_without_companion(data, boxes, objects):
    """[(index, object, companion)] of the images that show an object without its companion."""
    cases = []
    for i, name in enumerate(data.names):
        present = boxes[name]["categories"]
        cases += [(i, first, companion) for first, companion in objects.pairs.items()
                  if first in present and companion not in present]
    return cases


def select(cases, captions, objects, count):
    """The `count` cases to show, and the numbers of hallucinations that were removed and added.

    cases: as from images_without_companion; captions: those of all images, before and after. First
    come cases in which the companion was removed and added, in turn, then those in which both
    captions name it. Each case gets a fourth entry, whether (before, after) it is hallucinated."""
    kinds = {(True, False): [], (False, True): [], (True, True): [], (False, False): []}
    for i, first, companion in cases:
        hallucinated = tuple(companion in dict(objects.named(texts[i].split())).values()
                             for texts in captions)
        kinds[hallucinated].append((i, first, companion, hallucinated))
    removed, added, *others = kinds.values()
    pairs = min(len(removed), len(added))
    order = [case for pair in zip(removed[:pairs], added[:pairs], strict=True) for case in pair]
    order += removed[pairs:] + added[pairs:] + others[0] + others[1]
    return order[:count], len(removed), len(added)


def explained_step(words, objects, first, companion):
    """(step, word) of the companion in a caption, else of the object, else of the last word;
    "<end>" if there is none."""
    steps = {category: t for t, category in reversed(objects.named(words))}
    t = steps.get(companion, steps.get(first, max(0, len(words) - 1)))
    return t, words[t] if words else "<end>"


def draw(path, rows, title):
    """rows: [(image (3, H, W), [(caption, word, map (H, W), is hallucinated)] of both models)]."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.4, 2.75 * len(rows) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for axes, (image, results) in zip(panels, rows, strict=True):
        image = as_pil(image)
        axes[0].imshow(image)
        for axis, when, result in zip(axes[1:], ("before", "after"), results, strict=True):
            caption, word, heat, is_hallucinated = result
            axis.imshow(overlay(image, colour_maps(heat[None], signed=True)[0][0]))
            axis.set_title(textwrap.fill(f"{when}: {caption}", 38), fontsize=9)
            label = f"“{word}”" + (" (hallucinated)" if is_hallucinated else "")
            axis.set_xlabel(label, fontsize=9, fontweight="bold",
                            color="crimson" if is_hallucinated else "black")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    save(figure, path)


def main(args):
    data = CaptionDataset(args.data_folder, args.dataset, "test")
    boxes = load_boxes(Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    objects = load_objects(args.data_folder, args.dataset, boxes)
    folders = [Path(args.before), Path(args.after)]
    captions = [list(read_predictions(folder / "predictions_test.json", data.names, {}).values())
                for folder in folders]
    models = [checkpoint.load(folder / "checkpoint_best.pth") for folder in folders]
    without = images_without_companion(data, boxes, objects)
    if not without:
        raise InputError(f"no test image of {args.dataset} shows an object without its companion: "
                         "use the demo data")
    cases, removed, added = select(without, captions, objects, args.images)

    rows = []
    for i, first, companion, hallucinated in cases:
        image = read_image(Path(data.image_folder, data.paths[i]))
        results = []
        for k, (model, vocabulary) in enumerate(models):
            caption = captions[k][i]
            words = caption.split()
            t, word = explained_step(words, objects, first, companion)
            ids = torch.tensor([vocabulary.encode(words, len(words))])
            pixels = model.lrp(model.prepare(image)[None], ids).pixels
            results.append((caption, word, pixels[0, t].sum(0).numpy(), hallucinated[k]))
        rows.append((image, results))
    path = folders[1] / "before_after.png"
    result = f"hallucinated companions of {len(without)} images: {removed} removed, {added} added"
    draw(path, rows, f"{result} by fine-tuning")
    print(f"{result}\n{path}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
