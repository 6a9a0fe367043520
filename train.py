"""Trains a captioning model with cross-entropy: python train.py --dataset demo --model_type gridtd"""
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from captioning.checkpoint import model_class
from captioning.cli import (
    Parser,
    add_device,
    add_seed,
    fraction,
    natural,
    non_negative,
    positive,
    positive_int,
    print_settings,
    set_seed,
)
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.feature_store import check_features
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation import encoders
from captioning.files import make_folder
from captioning.training.loop import fit
from captioning.training.losses import teacher_forced_loss


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="demo", help="name of a data set that preparedataset.py made")
    add("--data_folder", default="data", help="where preparedataset.py wrote it")
    add("--model_type", choices=["gridtd", "aoa"], default="gridtd", help="which captioning model")
    add("--encoder", choices=[*encoders.IMAGE_SIZE, "bottom_up"], default="vgg16",
        help="the CNN, or bottom_up: region features")
    add("--encoder_weights", metavar="FILE", help="the CNN's weights; ImageNet's are downloaded otherwise")
    add("--finetune_encoder", action=BooleanOptionalAction, default=False, help="train the CNN too, on pixels; 'small' "
        "always is")
    add("--from_pixels", action=BooleanOptionalAction, default=False, help="read pictures, with "
        "augmentation, though features are stored")
    add("--embed_dim", type=positive_int, default=512, help="width of word embeddings")
    add("--hidden_dim", type=positive_int, default=512, help="width of LSTMs and attention")
    add("--attention_dim", type=positive_int, default=196, help="gridtd: width of the attention")
    add("--num_head", type=positive_int, default=8, help="aoa: attention heads")
    add("--dropout", type=fraction, help="before the output layer; by default 0.5 for gridtd, 0.3 for aoa")
    add("--batch_size", type=positive_int, default=32, help="pictures a step, each with all its captions")
    add("--captions_per_step", type=positive_int, help="so many of a picture's captions a step, drawn anew each epoch")
    add("--epochs", type=positive_int, default=50, help="at most this many")
    add("--patience", type=positive_int, default=6, help="stop after so many epochs without a better CIDEr")
    add("--decoder_lr", type=positive, default=5e-4, help="learning rate of the decoder")
    add("--encoder_lr", type=positive, default=1e-4, help="learning rate of the CNN")
    add("--lr_schedule", choices=["plateau", "cosine"], default="plateau",
        help="plateau: times 0.8 after two epochs without a better CIDEr; cosine: to zero over all epochs")
    add("--weight_decay", type=non_negative, default=0.0, help="Adam's L2 penalty")
    add("--grad_clip", type=positive, default=0.1, help="largest norm of the gradient")
    add("--ss_prob", type=fraction, default=0.0, help="scheduled sampling: read a predicted word this often")
    add("--region_loss", type=non_negative, default=0.0, help="weight of a loss that makes single regions name what "
        "captions mention: an encoder that starts at random learns faster with it")
    add("--region_epochs", type=natural, default=0, help="train so many epochs on that loss alone, first")
    add("--amp", action=BooleanOptionalAction, default=False, help="mixed precision")
    add("--resume", default="auto", metavar="{auto,never,FILE}", help="auto: go on from save_path/checkpoint_last.pth")
    add("--save_every", type=positive, default=10.0, help="minutes between checkpoints within an epoch")
    add("--save_path", default="output", help="folder of checkpoints, log and curves")
    add("--workers", type=natural, default=2, help="processes that read pictures")
    add_device(parser)
    add_seed(parser)
    return parser


def open_data(args, split, augment=False):
    """The split from stored features, or from pixels when the encoder is trained or pixels are asked for."""
    if not args.from_pixels:
        path = features_path(args.data_folder, args.dataset, split, args.encoder)
        if not Path(path).exists():
            raise InputError(f"{path} is missing: run preparedataset.py --features "
                             f"{'bottom_up' if args.encoder == 'bottom_up' else f'cnn --encoder {args.encoder}'}, or "
                             "train with --from_pixels")
        return CaptionDataset(args.data_folder, args.dataset, split, features=path, seed=args.seed,
                              captions_per_step=args.captions_per_step)
    return CaptionDataset(args.data_folder, args.dataset, split, image_size=encoders.IMAGE_SIZE[args.encoder],
                          augment=augment, seed=args.seed, captions_per_step=args.captions_per_step)


def make_model(args, vocabulary, feature_dim=2048):
    """A new model with --encoder_weights in its encoder, or for region features of the width feature_dim."""
    if args.model_type == "aoa" and args.hidden_dim % args.num_head:
        raise InputError(f"--hidden_dim {args.hidden_dim} must be a multiple of --num_head {args.num_head}")
    sizes = {"vocab_size": len(vocabulary), "embed_dim": args.embed_dim, "hidden_dim": args.hidden_dim,
             "encoder": None if args.encoder == "bottom_up" else args.encoder, "feature_dim": feature_dim}
    if args.dropout is not None:
        sizes["dropout"] = args.dropout
    own = {"attention_dim": args.attention_dim} if args.model_type == "gridtd" else {"num_head": args.num_head}
    model = model_class(args.model_type)(**sizes, **own)
    if model.encoder is not None:
        model.encoder = encoders.build(args.encoder, args.encoder_weights).to(memory_format=torch.channels_last)
    return model


def main(args):
    if args.encoder == "small":
        args.finetune_encoder = True
    args.from_pixels = args.from_pixels or args.finetune_encoder
    if args.encoder == "bottom_up" and args.from_pixels:
        raise InputError("--encoder bottom_up has no pixels: leave out --from_pixels and --finetune_encoder")
    print_settings(args)
    device = pick_device(args.device)
    set_seed(args.seed)
    make_folder(args.save_path)
    train_data, val_data = open_data(args, "train", augment=True), open_data(args, "val")
    vocabulary = train_data.vocabulary
    model = make_model(args, vocabulary, *([train_data.feature_dim] if args.encoder == "bottom_up" else []))
    for data in (train_data, val_data):
        if data.features:
            check_features(data, model)
    model = model.to(device)

    loss_function = teacher_forced_loss(args, vocabulary, train_data)
    best = fit(args, model, vocabulary, train_data, val_data, loss_function, device)
    print(f"best validation CIDEr {best:.3f}: {args.save_path}/checkpoint_best.pth", flush=True)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
