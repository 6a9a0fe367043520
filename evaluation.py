"""Captions a split and scores the captions: python evaluation.py --weight output/checkpoint_best.pth --dataset demo"""
from pathlib import Path

import torch
from tqdm import tqdm

from captioning import checkpoint, processes
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
from captioning.dataset import CaptionDataset, features_path
from captioning.decoding import decode
from captioning.errors import InputError, run_script
from captioning.explained import METHODS, Study
from captioning.explanation_scores import EXPERIMENTS, NEED_BOXES, score
from captioning.files import make_folder, read_json, write_json
from captioning.localisation import Masks
from captioning.objects import frequent_words, hallucination, load_boxes, load_objects, mean_precision, stop_words
from captioning.training import caption_batch, make_loader

METRICS = ("bleu", "rouge_l", "cider", "map", "chair")


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weight", help="checkpoint of a captioning model")
    add("--predictions", metavar="FILE", help="score these captions instead: [{\"image\": name, \"caption\": text}, …]")
    add("--dataset", default="demo", help="name of a data set that preparedataset.py made")
    add("--data_folder", default="data", help="where preparedataset.py wrote it")
    add("--split", choices=["train", "val", "test"], default="test", help="which pictures")
    add("--decoding", choices=["greedy", "beam_search", "diverse_beam_search"], default="beam_search",
        help="how captions are found")
    add("--beam_size", type=positive_int, default=3, help="hypotheses a picture")
    add("--diversity", type=non_negative, default=0.5, help="penalty of diverse_beam_search")
    add("--max_len", type=positive_int, default=50, help="words at most")
    add("--metrics", nargs="+", choices=METRICS, help="scores; by default all, and chair if there are boxes")
    add("--explanations", nargs="+", choices=list(EXPERIMENTS), default=[], help="measures of explanations")
    add("--methods", nargs="+", choices=METHODS, default=["lrp", "attention"], help="explanations to measure")
    add("--max_images", type=positive_int, help="explain only so many pictures, the first")
    add("--boxes", metavar="FILE", help="boxes of the pictures' objects; by default boxes_<dataset>.json")
    add("--object_words", metavar="FILE", help="words of the metric map; by default the paper's lists for Flickr30K "
        "and COCO, else all objects' words")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--batch_size", type=positive_int, default=16, help="pictures at once")
    add("--workers", type=natural, default=2, help="processes that read pictures")
    add("--save_path", default="output", help="folder of predictions, metrics and plots")
    add_device(parser)
    add_seed(parser)
    return parser


def open_data(args, model, from_features):
    """The split: captions alone without a model, stored features if the model was trained on them, else pictures."""
    split = args.data_folder, args.dataset, args.split
    if model is None:
        return CaptionDataset(*split)
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


def read_predictions(path, names):
    """Captions in the order of `names`; InputError for anything but one caption for each of them."""
    captions = {}
    content = read_json(path)
    for item in content if isinstance(content, list) else [None]:
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("image", "caption")):
            raise InputError(f"{path} must hold a list of {{\"image\": file name, \"caption\": text}}")
        if item["image"] in captions:
            raise InputError(f"{path} has more than one caption for {item['image']}: leave one")
        captions[item["image"]] = item["caption"]
    odd = sorted(set(names) ^ captions.keys())
    if odd:
        reason = "is not in the split" if odd[0] in captions else "has no caption"
        raise InputError(f"{path} does not fit the split: {odd[0]} {reason}")
    return [captions[name] for name in names]


def open_pictures(args, model):
    """The split with pictures of the model's size, also where it captions stored features."""
    return CaptionDataset(args.data_folder, args.dataset, args.split, image_size=checkpoint.image_size(model))


def make_study(args, model, vocabulary, boxes, objects, masks):
    frequent = set(frequent_words(args.dataset, objects, args.object_words))
    return Study(model, vocabulary, tuple(args.methods), objects, boxes, frequent, stop_words(), masks,
                 lambda features: decode(model, features, vocabulary, **decoding_options(args)), args.seed)


def score_explanations(args, model, vocabulary, data, captions, boxes, objects, masks, device):
    """Tables and plots of --explanations; returns what metrics_<split>.json takes over."""
    if not args.explanations:
        return {}
    pictures = open_pictures(args, model)
    study = make_study(args, model, vocabulary, boxes, objects, masks)
    if "ablation" in args.explanations and "attention" in args.methods:
        print("attention gives the words read no relevance: word ablation leaves it out")
    tables = score(study, pictures, captions[:args.max_images], args.explanations, args.batch_size, args.workers,
                   device, args.save_path, [args.split, decoding_options(args)])
    if not tables or not tables.get("correctness"):
        return {}
    table = tables["correctness"]
    found = {f"inside_box_{method}": table[method, "0.0"].mean for method in args.methods}
    return found | {"box_share": table["box", "0.0"].mean, "explained_words": table["box", "0.0"].count}


def check_flags(args):
    if bool(args.weight) == bool(args.predictions):
        raise InputError("give either --weight CHECKPOINT or --predictions FILE")
    if args.explanations and not args.weight:
        raise InputError("--explanations needs --weight: captions alone cannot be explained")


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
    needs = next((f"--explanations {name}" for name in args.explanations if name in NEED_BOXES),
                 "--metrics chair" if "chair" in (args.metrics or ()) else None)
    if needs and not boxes:
        raise InputError(f"{path} is missing or empty: {needs} needs boxes, name them with --boxes")
    return boxes, load_objects(args.data_folder, args.dataset, boxes)


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
    device = processes.own_device(pick_device(args.device))
    set_seed(args.seed)
    save_path = make_folder(args.save_path)
    model, vocabulary, from_features = open_model(args, device) if args.weight else (None, None, False)
    data = open_data(args, model, from_features)
    boxes, objects = open_boxes(args)
    masks = open_masks(args, data)
    if model is None:
        captions = read_predictions(args.predictions, data.names)
    else:
        captions = caption_split(args, model, vocabulary, data, device)
        if processes.rank():    # the first process does the rest
            score_explanations(args, model, vocabulary, data, captions, boxes, objects, masks, device)
            return
        write_json(save_path / f"predictions_{args.split}.json",
                   [{"image": name, "caption": text} for name, text in zip(data.names, captions, strict=True)])
    from pycocoevalcap.scores import scores
    wanted = args.metrics or METRICS
    metrics = scores(captions, data.references, wanted)
    if "map" in wanted:
        metrics |= mean_precision(captions, data.references, frequent_words(args.dataset, objects, args.object_words))
    if "chair" in wanted and boxes:
        metrics |= hallucination(captions, data.references, [boxes.get(name) for name in data.names], objects)
    metrics |= score_explanations(args, model, vocabulary, data, captions, boxes, objects, masks, device)
    write_json(save_path / f"metrics_{args.split}.json", metrics)
    for name, value in metrics.items():
        print(f"{name:28}{value:8.3f}")
    print(f"{save_path}/metrics_{args.split}.json")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
