"""Prepares captions, vocabulary, boxes and features of a data set: python preparedataset.py --dataset demo"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import os
from pathlib import Path

from captioning import processes
from captioning.cli import Parser, add_device, add_seed, fraction, number, positive_int, print_settings, set_seed
from captioning.data import annotations, bottom_up, boxes, dataset, detector, vocabulary
from captioning.data.cnn_features import store_cnn
from captioning.data.demo.generate import generate
from captioning.data.flickr8k import read_flickr8k
from captioning.data.images import are_readable
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation import encoders
from captioning.files import make_folder, write_json
from captioning.runs import record_run
from captioning.training import reward
from captioning.weights import read_weights

MIN_WORD_FREQ = {"demo": 1, "flickr8k": 5, "flickr30k": 3, "karpathy": 3, "coco2014": 4, "coco2017": 4}
MAX_LEN = {"demo": 30, "flickr8k": 30, "flickr30k": 50, "karpathy": 50, "coco2014": 30, "coco2017": 30}


def get_args_parser():
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", choices=list(MAX_LEN), default="demo", help="data set to prepare; karpathy: any annotations in "
        "Karpathy's JSON format")
    add("--karpathy_json", metavar="FILE", help="annotations in Karpathy's JSON format, such as dataset_flickr30k.json")
    add("--annotation_folder", metavar="FOLDER", help="folder of annotations: for flickr8k its text files or Kaggle's "
        "captions.txt; for coco2014 and coco2017 captions_*.json, and instances_*.json for boxes")
    add("--image_folder", metavar="FOLDER", help="folder of the images; for COCO it contains train2017/, val2017/ etc.")
    add("--skip_broken", action="store_true", help="omit images that are missing or cannot be read")
    add("--workers", type=number(int, 0, 256), default=2, help="processes that read or draw images")
    add_seed(group)

    add = parser.add_argument_group("captions").add_argument
    add("--min_word_freq", type=positive_int, help="minimum frequency of a word in the training captions; rarer words "
        f"become <unk> (default: {_format_defaults(MIN_WORD_FREQ)})")
    add("--max_len", type=number(int, 1, 1000), help="maximum number of words per caption; longer captions are cut "
        f"(default: {_format_defaults(MAX_LEN)})")
    add("--captions_per_image", type=number(int, 1, 100), default=5, help="captions stored per image for training")

    group = parser.add_argument_group("features")
    add = group.add_argument
    add("--features", choices=["none", "cnn", "bottom_up"], default="none", help="features to store: none, without "
        "opening any image, those of a CNN, or those of regions")
    add("--encoder", choices=list(encoders.IMAGE_SIZE), default="vgg16", help="cnn: encoder")
    add("--encoder_weights", metavar="FILE", help="cnn: weights of the encoder (default: ImageNet weights, downloaded)")
    add("--feature_type", choices=["float16", "uint8"], default="float16", help="cnn: number format of the stored "
        "features; uint8 takes half the space, with a scale per image")
    add("--bottom_up", metavar="FOLDER_OR_TSV", help="bottom_up: features computed by other software")
    add("--detector", choices=detector.DETECTORS, help="bottom_up: detector that computes the features, instead of "
        "--bottom_up")
    add("--detector_weights", metavar="FILE", help="bottom_up: weights of the detector (default: COCO weights, "
        "downloaded)")
    add("--regions", type=number(int, 1, 100), default=36, help="bottom_up: maximum number of regions per image")
    add("--batch_size", type=positive_int, default=32, help="images per batch of the encoder or detector")
    add("--amp", action="store_true", help="cnn: compute in mixed precision, which is faster on most GPUs and on CPUs "
        "with bfloat16 instructions")
    add_device(group)

    add = parser.add_argument_group("demo data set").add_argument
    add("--demo_size", type=positive_int, nargs=3, default=[4000, 500, 500], metavar=("TRAIN", "VAL", "TEST"),
        help="images per split")
    add("--bias", type=fraction, default=0.95, help="probability that the first object of a pair is accompanied by the "
        "second, in the training and validation split")
    add("--test_bias", type=fraction, default=0.5, help="the same in the test split")
    add("--image_size", type=number(int, 48, 512), default=112, help="side of the images in pixels")

    parser.add_argument_group("output").add_argument("--output_folder", default="data",
                                                     help="files are written to <output_folder>/<dataset>/")
    return parser


def _format_defaults(values):
    return ", ".join(f"{value} for {name}" for name, value in values.items())


def check(args):
    """Raises InputError for flags that do not fit together, before any work is done."""
    if args.dataset in ("flickr30k", "karpathy") and not args.karpathy_json:
        raise InputError(f"--dataset {args.dataset} needs --karpathy_json FILE")
    if args.dataset == "flickr8k" and not (args.karpathy_json or args.annotation_folder):
        raise InputError("--dataset flickr8k needs --annotation_folder with Flickr8k's captions, or --karpathy_json "
                         "FILE")
    if args.dataset == "coco2014" and not (args.karpathy_json or args.annotation_folder):
        raise InputError("--dataset coco2014 needs --karpathy_json FILE, or --annotation_folder with COCO's captions")
    if args.dataset == "coco2017" and not args.annotation_folder:
        raise InputError("--dataset coco2017 needs --annotation_folder with captions_train2017.json and "
                         "captions_val2017.json")
    if args.features == "bottom_up" and bool(args.bottom_up) == bool(args.detector):
        raise InputError("--features bottom_up needs either --bottom_up FOLDER_OR_TSV, features computed by other "
                         "software, or --detector")
    if args.features == "bottom_up" and args.feature_type == "uint8":
        raise InputError("--feature_type uint8 needs --features cnn, whose features are non-negative")
    if args.bottom_up and not os.path.exists(args.bottom_up):
        raise InputError(f"--bottom_up {args.bottom_up} does not exist: give a folder or a tsv file")
    if args.karpathy_json and args.dataset in ("demo", "coco2017"):
        raise InputError("--karpathy_json requires --dataset flickr8k, flickr30k, coco2014 or karpathy, and cannot be "
                         f"used with {args.dataset}")
    for flag in ("annotation_folder", "image_folder"):
        value = getattr(args, flag)
        if value and args.dataset == "demo":
            raise InputError(f"--{flag} cannot be used with --dataset demo, which is generated: name another --dataset")
        if value and not os.path.isdir(value):
            raise InputError(f"--{flag} {value} is not a folder")
    for flag, is_given in (("--features cnn", args.features == "cnn"), ("--detector", args.detector),
                           ("--skip_broken", args.skip_broken)):
        if is_given and not args.image_folder and args.dataset != "demo":
            raise InputError(f"{flag} needs --image_folder, the folder of the images")


def read_records(dataset_name, karpathy_json, annotation_folder, seed):
    """Returns the Records of a data set and, from COCO's instances_*.json, the boxes of its images (possibly none)."""
    if dataset_name == "flickr8k" and annotation_folder:
        return read_flickr8k(annotation_folder, karpathy_json, seed), {}
    if karpathy_json:
        records = annotations.read_karpathy(karpathy_json)
    else:
        records = annotations.read_coco(annotation_folder, dataset_name[-4:])
    return records, boxes.read_boxes(annotation_folder, records) if annotation_folder else {}


def check_images(records, image_folder):
    """Raises InputError if an image is missing."""
    paths = [Path(image_folder, record.path) for record in records]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(f"{len(missing)} of {len(paths)} images are missing, the first being {missing[0]}: check "
                         "--image_folder, or omit them with --skip_broken")


def without_broken(records, image_folder, workers):
    """Returns the records whose images can be read; prints the number of the others and the first 20 of them."""
    paths = [Path(image_folder, record.path) for record in records]
    readable = are_readable(paths, workers)
    broken = [path for path, keep in zip(paths, readable, strict=True) if not keep]
    print(f"{len(broken)} broken or missing images omitted" + "".join(f"\n  {path}" for path in broken[:20]))
    records = [record for record, keep in zip(records, readable, strict=True) if keep]
    annotations.check_splits(records, image_folder)
    return records


def build_network(args):
    """The encoder or detector that computes the features, or None."""
    if args.features == "cnn":
        return encoders.build(args.encoder, args.encoder_weights)
    if args.detector:
        weights = args.detector_weights
        return detector.build(args.detector, read_weights(weights, "detector") if weights else None)
    return None


def store_features(args, split, records, image_folder, network, device):
    """Stores the features that --features selects for the records of a split."""
    path = dataset.features_path(args.output_folder, args.dataset, split,
                                 args.encoder if args.features == "cnn" else "bottom_up")
    if args.features == "cnn":
        store_cnn(path, records, image_folder, network, args.encoder, encoders.IMAGE_SIZE[args.encoder],
                  args.batch_size, args.workers, device, args.amp, args.feature_type)
    elif args.features == "bottom_up" and args.detector:
        detector.store(path, records, image_folder, network, args.detector, args.regions, args.batch_size,
                       args.workers, device)
    elif args.features == "bottom_up" and not processes.rank():
        bottom_up.store(path, records, args.bottom_up, args.regions)


def prepare(args, folder, opens_images):
    """Writes the captions, vocabulary and boxes; returns {split: Records} and the folder of the images."""
    location = args.output_folder, args.dataset
    if args.dataset == "demo":
        records = generate(folder, args.demo_size, args.seed, args.bias, args.test_bias, args.image_size, args.workers)
        image_boxes, image_folder = {}, folder / "images"      # generate has written the boxes
    else:
        records, image_boxes = read_records(args.dataset, args.karpathy_json, args.annotation_folder, args.seed)
        image_folder = args.image_folder
    if args.skip_broken:
        records = without_broken(records, image_folder, args.workers)
    elif opens_images:
        check_images(records, image_folder)
    splits = {split: [record for record in records if record.split == split] for split in annotations.SPLITS}
    words = vocabulary.build([tokens for record in splits["train"] for tokens in record.tokens],
                             args.min_word_freq or MIN_WORD_FREQ[args.dataset])
    if len(words) == 4:
        raise InputError("no word of the training captions is frequent enough: lower --min_word_freq")
    write_json(dataset.wordmap_path(*location), words.wordmap)
    if image_boxes:
        write_json(folder / f"boxes_{args.dataset}.json", image_boxes)
    for split, split_records in splits.items():
        captions = dataset.write_split(dataset.split_path(*location, split), split_records, words,
                                       args.captions_per_image, args.max_len or MAX_LEN[args.dataset], args.seed,
                                       image_folder)
        if split == "train":
            reward.write_frequencies(reward.frequencies_path(*location), captions, len(words))
    print(f"{folder}: " + ", ".join(f"{len(split_records)} {split}" for split, split_records in splits.items())
          + f" images, {sum(len(record.tokens) for record in records)} captions, {len(words)} words")
    return splits, image_folder


def main(args):
    processes.start()
    print_settings(args)
    device = pick_device(args.device)
    check(args)
    folder = make_folder(Path(args.output_folder, args.dataset))
    record_run(folder, args, "preparedataset.py")
    set_seed(args.seed)     # the encoder "small" is initialised randomly
    network = build_network(args)
    splits, image_folder = processes.from_first(prepare, args, folder, network is not None)
    for split, records in splits.items():
        store_features(args, split, records, image_folder, network, device)
    print("files: " + " ".join(sorted(file.name for file in folder.iterdir() if file.is_file())))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
