"""Fine-tunes a captioning model: python finetune.py --weight output/demo/checkpoint_best.pth --lrp_tune

What is not given here stays as the checkpoint was trained: data, sizes, batches, mixed precision.
"""
from functools import partial
from pathlib import Path

from torch import nn

import train
from captioning import checkpoint
from captioning.cli import non_negative, positive_int, print_settings, set_seed
from captioning.data import vocabulary
from captioning.data.feature_store import check_features
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.lrp_inference import lrp_loss, stop_mask
from captioning.files import make_folder
from captioning.training.loop import fit
from captioning.training.losses import teacher_forced_loss
from captioning.training.reward import CiderD, frequencies_path
from captioning.training.scst import SCST

SIZES = ("embed_dim", "hidden_dim", "attention_dim", "num_head")        # of the model: they cannot change
KEPT = ("dataset", "data_folder", "model_type", "encoder", *SIZES, "finetune_encoder", "from_pixels", "dropout",
        "batch_size", "captions_per_step", "weight_decay", "grad_clip", "amp")


def get_args_parser():
    parser = train.get_args_parser()
    parser.description = __doc__
    parser.set_defaults(**dict.fromkeys(KEPT), save_path=None, epochs=10, decoder_lr=1e-4, encoder_lr=1e-5)
    add = parser.add_argument
    add("--weight", metavar="CHECKPOINT", required=True, help="the model to start from")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--lrp_tune", action="store_true", help="cross-entropy of the model and of LRP-inference")
    modes.add_argument("--cider_tune", action="store_true", help="self-critical training with CIDEr-D")
    modes.add_argument("--lrp_cider_tune", action="store_true", help="the same, its samples drawn by LRP-inference")
    modes.add_argument("--ce_tune", action="store_true", help="the control: cross-entropy, as in training")
    add("--lrp_weight", type=non_negative, default=1.0, help="λ, weight of LRP-inference's cross-entropy")
    add("--stop_words", metavar="FILE", help="words that LRP-inference leaves as they are, separated by white space; "
        "by default captioning/metrics/stop_words.txt")
    add("--baseline", choices=["greedy", "mean"], default="greedy", help="what a sample's reward is compared with: "
        "that of the greedy caption, or of the picture's other samples")
    add("--samples", type=positive_int, default=1, help="captions drawn of each picture")
    return parser


def complete(args, model, flags):
    """Fills in what `args` leaves open from the checkpoint's flags; InputError where the model cannot follow."""
    defaults = vars(train.get_args_parser().parse_args([]))
    fixed = {"model_type": checkpoint.model_type(model), "encoder": model.config["encoder"] or "bottom_up"}
    fixed |= {name: model.config[name] for name in SIZES if name in model.config}
    for name in KEPT:
        if getattr(args, name) is None:
            setattr(args, name, fixed.get(name, flags.get(name, defaults[name])))
        elif name in fixed and getattr(args, name) != fixed[name]:
            raise InputError(f"{args.weight} has --{name} {fixed[name]}, not {getattr(args, name)}: leave the flag out")
    if args.encoder == "bottom_up" and args.from_pixels:
        raise InputError(f"{args.weight} works on region features: leave out --from_pixels and --finetune_encoder")
    mode = next(name for name in ("lrp_tune", "cider_tune", "lrp_cider_tune", "ce_tune") if getattr(args, name))
    args.save_path = args.save_path or f"{Path(args.weight).parent}_{mode}"
    args.from_pixels = args.from_pixels or args.finetune_encoder
    if Path(args.weight).resolve().parent == Path(args.save_path).resolve():
        raise InputError(f"--save_path {args.save_path} holds the checkpoint to start from: choose another folder")
    if args.cider_tune or args.lrp_cider_tune:
        if args.ss_prob or args.region_loss or args.region_epochs:
            raise InputError(f"--{mode} draws its captions itself: leave out --ss_prob, --region_loss, --region_epochs")
        if args.baseline == "mean" and args.samples == 1:
            raise InputError("--baseline mean compares samples of a picture with each other: give --samples 2 or more")
        args.captions_per_step = None       # all are references


def set_dropout(model, args):
    """Dropout as --dropout says. Self-critical training goes without, or it would train another model than it draws
    from."""
    if args.cider_tune or args.lrp_cider_tune:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    elif args.dropout is not None:
        model.dropout.p = args.dropout


def stop_word_ids(path, words):
    """The ids of the words in the file, and of <pad>, <unk>, <start> and <end>."""
    try:
        listed = Path(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise InputError(f"the stop words {path} cannot be read ({error}): give a text file of words") from error
    return {words.wordmap[word] for word in listed if word in words.wordmap} | {
        words.wordmap[name] for name in (vocabulary.PAD, vocabulary.UNK, vocabulary.START, vocabulary.END)}


def check_references(data):
    """InputError that names the first picture without a word in its references."""
    empty = (data.captions[..., 2] == 0).all(1).nonzero()       # <start> and <end> alone
    if len(empty):
        raise InputError(f"{data.names[empty[0]]} has no reference to reward captions by: give it captions and run "
                         "preparedataset.py again")


def make_loss(args, model, words, data):
    """(fit's loss_function, what it measures beside the loss)"""
    stop = None
    if args.lrp_tune or args.lrp_cider_tune:
        path = args.stop_words or Path(__file__).parent / "captioning" / "metrics" / "stop_words.txt"
        stop = stop_mask(model, stop_word_ids(path, words))
    if args.ce_tune or args.lrp_tune:
        criterion = None if args.ce_tune else partial(lrp_loss, stop=stop, weight=args.lrp_weight)
        return teacher_forced_loss(args, words, data, criterion), "accuracy"
    check_references(data)
    reward = CiderD(frequencies_path(args.data_folder, args.dataset), len(words))
    return SCST(words, reward, data.captions.shape[-1] - 1, args.samples, args.baseline, stop), "reward"


def main(args):
    device = pick_device(args.device)
    model, words = checkpoint.load(args.weight, device, args.wordmap)
    complete(args, model, (checkpoint.read(args.weight).get("training") or {}).get("flags", {}))
    print_settings(args)
    set_seed(args.seed)
    make_folder(args.save_path)
    train_data, val_data = train.open_data(args, "train", augment=True), train.open_data(args, "val")
    if train_data.vocabulary.wordmap != words.wordmap:
        raise InputError(f"{args.data_folder}/{args.dataset} has another vocabulary than {args.weight}: name the data "
                         "that it was trained on, with --dataset and --data_folder")
    for data in (train_data, val_data):
        if data.features:
            check_features(data, model)
    set_dropout(model, args)
    loss_function, measure = make_loss(args, model, words, train_data)
    best = fit(args, model, words, train_data, val_data, loss_function, device, measure)
    print(f"best validation CIDEr {best:.3f}: {args.save_path}/checkpoint_best.pth", flush=True)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
