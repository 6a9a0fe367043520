"""Captions images and explains every word: python explain.py --images docs/figures/dahlia.jpg"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning import checkpoint, decoding, grounding, processes
from captioning.cli import (
    Parser,
    add_decoding,
    add_device,
    add_seed,
    decoding_options,
    non_negative,
    positive_int,
    print_settings,
    set_seed,
)
from captioning.data.boxes import load_boxes, named_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.feature_store import open_features, weights_fingerprint
from captioning.data.images import preprocess, read_image
from captioning.data.predictions import read_captions_of
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.arrays import (
    captions_to_explain,
    contrast_id,
    encode_caption,
    explain_batch,
    without_padded_regions,
)
from captioning.explanation.methods import METHODS, methods_for_regions
from captioning.files import check_file, fingerprint
from captioning.report.console import describe
from captioning.report.explanations import choose_folders, is_explained, write_explanation, write_index
from captioning.runs import record_run

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("input").add_argument
    add("--weight", default=checkpoint.FLICKR8K, help="checkpoint of a captioning model (default: models/flickr8k.pth)")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--images", nargs="+", metavar="FILE_OR_FOLDER", help="images to caption and explain, rotated upright as their "
        "EXIF orientation specifies")
    add("--dataset", help="instead of --images: explain the images of a data set that preparedataset.py prepared")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--split", choices=["train", "val", "test"], default="test", help="split of the data set")
    add("--max_images", type=positive_int, help="explain only the first images (default: all)")
    add("--skip_broken", action="store_true", help="exit with status 0 even if images had to be skipped because they "
        "or their captions cannot be read")

    group = parser.add_argument_group("explanation")
    add = group.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=["lrp", "attention"], help="explanation methods; "
        "lrp_specific: LRP of a word minus the mean of LRP of the caption's other words")
    add("--caption", help="explain this caption instead of the model's own")
    add("--captions", metavar="FILE", help="explain the captions of another system: a JSON list of {\"image\": file "
        "name, \"caption\": text}, or COCO results with \"image_id\"")
    add("--contrast", metavar="WORD", help="explain why the model prefers each word to this one: the difference of "
        "their logits")
    add("--eps", type=non_negative, default=0.01, help="ε of LRP's ε-rule")
    add("--batch_size", type=positive_int, default=8, help="images per batch")
    add("--chunk", type=positive_int, help="words per backward pass through the encoder; fewer need less memory "
        "(default: 1 on a CPU, else all)")
    add_device(group)
    add_seed(group)

    add_decoding(parser)

    add = parser.add_argument_group("output").add_argument
    add("--save_path", default="output/explanations", help="output folder: one folder per image, and an index.html of "
        "all explanations in it, those of earlier commands included; explaining an image again with other settings "
        "replaces its explanation")
    add("--shared_scale", action="store_true", help="draw all words of a caption on one colour scale, so that weak "
        "maps look weak")
    add("--quiet", action="store_true", help="print only the captions, without their words")
    add("--overwrite", action="store_true", help="also regenerate explanations that were made with the same settings")
    return parser


# -- input -------------------------------------------------------------------------------------------------------------


def find_images(arguments):
    """Paths of the files given and of the images in the folders given, sorted by name within each folder."""
    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            images = sorted(path for path in argument.iterdir() if path.suffix.lower() in SUFFIXES)
            if not images:
                raise InputError(f"the folder {argument} contains no images ({', '.join(SUFFIXES)}): check --images")
            paths += images
        elif argument.exists():
            paths.append(argument)
        else:
            raise InputError(f"the image {argument} does not exist: check --images")
    return list(dict.fromkeys(paths))


def split_images(data_folder, dataset, split):
    """{path: (references, boxes)} of the images of a data set's split; boxes: an entry of load_boxes, or None."""
    data = CaptionDataset(data_folder, dataset, split)
    if not data.image_folder:
        raise InputError(f"{data.path} was prepared without an image folder: run preparedataset.py with "
                         "--image_folder to explain its images")
    boxes = Path(data_folder, dataset, f"boxes_{dataset}.json")
    boxes = load_boxes(boxes) if boxes.exists() else {}
    return {Path(data.image_folder, path): (references, boxes.get(name))
            for path, name, references in zip(data.paths, data.names, data.references, strict=True)}


def annotation_arrays(annotations, image):
    """The arrays of explanation.npz from a value of `split_images`. image: (3, H, W)."""
    references, boxes = annotations
    if boxes is None:
        return {"references": np.array(references)}
    names, corners = named_boxes(boxes, image.shape[2], image.shape[1])
    return {"references": np.array(references), "objects": np.array(names, str),
            "object_boxes": np.array(corners, np.float32).reshape(-1, 4)}


def read_regions(regions, indices, paths, images):
    """Features (B, K, C), boxes (B, K, 4) and numbers of regions (B,) of the images at `indices` of the data set.

    Raises InputError if boxes exceed an image: then the image has another size than when its features were computed.
    """
    boxes = regions.read_boxes(indices)
    sides = torch.tensor([image.shape[:0:-1] for image in images])                     # (B, 2): W, H
    exceeding = (boxes[..., 2:] > 1.05 * sides[:, None]).any(2).any(1).nonzero().flatten().tolist()
    if exceeding:
        raise InputError(f"{regions.features} has regions beyond the image {paths[exceeding[0]]}: restore the image in "
                         "the size for which its features were computed")
    return regions.read_features(indices), boxes, regions.region_counts(indices)


# -- the loop over images ----------------------------------------------------------------------------------------------


def settings_of(args, methods, model, regions, calibration=None):
    """Everything that an explanation depends on besides its image and a given caption, of JSON types."""
    settings = [weights_fingerprint(model), methods, args.contrast, args.eps, is_upright(args), args.shared_scale,
                calibration and calibration.threshold, os.stat(regions.features).st_mtime_ns if regions else None]
    if args.caption is None and args.captions is None:
        settings += [decoding_options(args), args.grounded, args.seed if args.decoding == "sample" else None]
    return settings


def shown_settings(args):
    """The settings that the page states, as JSON."""
    if args.caption is None and args.captions is None:
        captions = {"captions": f"grounded {args.decoding}" if args.grounded else args.decoding}
        captions |= {name: value for name, value in decoding_options(args).items() if name != "method"}
    else:
        captions = {"captions": "given"}
    return json.dumps({"checkpoint": args.weight, **captions, "ε of LRP": args.eps})


def texts_of(args, paths):
    """{path: caption to explain}, from --caption or --captions; empty if the model's own captions are explained."""
    if args.captions is None:
        return {} if args.caption is None else dict.fromkeys(paths, args.caption)
    captions = read_captions_of(args.captions, list(dict.fromkeys(path.name for path in paths)))
    return {path: captions[path.name] for path in paths}


def is_upright(args):
    """Whether images are rotated by their EXIF orientation: not those of a data set, whose boxes refer to the files."""
    return bool(args.images)


def identity(path, settings, text):
    """A hash of the settings, the image file and the given caption, if any; "" if the file cannot be read, which
    reading the image reports."""
    try:
        check_file(path)
        return fingerprint([settings, text, hashlib.sha256(path.read_bytes()).hexdigest()])
    except (OSError, InputError):
        return ""


def read_batch(batch, texts, vocabulary, upright):
    """The items (index, path, ...) of a batch whose image and given caption can be read, their images, and {path:
    InputError} of the others."""
    readable, images, errors = [], [], {}
    for item in batch:
        path = item[1]
        try:
            if texts:
                encode_caption(texts[path], vocabulary, f"the caption of {path.name}")
            images.append(read_image(path, upright))
            readable.append(item)
        except InputError as error:
            errors[path] = error
    return readable, images, errors


def source_arrays(args, path, key, image, annotations):
    """The arrays of explanation.npz that state what was explained; annotations: a value of `split_images`, or None."""
    source = {"identity": key, "image": os.path.abspath(path), "upright": is_upright(args),
              "shared_scale": args.shared_scale, "settings": shown_settings(args)}
    return {name: np.array(value) for name, value in source.items()} | (
        annotation_arrays(annotations, image) if annotations else {})


def explain_all(args, methods, model, vocabulary, targets, texts, annotations, regions, device):
    """Explains the images that do not yet have an explanation with these settings.

    targets: [(path, folder)] of all images. texts: see `texts_of`. annotations: see `split_images`; empty for other
    images. regions: for models of region features, the data set whose first images these are; else None. Returns
    {path: InputError} of the images or captions that cannot be read.
    """
    calibration, decode = grounding.load(args.weight, model), decoding.decode
    if args.grounded:
        decode = partial(grounding.decode_grounded, calibration=grounding.load_for_decoding(args.weight, model))
    settings, size = settings_of(args, methods, model, regions, calibration), checkpoint.image_size(model)
    pending, broken = [(index, path, folder, identity(path, settings, texts.get(path)))
                       for index, (path, folder) in enumerate(targets)], {}
    if not args.overwrite:
        pending = [item for item in pending if not is_explained(item[2], item[3])]
    if len(pending) < len(targets):
        print(f"{len(targets) - len(pending)} of {len(targets)} images are already explained")
    pending = processes.shard(pending)
    steps = len(methods) + 1        # for each image: every method, then drawing
    with tqdm(total=len(pending) * steps, desc=f"explaining {len(pending)} images", unit="step",
              disable=processes.rank() > 0) as bar:
        for batch in (pending[i:i + args.batch_size] for i in range(0, len(pending), args.batch_size)):
            readable, images, errors = read_batch(batch, texts, vocabulary, is_upright(args))
            for error in errors.values():
                bar.write(f"skipped: {error}")
                bar.update(steps)
            broken |= errors
            if not readable:
                continue
            indices, paths, folders, identities = zip(*readable, strict=True)
            if regions:
                inputs, boxes, counts = read_regions(regions, list(indices), paths, images)
            else:
                inputs = torch.stack([preprocess(image, size) for image in images])
            inputs = inputs.to(device)
            given = [texts[path] for path in paths] if texts else None
            options = decoding_options(args) | {"seeds": decoding.image_seeds(indices, args.seed)}
            captions = captions_to_explain(model, vocabulary, inputs, given, options, decode)
            results = explain_batch(model, vocabulary, inputs, captions, methods, args.contrast, args.eps, args.chunk,
                                    bar, calibration)
            if regions:
                results = map(without_padded_regions, results, boxes, counts)
            for path, folder, key, image, arrays in zip(paths, folders, identities, images, results, strict=True):
                arrays |= source_arrays(args, path, key, image, annotations.get(path))
                write_explanation(folder, image, arrays)
                bar.write(describe(path.name, arrays, args.quiet))
                bar.update()
    for others in processes.gather_each(broken):
        broken |= others
    return broken


def main(args):
    processes.start()
    print_settings(args)
    device = pick_device(args.device)
    set_seed(args.seed)
    if bool(args.images) == bool(args.dataset):
        raise InputError("give either --images FILE_OR_FOLDER … or --dataset NAME")
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    regions, methods = None, args.methods
    if model.encoder is None:
        if args.images:
            raise InputError(f"{args.weight} uses region features, not pixels: give --dataset NAME, for which "
                             "preparedataset.py --features bottom_up stored them")
        methods = methods_for_regions(args.methods, args.weight)
        regions = open_features(args.data_folder, args.dataset, args.split, model)
    if sum((args.caption is not None, args.captions is not None, args.grounded)) > 1:
        raise InputError("give at most one of --caption, --captions and --grounded")
    if args.caption is not None:
        encode_caption(args.caption, vocabulary)
    if args.contrast is not None:
        contrast_id(args.contrast, vocabulary)
    annotations = {} if args.images else split_images(args.data_folder, args.dataset, args.split)
    paths = (find_images(args.images) if args.images else list(annotations))[:args.max_images]
    texts = texts_of(args, paths)
    record_run(args.save_path, args, "explain.py")
    folders = choose_folders(paths, args.save_path)
    processes.wait()        # the folders depend on those that exist
    broken = explain_all(args, methods, model, vocabulary, list(zip(paths, folders, strict=True)), texts, annotations,
                         regions, device)
    if processes.rank():
        return
    explained = [folder for path, folder in zip(paths, folders, strict=True) if path not in broken]
    if not explained:
        raise InputError("none of the images can be read, so that there is nothing to explain: check --images")
    write_index(args.save_path, explained)
    print(f"explanations: {args.save_path}/index.html")
    if broken and not args.skip_broken:
        raise InputError(f"{len(broken)} of {len(paths)} images were skipped, the others are explained; the first: "
                         f"{next(iter(broken.values()))} (--skip_broken exits with status 0 all the same)")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
