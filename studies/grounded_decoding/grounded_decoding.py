"""Grounded decoding: python studies/grounded_decoding/grounded_decoding.py MODEL SCORES

SCORES is a folder that evaluation.py --weight MODEL --calibrate --save_path SCORES wrote. Prints
hallucination and CIDEr of grounded decoding for thresholds that keep different shares of the
correct words, and of banning as many random object words."""
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from captioning import checkpoint, grounding
from captioning.cli import Parser, positive_int
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.decoding import decode
from captioning.errors import run_script
from captioning.metrics.object_metrics import chair
from captioning.metrics.object_words import load_objects
from pycocoevalcap.caption_metrics import SCORERS

KEPT = (0.98, 0.95, 0.9)       # shares of correct words that a threshold keeps
COLUMNS = ("cider", "companions_invented", "companions_named", "object_precision", "chair_i")


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("weight", help="checkpoint of a model of the demo data")
    add("scores", help="output folder of evaluation.py --calibrate")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--max_images", type=positive_int, help="use only the first test images (default: all)")
    return parser


def random_presence(generator, model, features, explanation, captions, vocabulary, calibration):
    """A random number for each object word in place of grounding.presence."""
    is_object = grounding.object_words(captions, vocabulary, calibration.objects)
    return torch.rand(is_object.shape, generator=generator).masked_fill(~is_object, torch.nan)


def main(args):
    val = grounding.read_scores(args.scores, "val")
    test = grounding.read_scores(args.scores, "test")
    torch.set_num_threads(1)
    model, vocabulary = checkpoint.load(args.weight, "cpu")
    calibration = grounding.load(args.weight, model)
    correct = grounding.estimates(val[val.present > 0], calibration)
    test = grounding.estimates(test, calibration)
    boxes = load_boxes(Path(args.data_folder, "demo", "boxes_demo.json"))
    objects = load_objects(args.data_folder, "demo", boxes)
    data = CaptionDataset(args.data_folder, "demo", "test",
                          image_size=checkpoint.image_size(model))
    indices = list(range(len(data)))[:args.max_images]
    batches = [indices[i:i + 50] for i in range(0, len(indices), 50)]
    with torch.no_grad():
        features = [model.encode(data.__getitems__(batch)["images"]) for batch in batches]
    references = [data.references[i] for i in indices]
    entries = [boxes.get(data.names[i]) for i in indices]

    def report(name, function):
        """Prints a row for the captions by `function(features, vocabulary, max_len=…)`."""
        captions = []
        for batch in tqdm(features, desc=name, leave=False):
            tokens = function(batch, vocabulary, max_len=30).tolist()
            captions += [" ".join(vocabulary.decode(ids)) for ids in tokens]
        scores, _ = chair(captions, references, entries, objects)
        scores |= SCORERS["cider"](captions, references)[0]
        cells = [f"{scores[key]:.3f}" for key in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    report("beam search", partial(decode, model))
    for kept in KEPT:
        threshold = correct.quantile(1 - kept)
        rate = (test < threshold).mean()
        grounded = partial(grounding.decode_grounded, model)
        report(f"grounded, {kept:.0%} kept",
               partial(grounded, calibration=calibration._replace(threshold=threshold)))
        generator = torch.Generator().manual_seed(1)
        with mock.patch.object(grounding, "presence", partial(random_presence, generator)):
            report(f"random, {rate:.0%} of object words",
                   partial(grounded, calibration=calibration._replace(threshold=rate)))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
