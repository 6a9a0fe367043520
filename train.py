"""Trains a captioning model with cross-entropy: python train.py --dataset demo --encoder small"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

from argparse import BooleanOptionalAction, Namespace

import torch

from captioning import processes
from captioning.checkpoint import model_class
from captioning.cli import (
    Parser,
    add_device,
    add_seed,
    add_workers,
    fraction,
    natural,
    non_negative,
    positive,
    positive_int,
    print_settings,
    set_seed,
)
from captioning.data.dataset import CaptionDataset
from captioning.data.feature_store import check_features, open_features_of
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation import encoders
from captioning.memory import check_memory
from captioning.runs import record_run
from captioning.training.loop import fit
from captioning.training.losses import teacher_forced_loss
from captioning.training.options import TrainingOptions

BYTES_PER_PARAMETER = 16        # the parameter, its gradient and Adam's two moments, of 4 bytes each


def get_args_parser():
    parser = Parser(__doc__)
    add_training(parser).add_argument("--encoder_weights", metavar="FILE", help="weights of the CNN (default: "
                                      "downloaded ImageNet weights)")
    return parser


def add_training(parser):
    """Adds the argument groups that train.py and finetune.py share, and returns the group of the model."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="demo", help="name of a data set prepared by preparedataset.py")
    add("--data_folder", default="data", help="folder to which preparedataset.py wrote the data set")
    add("--from_pixels", action=BooleanOptionalAction, default=False, help="read and augment images even if features "
        "are stored")
    add("--captions_per_step", type=positive_int, help="captions sampled per image per epoch (default: all)")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model_type", choices=["gridtd", "aoa"], default="gridtd", help="captioning model")
    add("--encoder", choices=[*encoders.IMAGE_SIZE, "bottom_up"], default="vgg16",
        help="CNN, or bottom_up for region features")
    add("--embed_dim", type=positive_int, default=512, help="dimension of the word embeddings")
    add("--hidden_dim", type=positive_int, default=512, help="dimension of the LSTMs and of the projected regions")
    add("--attention_dim", type=positive_int, default=196, help="gridtd: dimension of the attention")
    add("--num_head", type=positive_int, default=8, help="aoa: number of attention heads")
    add("--dropout", type=fraction, help="dropout before the output layer (default: 0.5 for gridtd, 0.3 for aoa)")
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--finetune_encoder", action=BooleanOptionalAction, default=False, help="train the CNN as well, on pixels; "
        "the encoder 'small' is always trained")
    add("--batch_size", type=positive_int, default=32, help="images per batch, over all processes of torchrun")
    add("--accumulate", type=positive_int, default=1, help="number of parts in which each batch is computed, one after "
        "the other, which needs less memory (docs/distributed.md)")
    add("--epochs", type=positive_int, default=50, help="maximum number of epochs")
    add("--patience", type=positive_int, default=6, help="stop after this many epochs without a better validation "
        "CIDEr")
    add("--decoder_lr", type=positive, default=5e-4, help="learning rate of the decoder")
    add("--encoder_lr", type=positive, default=1e-4, help="learning rate of the CNN")
    add("--lr_schedule", choices=["plateau", "cosine"], default="plateau", help="plateau: multiply learning rates by "
        "0.8 after every two epochs without a better CIDEr; cosine: half a cosine to zero over all epochs")
    add("--weight_decay", type=non_negative, default=0.0, help="L2 penalty of Adam")
    add("--grad_clip", type=positive, default=0.1, help="maximum norm of the gradient")
    add("--ss_prob", type=fraction, default=0.0, help="scheduled sampling: probability of reading a sampled word")
    add("--label_smoothing", type=fraction, default=0.0, help="share of the target probability that is spread over all "
        "words")
    add("--region_loss", type=non_negative, default=0.0, help="weight of the region loss, which trains single regions "
        "to predict words of the captions; it speeds up training of a randomly initialised encoder")
    add("--region_epochs", type=natural, default=0, help="number of initial epochs on the region loss alone")
    add("--amp", action=BooleanOptionalAction, default=False, help="mixed precision")
    add_device(group)
    add_seed(group)
    add_workers(group)
    add = parser.add_argument_group("output").add_argument
    add("--resume", default="auto", metavar="{auto,never,FILE}", help="checkpoint to resume from; auto: "
        "checkpoint_last.pth in --save_path, if it exists")
    add("--save_every", type=positive, default=10.0, help="minutes between checkpoints within an epoch")
    add("--save_path", default="output", help="folder for checkpoints, log.csv and curves.png")
    return model


def complete_settings(args):
    """The flags, with those that follow from others: 'small' is always trained, and encoders are trained on pixels."""
    finetune_encoder = args.finetune_encoder or args.encoder == "small"
    from_pixels = args.from_pixels or finetune_encoder
    return Namespace(**vars(args) | {"finetune_encoder": finetune_encoder, "from_pixels": from_pixels})


def open_data(settings, split, augment=False):
    """CaptionDataset of one split, with pixels if settings.from_pixels, else with stored features.

    augment: augment images. InputError if features are not stored."""
    options = {"seed": settings.seed, "captions_per_step": settings.captions_per_step}
    if settings.from_pixels:
        return CaptionDataset(settings.data_folder, settings.dataset, split, augment=augment,
                              image_size=encoders.IMAGE_SIZE[settings.encoder], **options)
    alternative = "" if settings.encoder == "bottom_up" else ", or train with --from_pixels"
    return open_features_of(settings.data_folder, settings.dataset, split, settings.encoder, alternative, **options)


def make_model(args, vocabulary, feature_dim=2048):
    """A new model, with --encoder_weights in its encoder; feature_dim: channels C of region features.

    InputError if --hidden_dim is not a multiple of --num_head, or the model does not fit into the main memory."""
    if args.model_type == "aoa" and args.hidden_dim % args.num_head:
        raise InputError(f"--hidden_dim {args.hidden_dim} must be a multiple of --num_head {args.num_head}")
    config = {"vocab_size": len(vocabulary), "embed_dim": args.embed_dim, "hidden_dim": args.hidden_dim,
              "encoder": None if args.encoder == "bottom_up" else args.encoder, "feature_dim": feature_dim}
    config |= {"attention_dim": args.attention_dim} if args.model_type == "gridtd" else {"num_head": args.num_head}
    if args.dropout is not None:
        config["dropout"] = args.dropout
    with torch.device("meta"):      # without allocating memory
        size = sum(parameter.numel() for parameter in model_class(args.model_type)(**config).parameters())
    check_memory(BYTES_PER_PARAMETER * size, f"training a model of {size:,} parameters",
                 "lower --embed_dim, --hidden_dim or --attention_dim")
    model = model_class(args.model_type)(**config)
    if model.encoder is not None:
        model.encoder = encoders.build(args.encoder, args.encoder_weights).to(memory_format=torch.channels_last)
    return model


def make_logger(*_):
    return None


def main(args):
    processes.start()
    settings = complete_settings(args)
    print_settings(settings)
    if settings.encoder == "bottom_up" and settings.from_pixels:
        raise InputError("--encoder bottom_up has no pixels: omit --from_pixels and --finetune_encoder")
    device = pick_device(settings.device)
    set_seed(settings.seed)
    record_run(settings.save_path, settings, "train.py")
    train_data, val_data = open_data(settings, "train", augment=True), open_data(settings, "val")
    vocabulary = train_data.vocabulary
    feature_dim = [train_data.feature_dim] if settings.encoder == "bottom_up" else []
    model = make_model(settings, vocabulary, *feature_dim)
    for data in (train_data, val_data):
        if data.features:
            check_features(data, model)
    model = model.to(device)
    loss_function = teacher_forced_loss(vocabulary, ss_prob=settings.ss_prob, region_weight=settings.region_loss,
                                        region_epochs=settings.region_epochs,
                                        label_smoothing=settings.label_smoothing)
    options = TrainingOptions.from_settings(settings)
    on_epoch = make_logger(settings, model, vocabulary, val_data, device)
    best = fit(options, model, vocabulary, train_data, val_data, loss_function, device, on_epoch=on_epoch)
    print(f"best validation CIDEr {best:.3f}: {settings.save_path}/checkpoint_best.pth", flush=True)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
