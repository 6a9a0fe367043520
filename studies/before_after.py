"""Figure of what fine-tuning changed: python studies/before_after.py output/demo output/demo_finetuned

Both folders contain checkpoint_best.pth and the files that evaluation.py wrote for the test split. Prints the scores of
both models and what got better and worse, and writes <after>/before_after.png: test images without a planted companion,
as many where fine-tuning removed the companion as where it added it, both captions, and LRP of the companion if the
caption names it (a hallucination), else of the object that it accompanies.
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
from captioning.report.colours import colour_maps

METRICS = ("cider", "bleu_4", "chair_i", "chair_s", "companions_invented")


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
    """[(index, object, companion)] of the images that show a pair's first object without its companion."""
    present_categories = [boxes[name]["categories"] for name in data.names]
    return [(i, first, companion) for i, categories in enumerate(present_categories)
            for first, companion in objects.pairs.items() if first in categories and companion not in categories]


def select(cases, captions, objects, count):
    """The `count` cases to show, and how many hallucinations fine-tuning removed and added.

    cases: as from images_without_companion; captions: the captions of all images, before and after. Cases in which the
    companion was removed and added alternate as long as there are both, then come those in which both captions name it.
    Each case gets a fourth entry, whether (before, after) it is hallucinated.
    """
    hallucinated = [tuple(any(category == companion for _, category in objects.named(model_captions[i].split()))
                          for model_captions in captions) for i, _, companion in cases]
    better, worse, unchanged, right = ([k for k, pair in enumerate(hallucinated) if pair == kind]
                                       for kind in ((True, False), (False, True), (True, True), (False, False)))
    both = [k for pair in zip(better, worse, strict=False) for k in pair]
    order = list(dict.fromkeys([*both, *better, *worse, *unchanged, *right]))
    return [(*cases[k], hallucinated[k]) for k in order[:count]], len(better), len(worse)


def changes(data, boxes, objects, captions):
    """{description: (better, worse)}: numbers of images over the whole split whose captions changed.

    captions: those of all images, before and after. An image is counted once per kind of change.
    """
    counts = {"objects that are not in the image: named no longer, newly": [0, 0],
              "objects that are in the image: named newly, no longer": [0, 0]}
    for i, name in enumerate(data.names):
        present = objects.present(boxes.get(name), data.references[i])
        before, after = ({category for _, category in objects.named(texts[i].split())} for texts in captions)
        absent, correct = counts.values()
        absent[0] += bool((before - after) - present)
        absent[1] += bool((after - before) - present)
        correct[0] += bool((after - before) & present)
        correct[1] += bool((before - after) & present)
    return counts


def explained_step(words, objects, first, companion):
    """(step, word) of the companion in a caption, else of the first object, else of the last word; "<end>" if there is
    none."""
    steps = {category: t for t, category in reversed(objects.named(words))}
    t = steps.get(companion, steps.get(first, max(0, len(words) - 1)))
    return t, words[t] if words else "<end>"


def draw(path, rows, title):
    """rows: [(image (3, H, W), [(caption, word, map, whether the word is hallucinated)] of both models)]."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.4, 2.75 * len(rows) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes, (image, results) in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        image = image.permute(1, 2, 0).numpy()
        H, W = image.shape[:2]
        axes[0].imshow(image)
        for axis, when, (caption, word, heat, hallucinated) in zip(axes[1:], ("before", "after"), results, strict=True):
            axis.imshow(image.mean(2) / 255 * 0.6 + 0.35, cmap="gray", vmin=0, vmax=1, extent=(0, W, H, 0))
            axis.imshow(colour_maps(heat[None], signed=True)[0][0], extent=(0, W, H, 0), interpolation="bilinear")
            axis.set_title(textwrap.fill(f"{when}: {caption}", 38), fontsize=9)
            axis.set_xlabel(f"“{word}”" + (" (hallucinated)" if hallucinated else ""), fontsize=9, fontweight="bold",
                            color="crimson" if hallucinated else "black")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def explain_caption(model, vocabulary, image, caption, objects, first, companion):
    """(word, map (H, W)): the word to explain in a caption and its LRP relevance, summed over channels."""
    words = caption.split()
    t, word = explained_step(words, objects, first, companion)
    ids = torch.tensor([vocabulary.encode(words, len(words))])
    pixels = model.lrp(preprocess(image, checkpoint.image_size(model))[None], ids).pixels
    return word, pixels[0, t].sum(0).numpy()


def main(args):
    data = CaptionDataset(args.data_folder, args.dataset, "test")
    boxes = load_boxes(Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    objects = load_objects(args.data_folder, args.dataset, boxes)
    folders = [Path(args.before), Path(args.after)]
    metrics = [read_json(folder / "metrics_test.json", METRICS) for folder in folders]
    captions = [list(read_predictions(folder / "predictions_test.json", data.names, {}).values()) for folder in folders]
    without = images_without_companion(data, boxes, objects)
    if not without:
        raise InputError(f"no test image of {args.dataset} shows an object without its companion: use the demo data")
    cases, removed, added = select(without, captions, objects, args.images)
    models = [checkpoint.load(folder / "checkpoint_best.pth") for folder in folders]
    rows = []
    for i, first, companion, hallucinated in cases:
        image = read_image(Path(data.image_folder, data.paths[i]))
        rows.append((image, [
            (texts[i], *explain_caption(model, vocabulary, image, texts[i], objects, first, companion), is_hallucinated)
            for (model, vocabulary), texts, is_hallucinated in zip(models, captions, hallucinated, strict=True)]))
    path = folders[1] / "before_after.png"
    draw(path, rows, f"hallucinated companions of {len(without)} images: {removed} removed, {added} added by "
         "fine-tuning")
    print(f"{'':24}{'before':>8}{'after':>8}")
    for name in METRICS:
        print(f"{name:24}{metrics[0][name]:8.3f}{metrics[1][name]:8.3f}")
    print(f"\n{'images whose captions changed':60}{'better':>8}{'worse':>8}")
    for kind, (better, worse) in {"hallucinated companions: removed, added": (removed, added),
                                  **changes(data, boxes, objects, captions)}.items():
        print(f"{kind:60}{better:8}{worse:8}")
    print(path)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
