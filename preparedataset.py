"""Prepares captions, vocabulary, boxes and features of a data set:
python preparedataset.py --dataset demo"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

import os
from pathlib import Path

from captioning import cli, processes
from captioning.data import annotations, bottom_up, boxes, dataset, detector, feature_store
from captioning.data.demo.generate import generate
from captioning.data.flickr8k import read_flickr8k
from captioning.data.images import are_readable
from captioning.data.vocabulary import build
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation import encoders
from captioning.files import make_folder, write_json
from captioning.runs import record_run
from captioning.training import reward

# of each data set: minimum frequency of a word, maximum length of a caption, and the flags of which
# one gives its annotations
DEFAULTS = {"demo": (1, 30, ()), "flickr8k": (5, 30, ("karpathy_json", "annotation_folder")),
            "flickr30k": (3, 50, ("karpathy_json",)), "karpathy": (3, 50, ("karpathy_json",)),
            "coco2014": (4, 30, ("karpathy_json", "annotation_folder")),
            "coco2017": (4, 30, ("annotation_folder",))}


def get_args_parser():
    frequencies = ", ".join(f"{values[0]} for {name}" for name, values in DEFAULTS.items())
    lengths = ", ".join(f"{values[1]} for {name}" for name, values in DEFAULTS.items())
    parser = cli.Parser(" ".join(__doc__.split()))
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset", choices=list(DEFAULTS), default="demo", help="data set to prepare; karpathy: "
        "any annotations in Karpathy's JSON format")
    add("--karpathy_json", metavar="FILE", help="annotations in Karpathy's JSON format")
    add("--annotation_folder", metavar="FOLDER", help="folder of annotations: for flickr8k its "
        "text files or Kaggle's captions.txt; for coco2014 and coco2017 captions_*.json, and "
        "instances_*.json for boxes")
    add("--image_folder", metavar="FOLDER", help="folder of the images; for COCO it contains "
        "train2017/, val2017/ etc.")
    add("--skip_broken", action="store_true", help="omit missing and unreadable images")
    cli.add_workers(data)
    cli.add_seed(data)
    add("--output_folder", default="data", help="files go to <output_folder>/<dataset>/")

    add = parser.add_argument_group("captions").add_argument
    add("--min_word_freq", type=cli.positive_int,
        help="minimum frequency of a word in the training captions; rarer words become <unk> "
             f"(default: {frequencies})")
    add("--max_len", type=cli.number(int, 1, 1000),
        help=f"maximum number of words, beyond which captions are cut (default: {lengths})")
    add("--captions_per_image", type=cli.number(int, 1, 100), default=5, help="captions stored per "
        "image for training")

    group = parser.add_argument_group("features")
    add = group.add_argument
    add("--features", choices=["none", "cnn", "bottom_up"], default="none",
        help="features to store: none, which opens no image, of a CNN, or of regions")
    add("--encoder", choices=list(encoders.IMAGE_SIZE), default="vgg16", help="cnn: encoder")
    add("--encoder_weights", metavar="FILE", help="cnn: weights of the encoder, or a checkpoint "
        "whose encoder was trained (default: ImageNet weights, downloaded)")
    add("--bottom_up", metavar="FOLDER_OR_TSV", help="bottom_up: features of other software, a tsv "
        "file or a folder of such files")
    add("--detector", choices=detector.DETECTORS, help="bottom_up: detector that computes the "
        "features, instead of --bottom_up")
    add("--detector_weights", metavar="FILE", help="bottom_up: weights of the detector (default: "
        "COCO weights, downloaded)")
    add("--regions", type=cli.number(int, 1, 100), default=36, help="bottom_up: maximum number of "
        "regions per image")
    add("--batch_size", type=cli.positive_int, default=32, help="images per batch of the network")
    add("--amp", action="store_true", help="cnn: compute in mixed precision, faster where the "
        "device has bfloat16")
    cli.add_device(group)

    add = parser.add_argument_group("demo data set").add_argument
    add("--demo_size", type=cli.positive_int, nargs=3, default=[4000, 500, 500],
        metavar=("TRAIN", "VAL", "TEST"), help="images per split")
    add("--bias", type=cli.fraction, default=0.95, help="probability that the first object of a "
        "pair comes with the second, but in test")
    add("--test_bias", type=cli.fraction, default=0.5, help="the same in the test split")
    add("--image_size", type=cli.number(int, 48, 512), default=112, help="pixels per side")
    return parser


def check(args):
    """InputError for flags that do not fit together, before any work is done."""
    needed = DEFAULTS[args.dataset][2]
    if needed and not any(getattr(args, flag) for flag in needed):
        raise InputError(f"--dataset {args.dataset} needs --{' or --'.join(needed)}")
    for flag in ("karpathy_json", "annotation_folder", "image_folder"):
        value = getattr(args, flag)
        is_other = args.dataset == "coco2017" and flag == "karpathy_json"
        if value and (args.dataset == "demo" or is_other):
            raise InputError(f"--{flag} cannot be used with --dataset {args.dataset}: name another "
                             "--dataset")
        if value and flag.endswith("folder") and not os.path.isdir(value):
            raise InputError(f"--{flag} {value} is not a folder: check the path")
    if args.features == "bottom_up" and bool(args.bottom_up) == bool(args.detector):
        raise InputError("--features bottom_up needs either --bottom_up FOLDER_OR_TSV, features "
                         "computed by other software, or --detector")
    if args.bottom_up and not os.path.exists(args.bottom_up):
        raise InputError(f"--bottom_up {args.bottom_up} does not exist: check the path")
    if reads_images(args) and not args.image_folder and args.dataset != "demo":
        raise InputError("--features cnn, --detector and --skip_broken need --image_folder, the "
                         "folder of the images")


def reads_images(args):
    return args.features == "cnn" or args.detector or args.skip_broken


def read_annotations(args, folder):
    """The Records of a data set, the boxes of its images, and the folder of its images."""
    if args.dataset == "demo":
        records = generate(folder, args.demo_size, args.seed, args.bias, args.test_bias,
                           args.image_size, args.workers)
        return records, {}, folder / "images"       # generate has written the boxes
    source = args.annotation_folder
    if args.dataset == "flickr8k" and source:
        records = read_flickr8k(source, args.karpathy_json, args.seed)
        return records, {}, args.image_folder
    if args.karpathy_json:
        records = annotations.read_karpathy(args.karpathy_json)
    else:
        records = annotations.read_coco(source, args.dataset[-4:])
    return records, boxes.read_boxes(source, records) if source else {}, args.image_folder


def with_images(records, image_folder, skip_broken, workers):
    """`records`, all of whose images must exist, or the readable ones with --skip_broken."""
    paths = [Path(image_folder, record.path) for record in records]
    is_present = are_readable(paths, workers) if skip_broken else map(os.path.isfile, paths)
    is_present = list(is_present)
    broken = [str(path) for path, keep in zip(paths, is_present, strict=True) if not keep]
    if broken and not skip_broken:
        raise InputError(f"{len(broken)} of {len(paths)} images are missing, the first being "
                         f"{broken[0]}: check --image_folder, or omit them with --skip_broken")
    if skip_broken:
        print("\n  ".join([f"{len(broken)} broken or missing images omitted", *broken[:20]]))
    kept = [record for record, keep in zip(records, is_present, strict=True) if keep]
    return annotations.checked_records(kept, image_folder)


def read(args, folder):
    """{split: Records}, the Vocabulary of the training captions, the images' boxes, and their
    folder."""
    records, image_boxes, image_folder = read_annotations(args, folder)
    if reads_images(args):
        records = with_images(records, image_folder, args.skip_broken, args.workers)
    splits = {split: [record for record in records if record.split == split]
              for split in annotations.SPLITS}

    captions = [tokens for record in splits["train"] for tokens in record.tokens]
    words = build(captions, args.min_word_freq or DEFAULTS[args.dataset][0])
    if len(words) == 4:
        raise InputError("no word of the training captions is frequent enough: lower "
                         "--min_word_freq")
    return splits, words, image_boxes, image_folder


def write(args, folder, splits, words, image_boxes, image_folder):
    """Writes captions, vocabulary and boxes."""
    location = args.output_folder, args.dataset
    write_json(dataset.wordmap_path(*location), words.wordmap)
    if image_boxes:
        write_json(folder / f"boxes_{args.dataset}.json", image_boxes)
    for split, of_split in splits.items():
        ids = dataset.write_split(dataset.split_path(*location, split), of_split, words,
                                  args.captions_per_image,
                                  args.max_len or DEFAULTS[args.dataset][1], args.seed,
                                  image_folder)
        if split == "train":
            reward.write_frequencies(reward.frequencies_path(*location), ids, len(words))
    sizes = ", ".join(f"{len(of_split)} {split}" for split, of_split in splits.items())
    count = sum(len(record.tokens) for of_split in splits.values() for record in of_split)
    print(f"{folder}: {sizes} images, {count} captions, {len(words)} words")


def main(args):
    processes.start()
    device = pick_device(args.device)
    cli.print_settings(args, get_args_parser(), device)
    check(args)
    folder = make_folder(Path(args.output_folder, args.dataset))
    record_run(folder, args, "preparedataset.py")

    # the network first, so that missing weights are noticed at once
    cli.set_seed(args.seed)     # the encoder "small" is initialised randomly
    if args.features == "cnn":
        network = encoders.build(args.encoder, args.encoder_weights)
    elif args.features == "bottom_up" and args.detector:
        network = detector.build(args.detector, args.detector_weights)
    splits, words, image_boxes, image_folder = processes.from_first(read, args, folder)

    # features of each split
    name = args.encoder if args.features == "cnn" else "bottom_up"
    computing = args.batch_size, args.workers, device
    for split, records in splits.items():
        path = dataset.features_path(args.output_folder, args.dataset, split, name)
        if args.features == "cnn":
            feature_store.store_cnn(path, records, image_folder, network, name,
                                    encoders.IMAGE_SIZE[name], *computing, args.amp)
        elif args.features == "bottom_up" and args.detector:
            detector.store(path, records, image_folder, network, args.detector, args.regions,
                           *computing)
        elif args.features == "bottom_up" and not processes.rank():
            bottom_up.store(path, records, args.bottom_up, args.regions)

    # last, so that an earlier data set stays usable if the features fail
    if not processes.rank():
        write(args, folder, splits, words, image_boxes, image_folder)
    print("files: " + " ".join(sorted(file.name for file in folder.iterdir() if file.is_file())))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
