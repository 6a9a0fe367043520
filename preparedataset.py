"""Prepares captions, vocabulary, boxes and features: python preparedataset.py --dataset demo"""
import os
from pathlib import Path

from captioning.cli import Parser, add_device, add_seed, fraction, number, positive_int, print_settings, set_seed
from captioning.data import annotations, bottom_up, boxes, dataset, detector, vocabulary
from captioning.data.cnn_features import store_cnn
from captioning.data.demo.generate import generate
from captioning.data.images import are_sound
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation import encoders
from captioning.files import make_folder, write_json
from captioning.training import reward

MIN_WORD_FREQ = {"demo": 1, "flickr30k": 3, "karpathy": 3, "coco2014": 4, "coco2017": 4}
MAX_LEN = {"demo": 30, "flickr30k": 50, "karpathy": 50, "coco2014": 30, "coco2017": 30}


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=list(MAX_LEN), default="demo", help="what to prepare; karpathy: any data in that form")
    add("--karpathy_json", metavar="FILE", help="dataset_flickr30k.json, dataset_coco.json or one of that form")
    add("--annotation_folder", help="COCO's annotations: captions_*.json for coco2014 and coco2017, and boxes from "
        "instances_*.json")
    add("--image_folder", help="where the pictures are; COCO's train2017/, val2017/ … lie in it")
    add("--output_folder", default="data", help="everything goes to <output_folder>/<dataset>/")
    add("--min_word_freq", type=positive_int, help="rarer words become <unk>; by default "
        + ", ".join(f"{value} for {name}" for name, value in MIN_WORD_FREQ.items()))
    add("--max_len", type=number(int, 1, 1000), help="words a caption keeps; by default "
        + ", ".join(f"{value} for {name}" for name, value in MAX_LEN.items()))
    add("--captions_per_image", type=number(int, 1, 100), default=5, help="stored for training")
    add("--features", choices=["none", "cnn", "bottom_up"], default="none", help="features to store; none opens no "
        "picture")
    add("--encoder", choices=list(encoders.IMAGE_SIZE), default="vgg16", help="the CNN for --features cnn")
    add("--encoder_weights", metavar="FILE", help="the CNN's weights; ImageNet's are downloaded otherwise")
    add("--bottom_up", metavar="FOLDER_OR_TSV", help="features made elsewhere, for --features bottom_up")
    add("--detector", choices=detector.DETECTORS, help="instead of --bottom_up: find the regions here")
    add("--detector_weights", metavar="FILE", help="the detector's weights; COCO's are downloaded otherwise")
    add("--regions", type=number(int, 1, 100), default=36, help="bottom_up: regions a picture at most")
    add("--skip_broken", action="store_true", help="leave pictures out that are missing or broken, after "
        "opening each")
    add("--demo_size", type=positive_int, nargs=3, default=[4000, 500, 500], metavar=("TRAIN", "VAL", "TEST"),
        help="pictures of each split of the demo data")
    add("--bias", type=fraction, default=0.95, help="demo: how often a biased object comes with its partner")
    add("--test_bias", type=fraction, default=0.5, help="demo: the same in the test split")
    add("--image_size", type=number(int, 48, 512), default=112, help="demo: side of the pictures in pixels")
    add("--batch_size", type=positive_int, default=32, help="pictures the CNN takes at once")
    add("--workers", type=number(int, 0, 256), default=2, help="processes that read or draw pictures")
    add_device(parser)
    add_seed(parser)
    return parser


def check(args):
    """What can be said of the flags before any work."""
    if args.dataset in ("flickr30k", "karpathy") and not args.karpathy_json:
        raise InputError(f"--dataset {args.dataset} needs --karpathy_json FILE")
    if args.dataset == "coco2014" and not (args.karpathy_json or args.annotation_folder):
        raise InputError("--dataset coco2014 needs --karpathy_json FILE, or --annotation_folder with COCO's captions")
    if args.dataset == "coco2017" and not args.annotation_folder:
        raise InputError("--dataset coco2017 needs --annotation_folder with captions_train2017.json and "
                         "captions_val2017.json")
    if args.features == "bottom_up" and bool(args.bottom_up) == bool(args.detector):
        raise InputError("--features bottom_up needs either --bottom_up FOLDER_OR_TSV, features made elsewhere, or "
                         "--detector")
    if args.bottom_up and not os.path.exists(args.bottom_up):
        raise InputError(f"--bottom_up {args.bottom_up} does not exist: give a folder or a tsv file")
    if args.karpathy_json and args.dataset in ("demo", "coco2017"):
        raise InputError("--karpathy_json goes with --dataset flickr30k, coco2014 or karpathy, not with "
                         f"{args.dataset}")
    for flag in ("annotation_folder", "image_folder"):
        value = getattr(args, flag)
        if value and args.dataset == "demo":
            raise InputError(f"--{flag} does not go with --dataset demo, which makes its own: name another --dataset")
        if value and not os.path.isdir(value):
            raise InputError(f"--{flag} {value} is not a folder")
    for flag, wanted in (("--features cnn", args.features == "cnn"), ("--detector", args.detector),
                         ("--skip_broken", args.skip_broken)):
        if wanted and not args.image_folder and args.dataset != "demo":
            raise InputError(f"{flag} needs --image_folder, where the pictures are")


def read_records(args, folder):
    """Records and boxes of the data set; the demo's are made here."""
    if args.dataset == "demo":
        args.image_folder = str(folder / "images")
        return generate(folder, args.demo_size, args.seed, args.bias, args.test_bias, args.image_size,
                             args.workers), None
    if args.karpathy_json:
        records = annotations.read_karpathy(args.karpathy_json)
    else:
        records = annotations.read_coco(args.annotation_folder, args.dataset[-4:])
    entries = boxes.read_boxes(args.annotation_folder, records) if args.annotation_folder else {}
    return records, entries


def without_broken(records, args):
    """The records whose pictures can be used; InputError for a missing one unless --skip_broken."""
    paths = [Path(args.image_folder, record.path) for record in records]
    if not args.skip_broken:
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise InputError(f"the picture {missing[0]} is missing (and {len(missing) - 1} others): check "
                             "--image_folder, or leave them out with --skip_broken")
        return records
    sound = are_sound(paths, args.workers)
    broken = [path for path, ok in zip(paths, sound, strict=True) if not ok]
    print(f"{len(broken)} broken or missing pictures left out" + "".join(f"\n  {path}" for path in broken[:20]))
    records = [record for record, ok in zip(records, sound, strict=True) if ok]
    annotations.check_splits(records, args.image_folder)
    return records


def store_features(args, device, encoder, split, records):
    if args.features == "cnn":
        path = dataset.features_path(args.output_folder, args.dataset, split, args.encoder)
        store_cnn(path, records, args.image_folder, encoder, args.encoder, encoders.IMAGE_SIZE[args.encoder],
                           args.batch_size, args.workers, device)
    elif args.features == "bottom_up":
        path = dataset.features_path(args.output_folder, args.dataset, split, "bottom_up")
        if args.bottom_up:
            bottom_up.store(path, records, args.bottom_up, args.regions)
        else:
            detector.store(path, records, args.image_folder, encoder, args.detector, args.regions, args.batch_size,
                           args.workers, device)


def main(args):
    print_settings(args)
    device = pick_device(args.device)
    check(args)
    folder = make_folder(Path(args.output_folder, args.dataset))
    set_seed(args.seed)     # the encoder 'small' starts at random
    encoder = None      # whatever looks at pictures
    if args.features == "cnn":
        encoder = encoders.build(args.encoder, args.encoder_weights)
    elif args.detector:
        encoder = detector.build(args.detector, args.detector_weights)
    records, boxes = read_records(args, folder)
    if encoder is not None or args.skip_broken:
        records = without_broken(records, args)
    splits = {split: [record for record in records if record.split == split] for split in annotations.SPLITS}
    words = vocabulary.build([tokens for record in splits["train"] for tokens in record.tokens],
                             args.min_word_freq or MIN_WORD_FREQ[args.dataset])
    if len(words) == 4:
        raise InputError("no word of the training captions is frequent enough: lower --min_word_freq")
    write_json(dataset.wordmap_path(args.output_folder, args.dataset), words.wordmap)
    if boxes:
        write_json(folder / f"boxes_{args.dataset}.json", boxes)
    for split, own in splits.items():
        captions = dataset.write_split(dataset.split_path(args.output_folder, args.dataset, split), own, words,
                                       args.captions_per_image, args.max_len or MAX_LEN[args.dataset], args.seed,
                                       args.image_folder)
        if split == "train":
            reward.write_frequencies(reward.frequencies_path(args.output_folder, args.dataset), captions, len(words))
    for split, own in splits.items():
        store_features(args, device, encoder, split, own)
    print(f"{folder}: " + ", ".join(f"{len(own)} {split}" for split, own in splits.items())
          + f" pictures, {sum(len(record.tokens) for record in records)} captions, {len(words)} words")
    print("files: " + " ".join(sorted(file.name for file in folder.iterdir() if file.is_file())))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
