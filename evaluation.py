"""Captions the images of a split and scores the captions: python evaluation.py --weight output/checkpoint_best.pth"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bert.bertscore import bert_score
from captioning import checkpoint, grounding, processes
from captioning.cli import (
    Parser,
    add_decoding,
    add_device,
    add_seed,
    add_workers,
    decoding_options,
    positive_int,
    print_settings,
    set_seed,
)
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.feature_store import open_features
from captioning.data.loader import make_loader
from captioning.data.predictions import image_ids, read_predictions, read_references
from captioning.decoding import caption_batch, decode, image_seeds
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.experiments.batch import RANDOM, Study
from captioning.experiments.calibration import calibrate
from captioning.experiments.localisation import Masks
from captioning.experiments.registry import EXPERIMENTS, NEED_BOXES, NEED_IMAGES, experiments_for_regions, metrics_of
from captioning.experiments.runner import run_experiments
from captioning.explanation.methods import METHODS, methods_for_regions
from captioning.files import read_json, write_json
from captioning.metrics.object_metrics import chair_scores, frequent_word_scores, named_and_present_categories
from captioning.metrics.object_words import frequent_words, load_objects, stop_words
from captioning.metrics.score_table import format_table, score_all, write_per_image
from captioning.report.plots import draw_comparison
from captioning.runs import record_run
from pycocoevalcap.caption_metrics import SCORERS, spice
from pycocoevalcap.spice_jar import find_corenlp

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "bert", "map", "chair")


def get_args_parser():
    parser = Parser(__doc__)
    add_device(parser)
    add_seed(parser)
    add = parser.add_argument_group("input", "exactly one of --weight, --predictions and --compare").add_argument
    add("--weight", metavar="CHECKPOINT", help="caption the split with this model and score its captions")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--predictions", metavar="FILE", help="score these captions: a JSON list of {\"image\": file name, "
        "\"caption\": text}, or COCO results with \"image_id\"")
    add("--compare", metavar="RUN", nargs="+", help="print and plot the metrics of several runs, given their folders")
    add("--references", metavar="FILE", help="COCO captions file with the reference captions (default: those of the "
        "data set)")
    add("--partial", action="store_true", help="score only the images that --predictions or --references contains")
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", help="name of the prepared data set (default: demo, or coco if --predictions are scored against "
        "--references)")
    add("--data_folder", default="data", help="output folder of preparedataset.py")
    add("--split", choices=["train", "val", "test"], default="test", help="split to evaluate")
    add("--boxes", metavar="FILE", help="boxes of the objects in the images (default: boxes_<dataset>.json of the data "
        "set)")
    add("--batch_size", type=positive_int, default=16, help="images per batch")
    add_workers(group)
    add_decoding(parser)
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics", nargs="+", choices=METRICS, help="metrics to compute (default: all whose requirements are met; "
        "spice requires CoreNLP, bert --bert_model)")
    add("--per_image", action="store_true", help="also write the scores of each image")
    add("--corenlp", metavar="FOLDER", help="spice: folder of Stanford CoreNLP 3.6.0, downloaded if missing (default: "
        "<data_folder>/corenlp)")
    add("--bert_model", metavar="NAME_OR_FOLDER", help="bert: model (default: roberta-large)")
    add("--bert_layer", type=positive_int, help="bert: layer of the model (default: the one recommended by bert-score, "
        "otherwise the last)")
    add("--object_words", metavar="FILE", help="map: file of object words (default: the paper's lists for Flickr30K, "
        "also for Flickr8k, and COCO, otherwise all object words)")
    add("--synonyms", metavar="FILE", help="chair: file with one line per category: its name and its synonyms, "
        "separated by commas (default: captioning/metrics/coco_objects.txt)")
    add = parser.add_argument_group("explanations").add_argument
    add("--explanations", nargs="+", choices=list(EXPERIMENTS), default=[], help="experiments on the explanations")
    add("--methods", nargs="+", choices=[*METHODS, RANDOM], default=["lrp", "attention"], help="explanation "
        "methods to measure (default: lrp attention)")
    add("--calibrate", action="store_true", help="fit the threshold below which an object word is flagged as coming "
        "from language to the validation split, store it beside --weight, and measure the flags (--explanations "
        "grounding)")
    add("--max_images", type=positive_int, help="explain only the first images that have a word to measure (default: "
        "all images)")
    add = parser.add_argument_group("output").add_argument
    add("--save_path", metavar="FOLDER", help="output folder (default: the folder of --weight or --predictions; with "
        "--compare the common parent folder of the runs)")
    return parser


def check_flags(args):
    """InputError if flags contradict each other."""
    if sum(map(bool, (args.weight, args.predictions, args.compare))) != 1:
        raise InputError("give exactly one of --weight CHECKPOINT, --predictions FILE and --compare RUN …")
    for flag in ("explanations", "calibrate", "grounded"):
        if getattr(args, flag) and not args.weight:
            raise InputError(f"--{flag} requires --weight: captions without a model cannot be explained")


def with_defaults(args):
    """A copy of args in which --dataset and --save_path, if not given, have the defaults that depend on other flags."""
    dataset = args.dataset or ("coco" if args.predictions and args.references else "demo")
    if args.compare:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in args.compare])
    else:
        folder = str(Path(args.weight or args.predictions).parent)
    return argparse.Namespace(**vars(args) | {"dataset": dataset, "save_path": args.save_path or folder})


def open_data(data_folder, dataset, split, model, from_features):
    """The split with stored features if the model was trained on stored features that exist, otherwise with images."""
    path = features_path(data_folder, dataset, split, model.config["encoder"] or "bottom_up")
    if model.encoder is None or (from_features and path.exists()):
        return open_features(data_folder, dataset, split, model)
    return open_images(data_folder, dataset, split, model)


def open_images(data_folder, dataset, split, model):
    """The split with images of the size that the model's encoder takes."""
    return CaptionDataset(data_folder, dataset, split, image_size=checkpoint.image_size(model))


def open_boxes(data_folder, dataset, path=None, required_by=None):
    """Boxes {file name: entry} of `path`, by default those of the data set, or {} if it has none.

    required_by: the flag that requires boxes, if any; InputError if there are none then.
    """
    default = Path(data_folder, dataset, f"boxes_{dataset}.json")
    boxes = load_boxes(path or default) if path or default.exists() else {}
    if required_by and not boxes:
        raise InputError(f"{path or default} is missing or empty: {required_by} requires boxes, give them with --boxes")
    return boxes


def open_masks(data_folder, dataset, split, image_count):
    """The object masks of the split, required by the experiment mask_mass."""
    path = Path(data_folder, dataset, f"masks_{dataset}.hdf5")
    if not path.exists():
        raise InputError(f"{path} is missing: --explanations mask_mass requires a data set with masks, such as demo")
    return Masks(path, split, image_count)


def caption_split(model, vocabulary, data, decoding, batch_size, workers, seed, device):
    """One caption per image of the split, generated by all processes together; decoding: options of caption_batch."""
    batches = processes.shard([batch.tolist() for batch in torch.arange(len(data)).split(batch_size)])
    captions = []
    for batch in tqdm(make_loader(data, batches, workers, device), desc="captioning", unit="batch",
                      disable=processes.rank() > 0):
        seeds = image_seeds(batch["index"].tolist(), seed)
        captions.append(caption_batch(model, batch["images"].to(device), vocabulary, False, device, seeds=seeds,
                                      **decoding))
    return sum(processes.gather(captions), [])


def read_captions(args):
    """The captions {file name: caption} of --predictions, and the list of reference captions of each.

    The references are those of --references or of the data set.
    """
    if args.references:
        references, ids = read_references(args.references)
    else:
        data = CaptionDataset(args.data_folder, args.dataset, args.split)
        references = dict(zip(data.names, data.references, strict=True))
        ids = image_ids(references)
    captions = read_predictions(args.predictions, list(references), ids, args.partial)
    return captions, [references[name] for name in captions]


def match_references(captions, path, partial):
    """The captions {file name: caption} that have references in the COCO captions file `path`, and these references.

    InputError if captions have no references, unless `partial` is set and only some of them have none.
    """
    references, _ = read_references(path)
    missing = [name for name in captions if name not in references]
    if len(missing) == len(captions) or (missing and not partial):
        raise InputError(f"{path} has no captions for {len(missing)} of the {len(captions)} images of the split, "
                         f"{missing[0]} first: give the captions file of this split, or score the other images with "
                         "--partial")
    captions = {name: caption for name, caption in captions.items() if name in references}
    return captions, [references[name] for name in captions]


def make_scorers(args, names, boxes, objects, device):
    """{metric: function of captions and references}, for --metrics or for all metrics whose requirements are met."""
    corenlp = args.corenlp or Path(args.data_folder, "corenlp")
    entries = [boxes.get(name) for name in names]
    is_available = {"bert": args.bert_model, "chair": any(entries) or not objects.exact,
                    "spice": args.corenlp or find_corenlp(corenlp)}
    selected = args.metrics or [name for name in METRICS if is_available.get(name, True)]
    if not args.metrics:
        print(f"metrics: {' '.join(selected)} (see --metrics for others)")
    words = frequent_words(args.dataset, objects, args.object_words)
    if "chair" in selected and not any(entries) and objects.exact:
        raise InputError(f"{args.dataset} has no boxes, which decide which of its objects are present: give them with "
                         "--boxes, or leave chair out of --metrics")
    if args.boxes and not any(entries):
        raise InputError(f"the boxes belong to other images, such as {next(iter(boxes))}, and none to "
                         f"{next(iter(names))}: give the right file with --boxes")
    scorers = SCORERS | {
        "spice": partial(spice, corenlp=corenlp),
        "bert": partial(bert, model=args.bert_model or "roberta-large", layer=args.bert_layer, device=device),
        "map": lambda captions, references: (frequent_word_scores(captions, references, words), {}),
        "chair": lambda captions, references: chair(captions, references, entries, objects)}
    return {name: scorers[name] for name in METRICS if name in selected}


def bert(captions, references, **options):
    """({"bert": mean}, {"bert": [score of each caption]})."""
    scores = bert_score(captions, references, **options)
    return {"bert": sum(scores) / len(scores)}, {"bert": scores}


def chair(captions, references, entries, objects):
    """CHAIR of all captions, and per caption the objects that it names and those of them that are not present.

    entries: box entries of the images, or None; without boxes the references alone decide which objects are present."""
    categories = list(named_and_present_categories(captions, references, entries, objects))
    hallucinated = [sorted(set(named) - present) for named, present in categories]
    return chair_scores(captions, references, entries, objects), {
        "objects": ["; ".join(named) for named, _ in categories], "chair_s": [bool(names) for names in hallucinated],
        "invented_objects": ["; ".join(names) for names in hallucinated]}


def score_captions(args, captions, references, boxes, objects, device):
    """Writes predictions_<split>.json; returns {key: score} and {key: [score of each caption]}.

    A metric that fails is reported in one sentence; InputError if all fail.
    """
    scorers = make_scorers(args, captions, boxes, objects, device)
    path = Path(args.save_path, f"predictions_{args.split}.json")
    if not args.predictions or path.resolve() != Path(args.predictions).resolve():      # never overwrite the input
        write_json(path, [{"image": name, "caption": caption} for name, caption in captions.items()])
    metrics, per_caption, problems = score_all(list(captions.values()), references, scorers)
    for name, problem in problems.items():
        print(f"warning: no {name}: {problem}", file=sys.stderr)
    if problems and not metrics:
        raise InputError("none of the metrics could be computed (see the warnings above)")
    return metrics, per_caption


def write_scores(args, captions, metrics, per_caption):
    """Writes metrics_<split>.json and, with --per_image, per_image_<split>.csv; prints the metrics."""
    if args.per_image:
        write_per_image(Path(args.save_path, f"per_image_{args.split}.csv"), captions, per_caption)
    path = Path(args.save_path, f"metrics_{args.split}.json")
    write_json(path, metrics)
    print(f"{format_table({args.split: metrics})}\n{path}")


def make_study(model, vocabulary, methods, objects, boxes, frequent, masks, decoding, seed, read_boxes=None,
               calibration=None):
    """What the experiments share; images that an experiment changes are captioned with the same decoding options."""
    def decode_features(features):
        options = {"decode": decode, "seeds": image_seeds(range(len(features)), seed)} | decoding
        return options.pop("decode")(model, features, vocabulary, **options)
    return Study(model, vocabulary, tuple(methods), objects, boxes, set(frequent), stop_words(), masks,
                 decode_features, seed, read_boxes, calibration)


def score_explanations(args, study, images, captions, experiments, device):
    """Runs the experiments, which write tables and plots; returns their entries of metrics_<split>.json."""
    if "ablation" in experiments and "attention" in study.methods:
        print("attention assigns no relevance to the preceding words: word ablation omits it")
    tables = run_experiments(study, images, captions, experiments, args.max_images, args.batch_size, args.workers,
                             device, args.save_path, [args.split, decoding_options(args)])
    return metrics_of(tables or {}, study.methods)


def evaluate_predictions(args, device):
    """Scores the captions of --predictions."""
    boxes = open_boxes(args.data_folder, args.dataset, args.boxes)
    objects = load_objects(args.data_folder, args.dataset, boxes, args.synonyms)
    captions, references = read_captions(args)
    record_run(args.save_path, args, "evaluation.py")
    write_scores(args, captions, *score_captions(args, captions, references, boxes, objects, device))


def evaluate_model(args, device):
    """Captions the split with the model of --weight, scores the captions and measures explanations of their words."""
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    training = checkpoint.read(args.weight).get("training") or {}
    methods = args.methods
    experiments = list(dict.fromkeys(args.explanations + (["grounding"] if args.calibrate else [])))
    if experiments and model.encoder is None:
        methods = methods_for_regions(methods, args.weight)
        experiments = experiments_for_regions(experiments, args.weight)
    boxes = open_boxes(args.data_folder, args.dataset, args.boxes, requiring_boxes(experiments))
    objects = load_objects(args.data_folder, args.dataset, boxes, args.synonyms)
    split = args.data_folder, args.dataset, args.split
    data = open_data(*split, model, training.get("from_features", False))
    masks = open_masks(*split, len(data)) if "mask_mass" in experiments else None
    record_run(args.save_path, args, "evaluation.py")
    decoding = decoding_options(args)
    new_study = partial(make_study, model, vocabulary, methods, objects, boxes,
                        frequent_words(args.dataset, objects, args.object_words), masks)

    def caption(data):
        return caption_split(model, vocabulary, data, decoding, args.batch_size, args.workers, args.seed, device)
    if args.calibrate:
        validation = open_data(args.data_folder, args.dataset, "val", model, training.get("from_features", False))
        calibrate(args.weight, new_study(decoding, args.seed, validation.read_boxes), validation,
                  caption(validation), args.batch_size, args.workers, device, args.save_path)
    if args.grounded:
        calibration = grounding.load_for_decoding(args.weight, model)
        decoding = decoding | {"decode": partial(grounding.decode_grounded, calibration=calibration)}
    generated = caption(data)

    def explain():
        if not experiments:
            return {}
        calibration = grounding.load(args.weight, model) if "grounding" in experiments else None
        study = new_study(decoding, args.seed, data.read_boxes, calibration)
        images = open_images(*split, model) if model.encoder is not None and NEED_IMAGES & set(experiments) else data
        return score_explanations(args, study, images, generated, experiments, device)

    if processes.rank():        # only the first process scores captions
        explain()
        return
    captions, references = dict(zip(data.names, generated, strict=True)), data.references
    if args.references:
        captions, references = match_references(captions, args.references, args.partial)
    metrics, per_caption = score_captions(args, captions, references, boxes, objects, device)
    write_scores(args, captions, metrics | explain(), per_caption)


def requiring_boxes(experiments):
    """The first flag that requires boxes, or None."""
    return next((f"--explanations {name}" for name in experiments if name in NEED_BOXES), None)


def read_metrics(path):
    """The metrics {name: number} that an earlier run wrote."""
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not metrics or not all(
            isinstance(value, int | float) and math.isfinite(value) for value in metrics.values()):
        raise InputError(f"{path} must contain an object {{metric: number}}: create it with evaluation.py")
    return metrics


def compare_runs(args):
    """Prints a table of the metrics_<split>.json of the runs --compare and plots it in compare_<split>.png."""
    folders, split, save_path = args.compare, args.split, args.save_path
    folders = [os.path.abspath(folder) for folder in folders]
    common = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    runs = {os.path.relpath(folder, common): read_metrics(Path(folder, f"metrics_{split}.json")) for folder in folders}
    record_run(save_path, args, "evaluation.py")
    path = Path(save_path, f"compare_{split}.png")
    draw_comparison(path, runs)
    print(f"{format_table(runs)}\n{path}")


def main(args):
    processes.start()
    check_flags(args)
    args = with_defaults(args)
    print_settings(args)
    if args.compare:
        compare_runs(args)
        return
    device = pick_device(args.device)
    if args.explanations:
        torch.set_num_threads(1)    # results to the last digit must not depend on the number of cores
    set_seed(args.seed)
    if args.weight:
        evaluate_model(args, device)
    else:
        evaluate_predictions(args, device)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
