"""Thresholds of grounded decoding: python studies/grounded_decoding.py output/demo/checkpoint_best.pth SCORES

SCORES is a folder that evaluation.py --weight output/demo/checkpoint_best.pth --calibrate --save_path SCORES wrote.
Prints precision and recall of flags with one threshold and with one per category, and hallucination and CIDEr of
grounded decoding, for thresholds that keep different shares of correct words, and of banning random object words as
often (docs/experiments.md).
"""
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning import checkpoint, grounding  # noqa: E402
from captioning.cli import Parser, positive_int  # noqa: E402
from captioning.data.boxes import load_boxes  # noqa: E402
from captioning.data.dataset import CaptionDataset  # noqa: E402
from captioning.decoding import decode  # noqa: E402
from captioning.errors import InputError, run_script  # noqa: E402
from captioning.experiments.runner import read_values  # noqa: E402
from captioning.files import check_file  # noqa: E402
from captioning.metrics.object_metrics import chair_scores  # noqa: E402
from captioning.metrics.object_words import load_objects  # noqa: E402
from pycocoevalcap.caption_metrics import SCORERS  # noqa: E402

KEPT = (0.98, 0.95, 0.9)       # shares of correct words that a threshold keeps
COLUMNS = ("cider", "companions_invented", "companions_named", "object_precision", "chair_i")
NEEDED = {("lrp", "absolute_share"), ("reference", "present"), ("reference", "category")}


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("weight", help="checkpoint of a model of the demo data")
    add("scores", help="output folder of evaluation.py --calibrate")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--max_images", type=positive_int, help="use only the first test images (default: all)")
    return parser


def read_scores(folder):
    """{split: values, as by read_values} of the output folder of evaluation.py --calibrate; InputError if it is not."""
    values, remedy = {}, f"run evaluation.py --calibrate --save_path {folder} first"
    for split in ("val", "test"):
        path = Path(folder, f"grounding_words_{split}.csv")
        check_file(path, remedy)
        values[split] = read_values(path)
        if not values[split].keys() >= NEEDED:
            raise InputError(f"{path} lacks values of the object words: {remedy}")
    return values


def random_flags(rate):
    """A function like grounding.flags that flags each object word with probability `rate`."""
    generator = torch.Generator().manual_seed(1)

    def flag(explanation, captions, vocabulary, calibration):
        mask = grounding.object_words(captions, vocabulary, calibration.objects)
        return mask & (torch.rand(mask.shape, generator=generator) < rate)
    return flag


def category_thresholds(shares, reference, kept, prior=10):
    """{category: threshold} that keeps the share `kept` of its correct words; categories with few words are drawn
    towards the threshold of all words, which counts as `prior` words."""
    overall = grounding.fit_threshold(shares, reference["present"], kept)
    shares, category = torch.tensor(shares, dtype=torch.float64), torch.tensor(reference["category"])
    correct = torch.tensor(reference["present"]) > 0
    thresholds = {}
    for c in category[correct].unique().tolist():
        of_category = shares[correct & (category == c)]
        weight = len(of_category) / (len(of_category) + prior)
        thresholds[c] = (weight * of_category.quantile(1 - kept) + (1 - weight) * overall).item()
    return thresholds, overall


def report_flags(values):
    """Prints precision and recall of flags on the test words, for one threshold and for one per category."""
    shares = {split: v["lrp", "absolute_share"] for split, v in values.items()}
    reference = {split: {name: v["reference", name] for name in ("present", "category")} for split, v in values.items()}
    score, present = torch.tensor(shares["test"]), torch.tensor(reference["test"]["present"]) > 0
    print("| flags | precision | recall | correct words kept |\n|---|---|---|---|")
    for kept in KEPT:
        thresholds, overall = category_thresholds(shares["val"], reference["val"], kept)
        of_words = torch.tensor([thresholds.get(c, overall) for c in reference["test"]["category"]])
        for name, threshold in (("one threshold", overall), ("one per category", of_words)):
            flagged = score < threshold
            numbers = (~present)[flagged], flagged[~present], ~flagged[present]
            print(f"| {name}, {kept:.0%} kept | " + " | ".join(f"{n.double().mean():.2f}" for n in numbers) + " |")
    print(flush=True)


def make_report(weight, data_folder, max_images=None):
    """Prints the head of a table -> (objects of the demo data, report).

    report(name, function) prints a row of COLUMNS for the captions of the test images by a function like
    captioning.decoding.decode. weight: a checkpoint."""
    torch.set_num_threads(1)
    model, vocabulary = checkpoint.load(weight, "cpu")
    boxes = load_boxes(Path(data_folder, "demo", "boxes_demo.json"))
    objects = load_objects(data_folder, "demo", boxes)
    data = CaptionDataset(data_folder, "demo", "test", image_size=checkpoint.image_size(model))
    indices = list(range(len(data)))[:max_images]
    batches = [indices[i:i + 50] for i in range(0, len(indices), 50)]
    with torch.no_grad():
        features = [model.encode(data.__getitems__(batch)["images"]) for batch in batches]
    references, entries = [data.references[i] for i in indices], [boxes.get(data.names[i]) for i in indices]

    def report(name, function):
        captions = [" ".join(vocabulary.decode(ids)) for batch in tqdm(features, desc=name, leave=False)
                    for ids in function(model, batch, vocabulary, max_len=30).tolist()]
        scores = chair_scores(captions, references, entries, objects) | SCORERS["cider"](captions, references)[0]
        print(f"| {name} | " + " | ".join(f"{scores[key]:.3f}" for key in COLUMNS) + " |", flush=True)

    print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    return objects, report


def main(args):
    values = read_scores(args.scores)
    report_flags(values)
    objects, report = make_report(args.weight, args.data_folder, args.max_images)
    report("beam search", decode)
    shares = values["val"]["lrp", "absolute_share"], values["val"]["reference", "present"]
    tested = torch.tensor(values["test"]["lrp", "absolute_share"])
    for kept in KEPT:
        calibration = grounding.Calibration(grounding.fit_threshold(*shares, kept), objects)
        grounded = partial(grounding.decode_grounded, calibration=calibration)
        report(f"grounded, {kept:.0%} kept", grounded)
        report(f"grounded without other objects, {kept:.0%} kept", partial(grounded, replace=False))
        rate = (tested < calibration.threshold).double().mean().item()
        report(f"random, {rate:.0%} of object words", partial(grounded, flag=random_flags(rate)))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
