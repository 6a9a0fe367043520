"""Captions a split and scores the captions: python evaluation.py --weight output/checkpoint_best.pth --dataset demo"""
import csv
import io
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bert.score import bert_score
from captioning import checkpoint
from captioning.cli import (
    Parser,
    add_device,
    add_seed,
    natural,
    non_negative,
    pick_device,
    positive_int,
    print_settings,
    set_seed,
)
from captioning.correctness import THRESHOLDS, explained, pixel_maps, share_inside, word_boxes
from captioning.dataset import CaptionDataset, features_path
from captioning.errors import InputError, run_script
from captioning.files import make_folder, read_json, write_json, write_text
from captioning.objects import (
    frequent_words,
    hallucination,
    load_boxes,
    load_objects,
    mean_precision,
    named_and_present,
)
from captioning.plots import draw_comparison, draw_correctness
from captioning.predictions import image_ids, read_predictions, read_references
from captioning.scoring import score_all, table, write_per_image
from captioning.training import caption_batch, make_loader
from pycocoevalcap.scores import SCORERS, spice
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
    add("--explanations", nargs="+", choices=["correctness"], default=[], help="measures of explanations")
    add("--methods", nargs="+", choices=["lrp", "gradient", "grad_cam", "guided_backprop", "guided_grad_cam",
                                         "attention"], default=["lrp", "attention"], help="explanations to measure")
    add("--max_images", type=positive_int, help="explain only so many pictures")
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
    options = {"method": args.decoding, "max_len": args.max_len}
    if args.decoding != "greedy":
        options["beam_size"] = args.beam_size
    if args.decoding == "diverse_beam_search":
        options["diversity"] = args.diversity
    batches = [batch.tolist() for batch in torch.arange(len(data)).split(args.batch_size)]
    captions = []
    for batch in tqdm(make_loader(data, batches, args.workers, device), desc="captioning", unit="batch"):
        captions += caption_batch(model, batch["images"].to(device), vocabulary, False, device, **options)
    return captions


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


def correctness(args, model, vocabulary, data, captions, boxes, objects, device):
    """{method: shares inside the box (words, thresholds)} and the boxes' shares of the picture (words,); None if no
    caption names an object of its picture."""
    size = checkpoint.image_size(model)
    pictures = CaptionDataset(args.data_folder, args.dataset, args.split, image_size=size)
    words = [caption.split() for caption in captions]
    correct = [[(t, category) for t, category in objects.named(sentence) if category in entry.get("categories", {})]
               for sentence, entry in zip(words, (boxes.get(name, {}) for name in data.names), strict=True)]
    chosen = [i for i, found in enumerate(correct) if found][:args.max_images]
    shares, areas = {method: [] for method in args.methods}, []
    batches = [chosen[i:i + args.batch_size] for i in range(0, len(chosen), args.batch_size)]
    for batch in tqdm(make_loader(pictures, batches, args.workers, device), desc="correctness", unit="batch"):
        indices, images = batch["index"].tolist(), batch["images"].to(device)
        rows, steps, corners = [], [], []
        for b, i in enumerate(indices):
            for t, category in correct[i]:
                rows.append(b)
                steps.append(t)
                corners.append(word_boxes(boxes[data.names[i]], category))
        corners = torch.nn.utils.rnn.pad_sequence(corners, batch_first=True, padding_value=float("nan")).to(device)
        encoded = [torch.tensor(vocabulary.encode(words[i], len(words[i]))) for i in indices]
        encoded = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True).to(device)
        for method in args.methods:
            maps = pixel_maps(explained(model, images, encoded, method), method, (size, size))[rows, steps]
            inside, area = share_inside(maps, corners.to(maps.dtype))
            shares[method].append(inside.cpu())
        areas.append(area.cpu())        # the boxes are the same for every method
    if not areas:
        return None
    return {method: torch.cat(parts) for method, parts in shares.items()}, torch.cat(areas)


def report_correctness(args, shares, areas):
    """correctness_<split>.csv and .png; returns what metrics_<split>.json takes over."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "threshold", "share_inside_box", "box_share_of_picture", "words"])
    means = {method: values.mean(0).tolist() for method, values in shares.items()}
    for method, values in means.items():
        writer.writerows([method, tau, f"{value:.4f}", f"{areas.mean():.4f}", len(areas)]
                         for tau, value in zip(THRESHOLDS, values, strict=True))
    write_text(Path(args.save_path) / f"correctness_{args.split}.csv", text.getvalue())
    draw_correctness(Path(args.save_path) / f"correctness_{args.split}.png", THRESHOLDS, means, areas.mean().item())
    found = {f"inside_box_{method}": values[0] for method, values in means.items()}
    return found | {"box_share": areas.mean().item(), "explained_words": len(areas)}


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
        "map": lambda captions, references: (mean_precision(captions, references, words), {}),
        "chair": lambda captions, references: chair(captions, references, entries, objects)}
    return {name: every[name] for name in METRICS if name in wanted}


def bert(captions, references, **options):
    each = bert_score(captions, references, **options)
    return {"bert": sum(each) / len(each)}, {"bert": each}


def chair(captions, references, entries, objects):
    found = list(named_and_present(captions, references, entries, objects))
    invented = [sorted(set(named) - there) for there, named in found]
    return hallucination(captions, references, entries, objects), {
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
    print(f"{table(runs)}\n{path}")


def open_model(args, device):
    """(model, vocabulary, whether it was trained on stored features) of --weight."""
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    if args.explanations and model.encoder is None:
        raise InputError(f"{args.weight} works on region features, not on pictures: --explanations needs a model "
                         "with a CNN encoder")
    training = checkpoint.read(args.weight).get("training") or {}
    return model, vocabulary, training.get("from_features", False)


def open_boxes(args):
    """Boxes {file name: entry}, empty if there are none, and the data set's Objects."""
    path = Path(args.boxes or Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    boxes = load_boxes(path) if args.boxes or path.exists() else {}
    needs = "--explanations correctness" if args.explanations else "--metrics chair" if "chair" in (
        args.metrics or ()) else None
    if needs and not boxes:
        raise InputError(f"{path} is missing or empty: {needs} needs boxes, name them with --boxes")
    return boxes, load_objects(args.data_folder, args.dataset, boxes, args.synonyms)


def main(args):
    print_settings(args)
    check_flags(args)
    if args.compare:
        compare(args)
        return
    if args.references and args.predictions and args.dataset == "demo":
        args.dataset = "coco"       # whose object words count
    device = pick_device(args.device)
    set_seed(args.seed)
    save_path = make_folder(args.save_path)
    model, vocabulary, from_features = open_model(args, device) if args.weight else (None, None, False)
    boxes, objects = open_boxes(args)
    if model is None:
        captions, references = read_captions(args)
    else:
        data = open_data(args, model, from_features)
        sentences = caption_split(args, model, vocabulary, data, device)
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
    if "correctness" in args.explanations:
        measured = correctness(args, model, vocabulary, data, sentences, boxes, objects, device)
        if measured is None:
            print("no caption names an object that is in its picture: there is no correctness to measure")
        else:
            metrics |= report_correctness(args, *measured)
    if args.per_image:
        write_per_image(save_path / f"per_image_{args.split}.csv", captions, each)
    write_json(save_path / f"metrics_{args.split}.json", metrics)
    print(table({args.split: metrics}))
    print(f"{save_path}/metrics_{args.split}.json")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
