"""Captions a split and scores the captions: python evaluation.py --weight output/checkpoint_best.pth --dataset demo"""
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bert.bertscore import bert_score
from captioning import checkpoint, processes
from captioning.cli import Parser, add_device, add_seed, natural, non_negative, positive_int, print_settings, set_seed
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.loader import make_loader
from captioning.data.predictions import image_ids, read_predictions, read_references
from captioning.decoding import caption_batch, decode
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.experiments.batch import METHODS, Study
from captioning.experiments.localisation import Masks
from captioning.experiments.registry import EXPERIMENTS, NEED_BOXES, experiments_for_regions
from captioning.experiments.runner import run_experiments
from captioning.explanation.methods import methods_for_regions
from captioning.files import make_folder, read_json, write_json
from captioning.metrics.object_metrics import chair_scores, frequent_word_scores, named_and_present
from captioning.metrics.object_words import frequent_words, load_objects, stop_words
from captioning.metrics.score_table import format_table, score_all, write_per_image
from captioning.report.plots import draw_comparison
from pycocoevalcap.caption_metrics import SCORERS, spice
from pycocoevalcap.spice_jar import find_corenlp

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "bert", "map", "chair")


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weight", help="checkpoint of a captioning model")
    add("--predictions", metavar="FILE", help="score these captions instead: [{\"image\": name, \"caption\": text}, …] "
        "or COCO's results, with \"image_id\"")
    add("--references", metavar="FILE", help="score against a COCO captions file instead of the data set's captions")
    add("--partial", action="store_true", help="score only the pictures that --predictions or --references has")
    add("--compare", metavar="RUN", nargs="+", help="instead: table and plot of the scores in these folders of "
        "--save_path")
    add("--dataset", default="demo", help="name of a data set that preparedataset.py made")
    add("--data_folder", default="data", help="where preparedataset.py wrote it")
    add("--split", choices=["train", "val", "test"], default="test", help="which pictures")
    add("--decoding", choices=["greedy", "beam_search", "diverse_beam_search"], default="beam_search",
        help="how captions are found")
    add("--beam_size", type=positive_int, default=3, help="hypotheses a picture")
    add("--diversity", type=non_negative, default=0.5, help="penalty of diverse_beam_search")
    add("--max_len", type=positive_int, default=50, help="words at most")
    add("--metrics", nargs="+", choices=METRICS, help="scores; by default all, but chair only where there are "
        "boxes, spice where there is CoreNLP and bert with --bert_model")
    add("--per_image", action="store_true", help="also write each picture's scores")
    add("--corenlp", metavar="FOLDER", help="jars of Stanford CoreNLP 3.6.0 for SPICE, fetched if they are not there; "
        "by default <data_folder>/corenlp")
    add("--bert_model", metavar="NAME_OR_FOLDER", help="model of BERTScore, by default roberta-large")
    add("--bert_layer", type=positive_int, help="its layer; by default bert-score's choice, or the last")
    add("--explanations", nargs="+", choices=list(EXPERIMENTS), default=[], help="measures of explanations")
    add("--methods", nargs="+", choices=METHODS, default=["lrp", "attention"], help="explanations to measure")
    add("--max_images", type=positive_int, help="explain only so many pictures, the first of "
        "whose words any can be measured")
    add("--boxes", metavar="FILE", help="boxes of the pictures' objects; by default boxes_<dataset>.json")
    add("--object_words", metavar="FILE", help="words of the metric map; by default the paper's lists for Flickr30K "
        "and COCO, else all objects' words")
    add("--synonyms", metavar="FILE", help="words for the objects of the metric chair: a line for each, its category "
        "first, with commas; by default those of captioning/coco_objects.txt")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--batch_size", type=positive_int, default=16, help="pictures at once")
    add("--workers", type=natural, default=2, help="processes that read pictures")
    add("--save_path", default="output", help="folder of predictions, metrics and plots")
    add_device(parser)
    add_seed(parser)
    return parser


def open_data(args, model, from_features):
    """The split: stored features if the model was trained on them, else pictures."""
    split = args.data_folder, args.dataset, args.split
    path = features_path(*split, model.config["encoder"] or "bottom_up")
    if model.encoder is None or (from_features and path.exists()):
        return CaptionDataset(*split, features=path)
    return CaptionDataset(*split, image_size=checkpoint.image_size(model))


def caption_split(args, model, vocabulary, data, device):
    """A sentence for every picture of the split."""
    batches = processes.own([batch.tolist() for batch in torch.arange(len(data)).split(args.batch_size)])
    loader = make_loader(data, batches, args.workers, device)
    found = [caption_batch(model, batch["images"].to(device), vocabulary, False, device, **decoding_options(args))
             for batch in tqdm(loader, desc="captioning", unit="batch", disable=processes.rank() > 0)]
    return sum(processes.all_of(found), [])


def decoding_options(args):
    options = {"method": args.decoding, "max_len": args.max_len}
    if args.decoding != "greedy":
        options["beam_size"] = args.beam_size
    if args.decoding == "diverse_beam_search":
        options["diversity"] = args.diversity
    return options


def read_captions(args):
    """Captions of --predictions {file name: caption}, and the references of each; of --references or the data set."""
    if args.references:
        references, ids = read_references(args.references)
    else:
        data = CaptionDataset(args.data_folder, args.dataset, args.split)
        references = dict(zip(data.names, data.references, strict=True))
        ids = image_ids(references)
    captions = read_predictions(args.predictions, list(references), ids, args.partial)
    return captions, [references[name] for name in captions]


def other_references(args, captions):
    """The captions {file name: caption} that --references has sentences for, and these."""
    references, _ = read_references(args.references)
    missing = [name for name in captions if name not in references]
    if len(missing) == len(captions) or (missing and not args.partial):
        raise InputError(f"{args.references} has no captions for {len(missing)} of the {len(captions)} pictures of the "
                         f"split, {missing[0]} first: give the file for these, or score the others with --partial")
    captions = {name: caption for name, caption in captions.items() if name in references}
    return captions, [references[name] for name in captions]


def open_pictures(args, model):
    """The split with pictures of the model's size, also where it captions stored features."""
    return CaptionDataset(args.data_folder, args.dataset, args.split, image_size=checkpoint.image_size(model))


def make_study(args, model, vocabulary, boxes, objects, masks, read_boxes=None):
    frequent = set(frequent_words(args.dataset, objects, args.object_words))
    return Study(model, vocabulary, tuple(args.methods), objects, boxes, frequent, stop_words(), masks,
                 lambda features: decode(model, features, vocabulary, **decoding_options(args)), args.seed, read_boxes)


def score_explanations(args, model, vocabulary, data, captions, boxes, objects, masks, device):
    """Tables and plots of --explanations; returns what metrics_<split>.json takes over."""
    if not args.explanations:
        return {}
    pictures = data if model.encoder is None else open_pictures(args, model)
    study = make_study(args, model, vocabulary, boxes, objects, masks, data.read_boxes)
    if "ablation" in args.explanations and "attention" in args.methods:
        print("attention gives the words read no relevance: word ablation leaves it out")
    tables = run_experiments(study, pictures, captions, args.explanations, args.max_images, args.batch_size,
                             args.workers, device, args.save_path, [args.split, decoding_options(args)])
    if not tables or not tables.get("correctness"):
        return {}
    table = tables["correctness"]
    methods = [*args.methods, *(["even"] if ("even", "0.0") in table else [])]
    found = {f"inside_box_{method}": table[method, "0.0"].mean for method in methods}
    return found | {"box_share": table["box", "0.0"].mean, "explained_words": table["box", "0.0"].count}


def check_flags(args):
    if sum(map(bool, (args.weight, args.predictions, args.compare))) != 1:
        raise InputError("give either --weight CHECKPOINT or --predictions FILE, or --compare RUN …")
    if args.explanations and not args.weight:
        raise InputError("--explanations needs --weight: captions alone cannot be explained")


def caption_scorers(args, names, boxes, objects, device):
    """{metric: function of captions and references} that --metrics asks for, or that can be had without asking."""
    corenlp = args.corenlp or Path(args.data_folder, "corenlp")
    entries = [boxes.get(name) for name in names]
    wanted = args.metrics or [name for name in METRICS if {
        "bert": args.bert_model, "chair": any(entries), "spice": args.corenlp or find_corenlp(corenlp)}.get(name, True)]
    if not args.metrics:
        print(f"scores: {' '.join(wanted)}; for others see --metrics")
    words = frequent_words(args.dataset, objects, args.object_words)
    if args.boxes and not any(entries):
        raise InputError(f"the boxes are those of other pictures, {next(iter(boxes))} for one, not of "
                         f"{next(iter(names))}: give the right file with --boxes")
    every = SCORERS | {
        "spice": partial(spice, corenlp=corenlp),
        "bert": partial(bert, model=args.bert_model or "roberta-large", layer=args.bert_layer, device=device),
        "map": lambda captions, references: (frequent_word_scores(captions, references, words), {}),
        "chair": lambda captions, references: chair(captions, references, entries, objects)}
    return {name: every[name] for name in METRICS if name in wanted}


def bert(captions, references, **options):
    each = bert_score(captions, references, **options)
    return {"bert": sum(each) / len(each)}, {"bert": each}


def chair(captions, references, entries, objects):
    found = list(named_and_present(captions, references, entries, objects))
    invented = [sorted(set(named) - there) for there, named in found]
    return chair_scores(captions, references, entries, objects), {
        "objects": ["; ".join(named) for _, named in found], "chair_s": [bool(names) for names in invented],
        "invented_objects": ["; ".join(names) for names in invented]}


def compare(args):
    """Table on the screen and compare_<split>.png of the runs' metrics_<split>.json."""
    runs = {}
    for folder in args.compare:
        path = Path(os.path.abspath(folder), f"metrics_{args.split}.json")
        metrics = read_json(path)
        if not isinstance(metrics, dict) or not metrics or not all(
                isinstance(value, int | float) and math.isfinite(value) for value in metrics.values()):
            raise InputError(f"{path} must hold an object {{metric: number}}: make it with evaluation.py")
        runs[path.parent] = metrics
    common = os.path.commonpath([run.parent for run in runs])
    runs = {os.path.relpath(run, common): metrics for run, metrics in runs.items()}
    path = make_folder(args.save_path) / f"compare_{args.split}.png"
    draw_comparison(path, runs)
    print(f"{format_table(runs)}\n{path}")


def open_model(args, device):
    """(model, vocabulary, whether it was trained on stored features) of --weight."""
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    if args.explanations and model.encoder is None:
        args.methods = methods_for_regions(args.methods, args.weight)
        args.explanations = experiments_for_regions(args.explanations, args.weight)
    training = checkpoint.read(args.weight).get("training") or {}
    return model, vocabulary, training.get("from_features", False)


def open_boxes(args):
    """Boxes {file name: entry}, empty if there are none, and the data set's Objects."""
    path = Path(args.boxes or Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    boxes = load_boxes(path) if args.boxes or path.exists() else {}
    needs = next((f"--explanations {name}" for name in args.explanations if name in NEED_BOXES),
                 "--metrics chair" if "chair" in (args.metrics or ()) else None)
    if needs and not boxes:
        raise InputError(f"{path} is missing or empty: {needs} needs boxes, name them with --boxes")
    return boxes, load_objects(args.data_folder, args.dataset, boxes, args.synonyms)


def open_masks(args, data):
    """The pictures' masks if --explanations needs them, else None."""
    if "mask_mass" not in args.explanations:
        return None
    path = Path(args.data_folder, args.dataset, f"masks_{args.dataset}.hdf5")
    if not path.exists():
        raise InputError(f"{path} is missing: --explanations mask_mass needs a data set with masks, such as the demo")
    return Masks(path, args.split, len(data))


def main(args):
    processes.start()
    print_settings(args)
    check_flags(args)
    if args.compare:
        compare(args)
        return
    if args.references and args.predictions and args.dataset == "demo":
        args.dataset = "coco"       # whose object words count
    device = pick_device(args.device)
    if args.explanations:
        torch.set_num_threads(1)    # or the last digit would depend on the cores: torchrun uses them all
    set_seed(args.seed)
    save_path = make_folder(args.save_path)
    model, vocabulary, from_features = open_model(args, device) if args.weight else (None, None, False)
    boxes, objects = open_boxes(args)
    if model is None:
        captions, references = read_captions(args)
    else:
        data = open_data(args, model, from_features)
        study = partial(score_explanations, args, model, vocabulary, data, boxes=boxes, objects=objects,
                        masks=open_masks(args, data), device=device)
        sentences = caption_split(args, model, vocabulary, data, device)
        if processes.rank():    # the first process does the rest
            study(sentences)
            return
        captions, references = dict(zip(data.names, sentences, strict=True)), data.references
        if args.references:
            captions, references = other_references(args, captions)
    scorers = caption_scorers(args, captions, boxes, objects, device)
    write_json(save_path / f"predictions_{args.split}.json",
               [{"image": name, "caption": text} for name, text in captions.items()])
    metrics, each, problems = score_all(list(captions.values()), references, scorers)
    for name, problem in problems.items():
        print(f"warning: no {name}: {problem}", file=sys.stderr)
    if problems and not metrics:
        raise InputError("none of the scores could be had")
    if args.explanations:
        metrics |= study(sentences)
    if args.per_image:
        write_per_image(save_path / f"per_image_{args.split}.csv", captions, each)
    write_json(save_path / f"metrics_{args.split}.json", metrics)
    print(format_table({args.split: metrics}))
    print(f"{save_path}/metrics_{args.split}.json")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
