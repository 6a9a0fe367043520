"""Captions images and explains every word: python explain.py --images docs/figures/dahlia.jpg"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import hashlib
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning import checkpoint, cli, decoding, grounding, processes
from captioning.api import captions_of, contrast_id, encode_caption, explain_batch
from captioning.data.boxes import load_boxes, named_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.feature_store import open_features, weights_fingerprint
from captioning.data.images import preprocess, read_image
from captioning.data.predictions import read_captions_of
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.methods import METHODS, methods_for_regions
from captioning.files import check_file, fingerprint
from captioning.report.explained_image import as_pil
from captioning.report.explanations import choose_folders, is_explained, write_index
from captioning.runs import record_run

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def get_args_parser():
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("input").add_argument
    add("--weight", default=checkpoint.FLICKR8K,
        help="checkpoint of a captioning model (default: models/flickr8k.pth)")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--images", nargs="+", metavar="FILE_OR_FOLDER", help="images to caption and explain, "
        "rotated upright as their EXIF orientation specifies")
    add("--dataset", help="instead of --images: explain the images of a data set that "
        "preparedataset.py prepared")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--split", choices=["train", "val", "test"], default="test", help="split of the data set")
    add("--max_images", type=cli.positive_int, help="explain only the first images (default: all)")
    add("--skip_broken", action="store_true", help="exit with status 0 even if images had to be "
        "skipped because they or their captions cannot be read")

    group = parser.add_argument_group("explanation")
    add = group.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=["lrp", "attention"],
        help="explanation methods; lrp_specific: LRP of a word minus the mean of LRP of the "
        "caption's other words")
    add("--caption", help="explain this caption instead of the model's own")
    add("--captions", metavar="FILE", help="explain the captions of another system: a JSON list of "
        "{\"image\": file name, \"caption\": text}, or COCO results with \"image_id\"")
    add("--contrast", metavar="WORD", help="explain why the model prefers each word to this one: "
        "the difference of their logits")
    add("--eps", type=cli.non_negative, default=0.01, help="ε of LRP's ε-rule")
    add("--batch_size", type=cli.positive_int, default=8, help="images per batch")
    add("--chunk", type=cli.positive_int, help="words per backward pass through the encoder; fewer "
        "need less memory (default: 1 on a CPU, else all)")
    cli.add_device(group)
    cli.add_seed(group)

    cli.add_decoding(parser)

    add = parser.add_argument_group("output").add_argument
    add("--save_path", default="output/explanations", help="output folder: one folder per image, "
        "and an index.html of all explanations in it, those of earlier commands included; "
        "explaining an image again with other settings replaces its explanation")
    add("--shared_scale", action="store_true",
        help="draw all words of a caption on one colour scale, so that weak maps look weak")
    add("--quiet", action="store_true", help="print only the captions, without their words")
    add("--overwrite", action="store_true",
        help="also regenerate explanations that were made with the same settings")
    return parser


@dataclass
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
    for argument in map(Path, arguments):
        found = [argument]
        if argument.is_dir():
            found = sorted(path for path in argument.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"the folder {argument} contains no images ({', '.join(SUFFIXES)}): "
                             "check --images")
        if not argument.exists():
            raise InputError(f"the image {argument} does not exist: check --images")
        paths += found
    return list(dict.fromkeys(paths))


def find_targets(args, data):
    """The Targets that the flags name, with the captions that they give.

    data: the CaptionDataset of the images, or None for single images."""
    if data is None:
        targets = [Target(path) for path in find_images(args.images)]
    elif not data.image_folder:
        raise InputError(f"{data.path} was prepared without an image folder: run preparedataset.py "
                         "with --image_folder to explain its images")
    else:
        file = Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json")
        boxes = load_boxes(file) if file.exists() else {}
        targets = [Target(Path(data.image_folder, path), i, data.references[i],
                          boxes.get(data.names[i])) for i, path in enumerate(data.paths)]
    targets = targets[:args.max_images]

    given = {}
    if args.captions is not None:
        names = list(dict.fromkeys(target.path.name for target in targets))
        given = read_captions_of(args.captions, names)
    for target in targets:
        target.caption = given.get(target.path.name, args.caption)
    return targets


def caption_settings(args):
    """What the captions depend on besides the model."""
    if args.caption is not None or args.captions is not None:
        return {"captions": "given"}
    options = cli.decoding_options(args)
    method = options.pop("method")
    return {"captions": f"grounded {method}" if args.grounded else method} | options


def identify(targets, args, methods, model, vocabulary, calibrations, regions):
    """Sets the identity of each Target: a hash of all that its explanation depends on.

    An image that cannot be read has none: reading it reports that."""
    common = [weights_fingerprint(model), vocabulary.words, methods, args.contrast, args.eps,
              args.shared_scale, bool(args.images), caption_settings(args)]
    if args.decoding == "sample":
        common.append(args.seed)
    for calibration in calibrations:
        words = calibration and sorted(calibration.objects.words.items())
        common.append([calibration and calibration.threshold, words])
    if regions:
        state = os.stat(regions.features)
        common += [state.st_mtime_ns, state.st_size]
    common = fingerprint(common)
    for target in targets:
        try:
            check_file(target.path)
            content = hashlib.sha256(target.path.read_bytes()).hexdigest()
        except (OSError, InputError):
            continue
        own = [content, target.caption, list(target.references), target.boxes]
        target.identity = fingerprint([common, *own])


def read_regions(regions, targets, images):
    """Features (B, K, C) of the images' regions, and the boxes (n, 4) of those that are no padding.

    InputError if boxes exceed an image, which then has another size than when they were found."""
    indices = [target.index for target in targets]
    boxes = []
    all_boxes = regions.read_boxes(indices)                                            # (B, K, 4)
    counts = regions.region_counts(indices).tolist()
    for target, image, corners, n in zip(targets, images, all_boxes, counts, strict=True):
        sides = torch.tensor(image.shape[:0:-1])                                       # W, H
        if (corners[:, 2:] > 1.05 * sides).any():
            raise InputError(f"{regions.features} has regions beyond the image {target.path}: "
                             "restore the image in the size for which its features were computed")
        boxes.append(corners[:n].numpy())
    return regions.read_features(indices), boxes


def explain_all(args, methods, model, vocabulary, targets, regions, device):
    """Explains the Targets that have no explanation with these settings.

    regions: for models of region features the data set that has them, else None. Returns {path:
    InputError} of the images and captions that cannot be read.
    """
    calibration = grounding.load(args.weight, model)
    banning = None
    decode = partial(decoding.decode, **cli.decoding_options(args))
    if args.grounded:
        banning = grounding.load_for_decoding(args.weight, model)
        decode = partial(grounding.decode_grounded, calibration=banning, **decode.keywords)
    shown = {"checkpoint": args.weight, **caption_settings(args), "ε of LRP": args.eps}

    # what is left to do
    identify(targets, args, methods, model, vocabulary, [calibration, banning], regions)
    pending = [target for target in targets if args.overwrite
               or not is_explained(target.folder, target.identity)]
    if len(pending) < len(targets):
        print(f"{len(targets) - len(pending)} of {len(targets)} images are already explained")
    pending = processes.shard(pending)
    broken = {}
    steps = len(methods) + 1        # for each image: every method, then drawing
    bar = tqdm(total=len(pending) * steps, desc=f"explaining {len(pending)} images", unit="step",
               disable=processes.rank() > 0)

    for start in range(0, len(pending), args.batch_size):
        # read the images
        batch = []
        images = []
        for target in pending[start:start + args.batch_size]:
            try:
                if target.caption is not None:
                    of_image = f"the caption of {target.path.name}"
                    encode_caption(target.caption, vocabulary, of_image)
                images.append(read_image(target.path, upright=bool(args.images)))
                batch.append(target)
            except InputError as error:
                broken[target.path] = error
                bar.write(f"skipped: {error}")
                bar.update(steps)
        if not batch:
            continue
        boxes = None
        if regions:
            inputs, boxes = read_regions(regions, batch, images)
        else:
            size = checkpoint.image_size(model)
            inputs = torch.stack([preprocess(image, size) for image in images])
        inputs = inputs.to(device)

        # caption them, and explain the captions
        given = [target.caption for target in batch]
        seeds = decoding.image_seeds([target.identity for target in batch], args.seed)
        captions = captions_of(model, vocabulary, inputs, None if None in given else given,
                               partial(decode, seeds=seeds))
        results = explain_batch(model, vocabulary, inputs, captions, methods, args.contrast,
                                args.eps, args.chunk, calibration, boxes, bar.update)

        for target, image, explained in zip(batch, images, results, strict=True):
            names, corners = [], []
            if target.boxes:
                names, corners = named_boxes(target.boxes, image.shape[2], image.shape[1])
            explained = replace(
                explained, name=target.folder.name, image=as_pil(image),
                source=os.path.abspath(target.path), upright=bool(args.images),
                references=target.references, objects=names,
                object_boxes=np.array(corners, np.float32).reshape(-1, 4),
                shared_scale=args.shared_scale, settings=shown, identity=target.identity)
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
    cli.print_settings(args)
    device = pick_device(args.device)
    cli.set_seed(args.seed)
    if bool(args.images) == bool(args.dataset):
        raise InputError("give either --images FILE_OR_FOLDER … or --dataset NAME")
    if sum((args.caption is not None, args.captions is not None, args.grounded)) > 1:
        raise InputError("give at most one of --caption, --captions and --grounded")
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    if args.caption is not None:
        encode_caption(args.caption, vocabulary)
    if args.contrast is not None:
        contrast_id(args.contrast, vocabulary)

    data = regions = None
    methods = args.methods
    if model.encoder is None:
        if args.images:
            raise InputError(f"{args.weight} uses region features, not pixels: give --dataset "
                             "NAME, for which preparedataset.py --features bottom_up stored them")
        methods = methods_for_regions(methods, args.weight)
        data = regions = open_features(args.data_folder, args.dataset, args.split, model)
    elif args.dataset:
        data = CaptionDataset(args.data_folder, args.dataset, args.split)
    targets = find_targets(args, data)

    record_run(args.save_path, args, "explain.py")
    folders = choose_folders([target.path for target in targets], args.save_path)
    for target, folder in zip(targets, folders, strict=True):
        target.folder = folder
    processes.wait()        # the folders depend on those that exist
    broken = explain_all(args, methods, model, vocabulary, targets, regions, device)
    if processes.rank():
        return

    explained = [target.folder for target in targets if target.path not in broken]
    if not explained:
        raise InputError("none of the images can be read, so that there is nothing to explain: "
                         "check --images")
    write_index(args.save_path, explained)
    print(f"explanations: {args.save_path}/index.html")
    if broken and not args.skip_broken:
        raise InputError(f"{len(broken)} of {len(targets)} images were skipped, the others are "
                         f"explained; the first: {next(iter(broken.values()))} (--skip_broken "
                         "exits with status 0 all the same)")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
