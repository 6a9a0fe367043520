"""Captions a split and scores it: python evaluation.py --weight output/checkpoint_best.pth"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bert.bertscore import bert
from captioning import checkpoint, cli, grounding, processes
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.feature_store import open_features
from captioning.data.loader import make_loader
from captioning.data.predictions import ImageNames, read_predictions, read_references
from captioning.decoding import caption_batch, decode, image_seeds
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.experiments.batch import RANDOM, Study
from captioning.experiments.mask_mass import Masks
from captioning.experiments.registry import EXPERIMENTS, experiments_for_regions, metrics_of
from captioning.experiments.runner import run_experiments
from captioning.explanation.methods import METHODS, check_methods, methods_for_regions
from captioning.files import write_json
from captioning.metrics.object_metrics import chair, frequent_word_scores
from captioning.metrics.object_words import frequent_words, load_objects, stop_words
from captioning.metrics.score_table import format_table, score_all, write_per_image
from captioning.runs import record_run
from pycocoevalcap.caption_metrics import SCORERS, spice
from pycocoevalcap.spice_jar import find_corenlp

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "bert", "map", "chair")


def get_args_parser():
    parser = cli.Parser(__doc__)
    cli.add_device(parser)
    cli.add_threads(parser)
    cli.add_seed(parser)
    add = parser.add_argument_group("input", "either --weight or --predictions").add_argument
    add("--weight", metavar="CHECKPOINT", help="caption the split with this model and score its "
        "captions")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--prompt", metavar="TEXT", help="text that precedes captions, for models of transformers")
    add("--predictions", metavar="FILE", help="score these captions: a JSON list of {\"image\": "
        "file name, \"caption\": text}, or COCO results with \"image_id\"")
    add("--references", metavar="FILE", help="COCO captions file with the reference captions "
        "(default: those of the data set)")
    add("--partial", action="store_true", help="score only the images that --predictions or "
        "--references contains")
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", help="name of the prepared data set (default: demo, or coco if --predictions "
        "are scored against --references)")
    add("--data_folder", default="data", help="output folder of preparedataset.py")
    add("--split", choices=["train", "val", "test"], default="test", help="split to evaluate")
    add("--boxes", metavar="FILE", help="boxes of the objects in the images (default: "
        "boxes_<dataset>.json of the data set)")
    add("--batch_size", type=cli.positive_int, default=16, help="images per batch")
    cli.add_workers(group)
    cli.add_decoding(parser)
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics", nargs="+", choices=METRICS, help="metrics to compute (default: all whose "
        "requirements are met; spice requires CoreNLP, bert --bert_model)")
    add("--per_image", action="store_true", help="also write the scores of each image")
    add("--corenlp", metavar="FOLDER", help="spice: folder of Stanford CoreNLP 3.6.0, downloaded "
        "if missing (default: <data_folder>/corenlp)")
    add("--bert_model", metavar="NAME_OR_FOLDER", help="bert: model (default: roberta-large)")
    add("--bert_layer", type=cli.positive_int, help="bert: layer of the model (default: the one "
        "recommended by bert-score, otherwise the last)")
    add("--object_words", metavar="FILE", help="map: file of object words (default: the paper's "
        "lists for Flickr30K, also for Flickr8k, and COCO, otherwise all object words)")
    add("--synonyms", metavar="FILE", help="chair: file with one line per category: its name and "
        "its synonyms, separated by commas (default: captioning/metrics/coco_objects.txt)")
    add = parser.add_argument_group("explanations").add_argument
    add("--explanations", nargs="+", choices=list(EXPERIMENTS), default=[],
        help="experiments on the explanations")
    add("--methods", nargs="+", choices=[*METHODS, RANDOM], default=["lrp", "attention"],
        help="explanation methods to measure (default: lrp attention)")
    add("--calibrate", action="store_true", help="fit, to the validation split, estimates of "
        "whether the object that a word names is in the image, store them beside --weight, and "
        "measure them (--explanations grounding)")
    add("--max_images", type=cli.positive_int, help="explain only the first images that have a "
        "word to measure (default: all images)")
    add = parser.add_argument_group("output").add_argument
    add("--save_path", metavar="FOLDER", help="output folder (default: the folder of --weight or "
        "--predictions)")
    cli.add_renamed(parser, {"--compare": "python studies/compare.py RUN …"})
    return parser


def main(args):
    processes.start()
    args = complete(args)
    device = pick_device(args.device)
    cli.print_settings(args, get_args_parser(), device)
    if args.explanations:
        args.threads = args.threads or 1    # results must not depend on the number of cores
    cli.set_seed(args.seed)
    metrics = evaluate_model(args, device) if args.weight else evaluate_predictions(args, device)
    if processes.rank() == 0:
        path = Path(args.save_path, f"metrics_{args.split}.json")
        write_json(path, metrics)
        print(f"{format_table({args.split: metrics})}\n{path}")


def complete(args):
    """The flags with the defaults that depend on others; InputError if flags contradict."""
    args = Namespace(**vars(args))
    if bool(args.weight) == bool(args.predictions):
        raise InputError("give exactly one of --weight CHECKPOINT and --predictions FILE")
    for flag in ("explanations", "calibrate", "grounded"):
        if getattr(args, flag) and not args.weight:
            raise InputError(f"--{flag} requires --weight: captions without a model cannot be "
                             "explained")
    args.dataset = args.dataset or ("coco" if args.predictions and args.references else "demo")
    source = Path(args.weight or args.predictions)
    args.save_path = args.save_path or str(source if source.is_dir() else source.parent)
    return args


def evaluate_predictions(args, device):
    """The scores of the captions of --predictions."""
    boxes = open_boxes(args)
    objects = load_objects(args.data_folder, args.dataset, boxes, args.synonyms)
    if args.references:
        references, images = read_references(args.references)
    else:
        data = CaptionDataset(args.data_folder, args.dataset, args.split)
        references = dict(zip(data.names, data.references, strict=True))
        images = ImageNames(references)
    captions = read_predictions(args.predictions, list(references), images, args.partial)
    references = [references[name] for name in captions]
    record_run(args.save_path, args, "evaluation.py")
    return score_captions(args, captions, references, boxes, objects, device)


def evaluate_model(args, device):
    """Captions the split with --weight; the scores of the captions and of their explanations."""
    content = {} if checkpoint.is_pretrained(args.weight) else checkpoint.read(args.weight)
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap, content=content,
                                        prompt=args.prompt)
    cli.set_threads(args.threads, model)
    from_features = (content.get("training") or {}).get("from_features", False)
    methods = args.methods
    check_methods(model, methods, args.weight)
    if not content and "sanity" in args.explanations:
        raise InputError(f"sanity randomises layers of this project's models, and {args.weight} is "
                         "one of transformers: omit it from --explanations")
    experiments = list(dict.fromkeys(args.explanations + ["grounding"] * args.calibrate))
    if experiments and model.encoder is None:
        methods = methods_for_regions(methods, args.weight)
        experiments = experiments_for_regions(experiments, args.weight)

    # the images, and what is known about them
    boxes = open_boxes(args, [name for name in experiments if EXPERIMENTS[name].needs_boxes])
    objects = load_objects(args.data_folder, args.dataset, boxes, args.synonyms)
    frequent = set(frequent_words(args.dataset, objects, args.object_words))
    data = open_data(args, args.split, model, from_features)
    masks = None
    if "mask_mass" in experiments:
        path = Path(args.data_folder, args.dataset, f"masks_{args.dataset}.hdf5")
        masks = Masks(path, args.split, len(data))
    record_run(args.save_path, args, "evaluation.py")

    options = cli.decoding_options(args)
    batches = args.batch_size, args.workers, device
    # estimates are made for more words than CHAIR counts
    named = load_objects(args.data_folder, args.dataset, boxes, args.synonyms,
                         visible="grounding" in experiments)
    study = Study(model, vocabulary, tuple(methods), named, boxes, frequent, stop_words(), masks,
                  seed=args.seed)
    if args.calibrate:      # estimates are fitted to the captions of the validation split
        validation = open_data(args, "val", model, from_features)
        captions = caption_split(model, vocabulary, validation, partial(decode, **options),
                                 args.seed, *batches)
        run_experiments(replace(study, read_boxes=validation.read_boxes), validation, captions,
                        ["grounding"], None, *batches, args.save_path, ["val"])
        if processes.rank() == 0:
            grounding.calibrate(args.weight, model, study.objects, args.save_path,
                                validation.references)
        processes.wait()

    # the captions of the split; the first process scores them
    decoder = grounding.decoder(args.weight, model, args.grounded, options)
    generated = caption_split(model, vocabulary, data, decoder, args.seed, *batches)
    metrics = {}
    if processes.rank() == 0:
        captions = dict(zip(data.names, generated, strict=True))
        references = data.references
        if args.references:
            captions, references = match_references(captions, args.references, args.partial)
        metrics = score_captions(args, captions, references, boxes, objects, device)
    if not experiments:
        return metrics

    # the explanations of their words
    if "ablation" in experiments and "attention" in methods:
        print("attention assigns no relevance to the preceding words: word ablation omits it")
    study = replace(
        study, read_boxes=data.read_boxes,
        decode=lambda features: decoder(
            model, features, vocabulary, seeds=image_seeds(range(len(features)), args.seed)),
        calibration=grounding.load(args.weight, model) if "grounding" in experiments else None)
    if model.encoder is not None and any(EXPERIMENTS[name].needs_images for name in experiments):
        data = open_data(args, args.split, model, from_features=False)
    tables = run_experiments(study, data, generated, experiments, args.max_images, *batches,
                             args.save_path, [args.split, options, args.grounded])
    return metrics | metrics_of(tables)


# -- captions ----------------------------------------------------------------------------------


def caption_split(model, vocabulary, data, decoder, seed, batch_size, workers, device):
    """One caption per image of the split, generated by all processes together.

    decoder: `grounding.decoder`."""
    batches = [batch.tolist() for batch in torch.arange(len(data)).split(batch_size)]
    loader = make_loader(data, processes.shard(batches), workers, device)
    captions = []
    for batch in tqdm(loader, desc="captioning", unit="batch", disable=processes.rank() > 0):
        seeds = image_seeds(batch["index"].tolist(), seed)
        captions.append(caption_batch(model, batch["images"].to(device), vocabulary, False, device,
                                      decoder, seeds=seeds))
    return sum(processes.gather(captions), [])


def match_references(captions, path, partial):
    """Those of the captions {file name: caption} that have references in the COCO captions file
    `path`, and these references.

    Unless `partial` is set, all captions must have references."""
    references, images = read_references(path)
    references = {name: references.get(images.find(name)) for name in captions}
    missing = [name for name in captions if not references[name]]
    if len(missing) == len(captions) or (missing and not partial):
        raise InputError(f"{path} has no captions for {len(missing)} of the {len(captions)} images "
                         f"of the split, {missing[0]} first: give the captions file of this split, "
                         "or score the other images with --partial")
    captions = {name: caption for name, caption in captions.items() if references[name]}
    return captions, [references[name] for name in captions]


# -- the data set ------------------------------------------------------------------------------


def open_data(args, split, model, from_features):
    """The split with stored features, if there are some and it should, otherwise with images."""
    place = args.data_folder, args.dataset, split
    if checkpoint.is_pretrained(args.weight):
        return CaptionDataset(*place, prepare=model.prepare)
    stored = features_path(*place, model.config["encoder"] or "bottom_up")
    if model.encoder is None or (from_features and stored.exists()):
        return open_features(*place, model)
    return CaptionDataset(*place, image_size=checkpoint.image_size(model))


def open_boxes(args, experiments=()):
    """Boxes {file name: entry} of --boxes, by default those of the data set, or {} if it has none.

    experiments: those that require boxes."""
    path = Path(args.boxes or Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    boxes = load_boxes(path) if args.boxes or path.exists() else {}
    if experiments and not boxes:
        raise InputError(f"{path} is missing or empty: --explanations {experiments[0]} requires "
                         "boxes, give them with --boxes")
    return boxes


# -- scores ------------------------------------------------------------------------------------


def score_captions(args, captions, references, boxes, objects, device):
    """Writes predictions_<split>.json and, with --per_image, per_image_<split>.csv; returns the
    scores {key: number} of captions {file name: caption} with one list of references each.

    A metric that fails is reported in one sentence; InputError if all fail."""
    scorers = make_scorers(args, list(captions), boxes, objects, device)
    path = Path(args.save_path, f"predictions_{args.split}.json")
    if not args.predictions or path.resolve() != Path(args.predictions).resolve():
        write_json(path, [{"image": name, "caption": text} for name, text in captions.items()])
    metrics, per_caption, problems = score_all(list(captions.values()), references, scorers)
    for name, problem in problems.items():
        print(f"warning: no {name}: {problem}", file=sys.stderr)
    if problems and not metrics:
        raise InputError("none of the metrics could be computed (see the warnings above)")
    if args.per_image:
        path = Path(args.save_path, f"per_image_{args.split}.csv")
        write_per_image(path, captions, per_caption)
    return metrics


def make_scorers(args, names, boxes, objects, device):
    """{metric: function of captions and references} of --metrics, by default of all metrics whose
    requirements are met. names: of the images."""
    corenlp = args.corenlp or Path(args.data_folder, "corenlp")
    entries = [boxes.get(name) for name in names]
    has_boxes = any(entries)
    if args.boxes and not has_boxes:
        raise InputError(f"the boxes belong to other images, such as {next(iter(boxes))}, and none "
                         f"to {names[0]}: give the right file with --boxes")
    selected = args.metrics
    if not selected:
        is_available = {"bert": args.bert_model, "chair": has_boxes or not objects.exact,
                        "spice": args.corenlp or find_corenlp(corenlp)}
        selected = [name for name in METRICS if is_available.get(name, True)]
        print(f"metrics: {' '.join(selected)} (see --metrics for others)")
    if "chair" in selected and objects.exact and not has_boxes:
        raise InputError(f"{args.dataset} has no boxes, which decide which of its objects are "
                         "present: give them with --boxes, or leave chair out of --metrics")
    words = frequent_words(args.dataset, objects, args.object_words)
    scorers = SCORERS | {
        "spice": partial(spice, corenlp=corenlp),
        "bert": partial(bert, model=args.bert_model or "roberta-large", layer=args.bert_layer,
                        device=device),
        "map": lambda captions, references: (
            frequent_word_scores(captions, references, words), {}),
        "chair": partial(chair, entries=entries, objects=objects)}
    return {name: scorers[name] for name in METRICS if name in selected}


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
