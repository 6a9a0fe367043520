"""Trains a captioning model with cross-entropy: python train.py --dataset demo --encoder small"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

from argparse import BooleanOptionalAction, Namespace
from inspect import signature

import torch

from captioning import cli, processes
from captioning.captioner import MODELS, model_class
from captioning.data.dataset import CaptionDataset
from captioning.data.feature_store import check_features, open_features_of
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation import encoders
from captioning.files import check_memory, fingerprint
from captioning.runs import record_run
from captioning.training.loop import fit
from captioning.training.losses import CrossEntropy

EPOCHS = {"gridtd": 20, "aoa": 50}      # of Sun et al. (2022)
BYTES_PER_PARAMETER = 16    # the parameter, its gradient and Adam's two moments, of 4 bytes each


def get_args_parser():
    parser = cli.Parser(__doc__)
    add_training(parser).add_argument("--encoder_weights", metavar="FILE",
        help="weights of the CNN (default: downloaded ImageNet weights)")
    return parser


def add_training(parser):
    """Adds the flags that train.py and finetune.py share; returns the group of the model's."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="demo", help="name of a data set prepared by preparedataset.py")
    add("--data_folder", default="data", help="folder to which preparedataset.py wrote it")
    add("--from_pixels", action=BooleanOptionalAction, default=False, help="read and augment "
        "images even if features are stored")
    add("--captions_per_epoch", type=cli.positive_int, help="captions sampled per image per epoch "
        "(default: all)")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model_type", choices=list(MODELS), default="gridtd", help="captioning model")
    add("--encoder", choices=[*encoders.IMAGE_SIZE, "bottom_up"], default="vgg16",
        help="CNN, or bottom_up for region features")
    add("--embed_dim", type=cli.positive_int, default=512, help="dimension of the word embeddings")
    add("--hidden_dim", type=cli.positive_int, default=512, help="dimension of the LSTMs and of "
        "the projected regions")
    add("--attention_dim", type=cli.positive_int, default=196, help="gridtd: dimension of the "
        "attention")
    add("--num_head", type=cli.positive_int, default=8, help="aoa: number of attention heads")
    add("--dropout", type=cli.fraction, help="dropout before the output layer (default: 0.5 for "
        "gridtd, 0.3 for aoa)")
    add("--attention_dropout", type=cli.fraction, help="aoa: dropout of the attention weights "
        "(default: 0.1)")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--finetune_encoder", action=BooleanOptionalAction, default=False, help="train the CNN as "
        "well, on pixels; the encoder 'small' is always trained")
    add("--frozen_layers", type=cli.number(int, 0, 1000), help="number of the CNN's first layers "
        "that --finetune_encoder leaves as they are, which is faster (default: 0)")
    add("--batch_size", type=cli.positive_int, default=32, help="images per batch, over all "
        "processes of torchrun")
    add("--accumulate", type=cli.positive_int, default=1, help="number of passes in which each "
        "batch is computed, one after the other, which needs less memory (docs/distributed.md)")
    add("--epochs", type=cli.positive_int, help="maximum number of epochs (default: 20 for gridtd, "
        "50 for others)")
    add("--patience", type=cli.positive_int, default=6, help="stop after this many epochs without "
        "a better validation CIDEr")
    add("--decoder_lr", type=cli.positive, default=5e-4, help="learning rate of the decoder")
    add("--encoder_lr", type=cli.positive, default=1e-4, help="learning rate of the CNN")
    add("--lr_schedule", choices=["plateau", "cosine"], default="plateau",
        help="plateau: multiply learning rates by 0.8 after every two epochs without a better "
        "CIDEr; cosine: half a cosine to zero over all epochs")
    add("--weight_decay", type=cli.non_negative, default=0.0, help="L2 penalty of Adam")
    add("--grad_clip", type=cli.positive, default=0.1, help="maximum norm of the gradient")
    add("--ss_prob", type=cli.fraction, default=0.0, help="scheduled sampling: probability of "
        "reading a sampled word")
    add("--label_smoothing", type=cli.fraction, default=0.0, help="share of the target probability "
        "that is spread over all words")
    add("--region_loss", type=cli.non_negative, default=0.0, help="weight of the region loss, "
        "which trains single regions to predict words of the captions; it speeds up training of a "
        "randomly initialised encoder")
    add("--region_epochs", type=cli.natural, default=0, help="number of first epochs that train on "
        "the region loss alone")
    add("--amp", action=BooleanOptionalAction, default=False, help="mixed precision")
    cli.add_device(group)
    cli.add_threads(group)
    cli.add_seed(group)
    cli.add_workers(group)

    add = parser.add_argument_group("output").add_argument
    add("--resume", default="auto", metavar="{auto,never,FILE}", help="checkpoint to resume from; "
        "auto: checkpoint_last.pth in --save_path, if it exists")
    add("--save_every", type=cli.positive, default=10.0, help="minutes between checkpoints within "
        "an epoch")
    add("--save_path", default="output", help="folder for checkpoints, log.csv and curves.png")
    return model


def open_split(settings, split):
    """CaptionDataset of one split: its pixels with --from_pixels, else its stored features."""
    options = {"seed": settings.seed, "captions_per_epoch": settings.captions_per_epoch}
    place = settings.data_folder, settings.dataset, split
    if settings.from_pixels:
        return CaptionDataset(*place, image_size=encoders.IMAGE_SIZE[settings.encoder],
                              augment=split == "train", **options)
    alternative = "" if settings.encoder == "bottom_up" else ", or train with --from_pixels"
    return open_features_of(*place, settings.encoder, alternative, **options)


def make_model(args, vocabulary, feature_dim=2048):
    """A new model, with --encoder_weights; feature_dim: channels C of region features."""
    # the flags that have the names of the model's arguments
    constructor = model_class(args.model_type)
    flags = {name: value for name, value in vars(args).items() if value is not None}
    config = {name: flags[name] for name in signature(constructor).parameters if name in flags}
    config |= {"vocab_size": len(vocabulary), "feature_dim": feature_dim,
               "encoder": None if args.encoder == "bottom_up" else args.encoder}

    # built without memory first, so that a mistyped size ends with one sentence
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in constructor(**config).parameters())
    check_memory(BYTES_PER_PARAMETER * size, f"training a model of {size:,} parameters",
                 "lower --embed_dim, --hidden_dim or --attention_dim")
    model = constructor(**config)
    if model.encoder is not None:
        encoder = encoders.build(args.encoder, args.encoder_weights)
        model.encoder = encoder.to(memory_format=torch.channels_last)
    return model


def start_training(settings, model, vocabulary, train_data, val_data, loss, device):
    """Checks that stored features fit the model, and trains it."""
    for data in (train_data, val_data):
        if data.features:
            check_features(data, model)
    settings.data_fingerprint = fingerprint([train_data.fingerprint(), val_data.fingerprint()])
    cli.set_threads(settings.threads, model)
    model = model.to(device)
    fit(settings, model, vocabulary, train_data, val_data, loss, device)


def main(args):
    processes.start()
    settings = Namespace(**vars(args))
    settings.finetune_encoder = args.finetune_encoder or args.encoder == "small"
    settings.from_pixels = args.from_pixels or settings.finetune_encoder
    settings.epochs = args.epochs or EPOCHS.get(args.model_type, 50)
    device = pick_device(settings.device)
    cli.print_settings(settings, get_args_parser(), device)
    if settings.encoder == "bottom_up" and settings.from_pixels:
        raise InputError("--encoder bottom_up has no pixels: omit --from_pixels and "
                         "--finetune_encoder")
    cli.set_seed(settings.seed)
    record_run(settings.save_path, settings, "train.py")

    train_data = open_split(settings, "train")
    val_data = open_split(settings, "val")
    vocabulary = train_data.vocabulary
    feature_dim = [train_data.feature_dim] if settings.encoder == "bottom_up" else []
    model = make_model(settings, vocabulary, *feature_dim)
    loss = CrossEntropy(vocabulary, settings.ss_prob, settings.region_loss, settings.region_epochs,
                        settings.label_smoothing)
    start_training(settings, model, vocabulary, train_data, val_data, loss, device)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
