"""Captions images and explains every word: python explain.py --images docs/figures/cat.jpg"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import contextlib
import copy
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning import checkpoint, cli, decoding, grounding, processes
from captioning.api import captions_of, encode_caption, explain_batch
from captioning.data.boxes import load_boxes, named_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.feature_store import open_features, weights_fingerprint
from captioning.data.images import SUFFIXES, images_in, read_image
from captioning.data.predictions import read_predictions
from captioning.data.vocabulary import tokenise
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.methods import METHODS, check_methods, methods_for_regions
from captioning.files import check_file, content_hash, fingerprint, read_json
from captioning.report.explained_image import as_pil
from captioning.report.explanations import choose_folders, is_explained, write_index
from captioning.report.heatmaps import MAP_SIZE
from captioning.report.page import check_page
from captioning.runs import record_run


def get_args_parser():
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("input").add_argument
    add("--weight", default=checkpoint.PHOTOGRAPHS, help="checkpoint of a captioning model, or a "
        "folder or name of one of transformers (default: models/photographs.pth)")
    add("--prompt", metavar="TEXT", help="text that precedes captions, for models of transformers")
    add("--compare_weight", nargs="+", default=[], metavar="WEIGHT", help="further models, whose "
        "explanations of the same images follow those of --weight on the page")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--images", nargs="+", metavar="FILE_OR_FOLDER", help="images to caption and explain, "
        "rotated upright as their EXIF orientation specifies")
    add("--dataset", help="instead of --images: a data set that preparedataset.py prepared")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--split", choices=["train", "val", "test"], default="test", help="split of the data set")
    add("--max_images", type=cli.positive_int, help="explain only the first images (default: all)")
    add("--skip_broken", action="store_true", help="exit with status 0 even if images or captions "
        "had to be skipped as unreadable")

    group = parser.add_argument_group("explanation")
    add = group.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=["lrp", "attention"],
        help="explanation methods (default: lrp attention)")
    add("--caption", help="explain this caption instead of the model's own")
    add("--captions", metavar="FILE", help="explain what --weight would have said about the "
        "captions of another system, not why that system said them: a JSON list of "
        "{\"image\": file name, \"caption\": text}, or COCO results with \"image_id\"")
    add("--contrast", metavar="WORD", help="explain why the model prefers each word to this one: "
        "the difference of their logits")
    add("--eps", type=cli.non_negative,
        help="ε of LRP's ε-rule (default: 0.01, for models of transformers 0)")
    add("--batch_size", type=cli.positive_int, help="images per batch (default: 1 on a CPU, so "
        "that the first result comes soon, else 8)")
    add("--chunk", type=cli.positive_int, help="words per backward pass through the encoder; fewer "
        "need less memory (default: 1 on a CPU, else all)")
    cli.add_device(group)
    cli.add_threads(group)
    cli.add_seed(group)

    cli.add_decoding(parser)

    add = parser.add_argument_group("output").add_argument
    add("--save_path", default="output/explanations", help="output folder: one folder per image, "
        "and an index.html of all explanations in it, those of earlier commands included")
    add("--shared_scale", action="store_true", help="draw all words of a caption on one colour "
        "scale, so that weak maps look weak")
    add("--map_size", type=cli.number(int, 50, 2000), default=MAP_SIZE, help="width in pixels of "
        "each map in the PNGs: 600 suits print")
    add("--quiet", action="store_true", help="print only the captions, without their words")
    add("--overwrite", action="store_true", help="also regenerate explanations that were made with "
        "the same settings")
    return parser


@dataclass(eq=False)        # each is an image of its own, and can be in a set
class Target:
    """An image to explain."""
    path: Path
    index: int = 0              # its position in the data set
    references: list = ()
    boxes: dict | None = None   # an entry of load_boxes
    caption: str | None = None  # None: the model's own
    folder: Path | None = None
    identity: str = ""          # hash of all that its explanation depends on


def find_images(arguments):
    """Paths of the files given and of the images in the folders given, sorted by name."""
    paths = []
    for path in map(Path, arguments):
        if path.is_dir():
            found = images_in(path)
        else:
            check_file(path, "check --images")
            found = [path]
        if not found:
            raise InputError(f"the folder {path} contains no images ({', '.join(SUFFIXES)}): "
                             "check --images")
        paths += found
    return list(dict.fromkeys(paths))


def find_targets(args, data, name=""):
    """The Targets that the flags name. data: the CaptionDataset of --dataset, or None; name: of the
    model, if several are compared."""
    if data is None:
        targets = [Target(path) for path in find_images(args.images)]
    else:
        file = Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json")
        boxes = load_boxes(file) if file.exists() else {}
        targets = [Target(Path(data.image_folder, path), i, data.references[i],
                          boxes.get(data.names[i])) for i, path in enumerate(data.paths)]
    targets = targets[:args.max_images]

    given = {}
    if args.captions is not None:
        names = [target.path.name for target in targets]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(f"--captions names files, but several images are called {twice[0]}: "
                             "explain them one after the other")
        given = read_predictions(args.captions, names, others=True)
    folders = choose_folders([target.path for target in targets], args.save_path, name)
    for target, folder in zip(targets, folders, strict=True):
        target.caption = given.get(target.path.name, args.caption)
        target.folder = folder
    return targets


def caption_settings(args):
    """What the captions depend on besides the model."""
    if args.caption is not None or args.captions is not None:
        return {"captions": "given"}
    grounded = "grounded " if args.grounded else ""
    options = cli.decoding_options(args)
    return {"captions": grounded + options.pop("method")} | options


def identify(targets, args, model, vocabulary, regions):
    """Sets the identity of each Target; an image that cannot be read has none."""
    common = [weights_fingerprint(model), vocabulary.words, args.methods, args.contrast, args.eps,
              args.shared_scale, bool(args.images), caption_settings(args), args.prompt]
    if args.decoding == "sample":
        common.append(args.seed)
    common.append(args.map_size)
    calibration = grounding.calibration_path(args.weight)
    common.append(read_json(calibration) if calibration.exists() else None)
    common = fingerprint(common)
    for target in targets:
        # reading the image later reports why it cannot be read
        with contextlib.suppress(InputError):
            own = [content_hash(target.path), target.caption, list(target.references), target.boxes]
            if regions:
                own.append(regions.content_hash(target.index))
            target.identity = fingerprint([common, *own])


def read_regions(regions, targets, images):
    """Features (B, K, C) of the images' regions, and the boxes (n, 4) of those without padding."""
    indices = [target.index for target in targets]
    counts = regions.region_counts(indices).tolist()
    boxes = [corners[:n].numpy()
             for corners, n in zip(regions.read_boxes(indices), counts, strict=True)]
    for target, image, corners in zip(targets, images, boxes, strict=True):
        # an image of another size than when its features were computed
        if (corners[:, 2:] > 1.05 * np.array(image.shape[:0:-1])).any():
            raise InputError(f"{regions.features} has regions beyond the image {target.path}: "
                             "restore the image in the size for which its features were computed")
    return regions.read_features(indices), boxes


def read_targets(targets, args, model, vocabulary, as_unknown):
    """[(Target, its image, what the model sees of it)], and {path: InputError} of the others.

    as_unknown: captions may have words that the model does not know."""
    read = []
    errors = {}
    for target in targets:
        try:
            if target.caption is not None:
                encode_caption(target.caption, vocabulary, f"the caption of {target.path.name}",
                               as_unknown)
            image = read_image(target.path, upright=bool(args.images))
            read.append((target, image, model.window(*image.shape[:0:-1])))
        except InputError as error:
            errors[target.path] = error
    return read, errors


def explain_all(args, model, vocabulary, targets, regions, name=""):
    """Explains the Targets that have no explanation with these settings.

    regions: the data set with region features, or None; name: of the model, if several are
    compared. Returns {path: InputError} of the images and captions that cannot be read."""
    calibration = grounding.load(args.weight, model)
    # words outside the vocabulary; a tokenizer of transformers has no common way for them
    as_unknown = args.captions is not None and not checkpoint.is_pretrained(args.weight)
    decode = grounding.decoder(args.weight, model, args.grounded, cli.decoding_options(args))
    eps = model.eps if args.eps is None else args.eps
    shown = {"checkpoint": args.weight, **caption_settings(args), "ε of LRP": eps}
    if args.prompt is not None:
        shown["prompt"] = args.prompt

    # what is left to do
    identify(targets, args, model, vocabulary, regions)
    pending = {target for target in targets if args.overwrite
               or not is_explained(target.folder, target.identity)}
    if len(pending) < len(targets):
        print(f"{len(targets) - len(pending)} of {len(targets)} images are already explained")
    # whole batches, since the last digits depend on what else is in a batch
    batches = [targets[i:i + args.batch_size] for i in range(0, len(targets), args.batch_size)]
    batches = processes.shard([batch for batch in batches if not pending.isdisjoint(batch)])
    broken = {}
    steps = len(args.methods) + 1       # for each image: every method, then drawing
    bar = tqdm(total=sum(map(len, batches)) * steps, desc=f"explaining {len(pending)} images",
               unit="step", disable=processes.rank() > 0)

    for selected in batches:
        read, errors = read_targets(selected, args, model, vocabulary, as_unknown)
        broken |= errors
        for error in errors.values():
            bar.write(f"skipped: {error}")
            bar.update(steps)
        if not read:
            continue
        batch, images, windows = zip(*read, strict=True)
        boxes = None
        if regions:
            inputs, boxes = read_regions(regions, batch, images)
        else:
            inputs = torch.stack([model.prepare(image) for image in images])
        inputs = inputs.to(model.device)

        # caption them, and explain the captions
        texts = None if batch[0].caption is None else [target.caption for target in batch]
        seeds = decoding.image_seeds([target.identity for target in batch], args.seed)
        captions = captions_of(model, vocabulary, inputs, texts, partial(decode, seeds=seeds),
                               as_unknown)
        results = explain_batch(model, vocabulary, inputs, captions, args.methods, args.contrast,
                                eps, args.chunk, calibration, boxes, bar.update)
        for target, image, window, explained in zip(batch, images, windows, results, strict=True):
            if target not in pending:
                bar.update()
                continue
            if unknown := vocabulary.unknown(target.caption or ""):     # shown by its own words
                for t, word in enumerate(tokenise(target.caption)):
                    explained.words[t] = f"{word}[unk]" if word in unknown else word
                bar.write(f"{target.path.name}: explained as <unk>, since the model does not know "
                          f"them: {', '.join(unknown)}")
            if target.boxes:
                explained.objects, corners = named_boxes(target.boxes, *image.shape[:0:-1])
                explained.object_boxes = np.array(corners, np.float32).reshape(-1, 4)
            explained = replace(
                explained, name=target.folder.name, image=as_pil(image), window=window,
                source=os.path.abspath(target.path), upright=bool(args.images),
                references=target.references, shared_scale=args.shared_scale, settings=shown,
                map_size=args.map_size, identity=target.identity, model=name)
            explained.save(target.folder, with_page=False)
            table = "" if args.quiet else f"\n{explained.table()}"
            bar.write(f"{target.path.name}: {explained.caption}{table}")
            bar.update()
    bar.close()
    for others in processes.gather_each(broken):
        broken |= others
    return broken


def main(args):
    processes.start()
    device = pick_device(args.device)
    cli.print_settings(args, get_args_parser(), device)
    args.batch_size = args.batch_size or (1 if device.type == "cpu" else 8)
    cli.set_seed(args.seed)
    if bool(args.images) == bool(args.dataset):
        raise InputError("give either --images FILE_OR_FOLDER … or --dataset NAME")
    if sum((args.caption is not None, args.captions is not None, args.grounded)) > 1:
        raise InputError("give at most one of --caption, --captions and --grounded")
    weights = [args.weight, *args.compare_weight]
    for weight in args.compare_weight:      # before the first model explains everything
        if not checkpoint.is_pretrained(weight):
            check_file(weight, "check --compare_weight")
    names = [""] if len(weights) == 1 else [
        f"{number}_{Path(weight).stem}" for number, weight in enumerate(weights, start=1)]
    broken = {}
    folders = []        # of the images, one list for each model; None: not explained
    for weight, name in zip(weights, names, strict=True):
        targets, own = explain_with(copy.copy(args), weight, name, device)
        broken |= own
        folders.append([None if target.path in own else target.folder for target in targets])
    if processes.rank():
        return
    if not any(map(any, folders)):
        raise InputError("none of the images can be explained; the first: "
                         f"{next(iter(broken.values()))}")
    in_turn = []        # each image's explanations of all models
    for same in zip(*folders, strict=True):
        in_turn += filter(None, same)
    write_index(args.save_path, in_turn)
    print(f"explanations: {args.save_path}/index.html")
    if broken and not args.skip_broken:
        raise InputError(f"{len(broken)} of {len(targets)} images were skipped, the others are "
                         f"explained; the first: {next(iter(broken.values()))} (--skip_broken "
                         "exits with status 0 all the same)")


def explain_with(args, weight, name, device):
    """Explains the images with one model -> its Targets, {path: InputError} of those skipped."""
    args.weight = weight
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap, prompt=args.prompt)
    cli.set_threads(args.threads, model)
    check_methods(model, args.methods, args.weight)
    if args.caption is not None:
        encode_caption(args.caption, vocabulary)

    data = regions = None
    if model.encoder is None:
        if args.images:
            raise InputError(f"{args.weight} uses region features, not pixels: give --dataset "
                             "NAME, for which preparedataset.py --features bottom_up stored them")
        args.methods = methods_for_regions(args.methods, args.weight)
        data = regions = open_features(args.data_folder, args.dataset, args.split, model)
    elif args.dataset:
        data = CaptionDataset(args.data_folder, args.dataset, args.split)
    if data and not data.image_folder:
        raise InputError(f"{data.path} was prepared without an image folder: run preparedataset.py "
                         "with --image_folder to explain its images")

    targets = find_targets(args, data, name)
    check_page(args.save_path)
    record_run(args.save_path, args, "explain.py")
    processes.wait()        # the targets' folders depend on those that exist
    return targets, explain_all(args, model, vocabulary, targets, regions, name)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
