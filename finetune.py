"""Fine-tunes a captioning model with explanations, self-critical training, or both (docs/method.md, section 7).

Example: python finetune.py --weight output/demo/checkpoint_best.pth --erase_tune
"""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path

from torch import nn

import train
from captioning import checkpoint, processes
from captioning.cli import Parser, fraction, non_negative, positive_int, print_settings, set_seed
from captioning.data.feature_store import check_features
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.lrp_inference import lrp_loss, stop_mask
from captioning.files import fingerprint
from captioning.memory import check_memory
from captioning.metrics.object_words import load_objects, stop_words
from captioning.runs import record_run
from captioning.training.erasure import EVIDENCE, FILL, ErasureLoss
from captioning.training.loop import fit
from captioning.training.losses import teacher_forced_loss
from captioning.training.options import TrainingOptions
from captioning.training.reward import CiderD, frequencies_path
from captioning.training.scst import SCST

MODES = ("erase_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "ce_tune")
SIZES = ("embed_dim", "hidden_dim", "attention_dim", "num_head")        # fixed by the model
# flags whose default is the checkpoint's value
FROM_CHECKPOINT = ("dataset", "data_folder", "model_type", "encoder", *SIZES, "finetune_encoder", "from_pixels",
                   "dropout", "batch_size", "captions_per_step", "weight_decay", "grad_clip", "amp")


def get_args_parser():
    parser = Parser(__doc__)
    group = parser.add_argument_group("fine-tuning mode")
    add = group.add_argument
    add("--weight", metavar="CHECKPOINT", required=True, help="checkpoint to start from")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    modes = group.add_mutually_exclusive_group(required=True)
    modes.add_argument("--erase_tune", action="store_true", help="cross-entropy, and words are unlearned where "
                       "their own evidence is erased from the image")
    modes.add_argument("--lrp_tune", action="store_true", help="cross-entropy of p and of the LRP-inference p̃")
    modes.add_argument("--cider_tune", action="store_true", help="self-critical training with CIDEr-D")
    modes.add_argument("--lrp_cider_tune", action="store_true", help="self-critical training of captions sampled with "
                       "LRP-inference")
    modes.add_argument("--ce_tune", action="store_true", help="control: cross-entropy, as in training")
    add("--erase_weight", type=non_negative, default=0.2, help="erase_tune: weight μ of the unlikelihood of the word "
        "on the erased image (docs/experiments.md: 0.1 for gridtd, 0.3 for aoa)")
    add("--keep_weight", type=non_negative, default=0.1, help="erase_tune: weight κ of the cross-entropy of the "
        "caption without the word's noun phrase on the erased image")
    add("--erase_share", type=fraction, default=0.2, help="erase_tune: share of the image's regions to erase")
    add("--evidence", choices=EVIDENCE, default="lrp", help="erase_tune: relevance that selects the regions")
    add("--own_evidence", action=BooleanOptionalAction, default=True, help="erase_tune: erase only regions that are "
        "more relevant for the word than for the caption's other object words")
    add("--erase_fill", choices=FILL, default="background", help="erase_tune: what replaces an erased region: a random "
        "one of the image's least relevant regions, the mean of the remaining regions, or zero")
    add("--erase_every", metavar="N", type=positive_int, default=1, help="erase_tune: erase evidence only in every "
        "N-th step, with N times the weight: for speed")
    add("--synonyms", metavar="FILE", help="erase_tune: file with one line per object category: its name and its "
        "synonyms, separated by commas (default: the data set's objects or captioning/metrics/coco_objects.txt)")
    add("--lrp_weight", type=non_negative, default=1.0, help="weight λ of the cross-entropy of p̃")
    add("--stop_words", metavar="FILE", help="text file of words that LRP-inference does not re-weight, separated by "
        "white space (default: captioning/metrics/stop_words.txt)")
    add("--baseline", choices=["greedy", "mean"], default="greedy", help="baseline of a sampled caption's reward: the "
        "reward of the greedy caption, or the mean reward of the image's other samples")
    add("--samples", type=positive_int, default=1, help="sampled captions per image")
    train.add_training(parser)
    parser.set_defaults(**dict.fromkeys(FROM_CHECKPOINT), save_path=None, epochs=10, decoder_lr=1e-4, encoder_lr=1e-5)
    for action in parser._actions:
        if action.dest in FROM_CHECKPOINT:
            action.help = action.help.split(" (default")[0] + " (default: as in the checkpoint)"
        elif action.dest == "save_path":
            action.help += " (default: the checkpoint's folder, followed by _ and the fine-tuning mode)"
    return parser


def read_flags(recorded, path):
    """The flags of train.py for those that the checkpoint `path` recorded, {flag: value}: FROM_CHECKPOINT as recorded,
    the others with their defaults; InputError if train.py would not accept them."""
    parser, arguments = train.get_args_parser(), []
    for name in sorted(recorded.keys() & set(FROM_CHECKPOINT)):
        value = recorded[name]
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments.append(f"--{name}={value}")

    def fail(message):
        raise InputError(f"the checkpoint {path} is damaged (of its flags, {message}): use another")
    parser.error = fail
    return vars(parser.parse_args(arguments))


def complete_settings(args, model, flags):
    """A namespace of `args` in which flags that were not given have the values of the checkpoint.

    flags: those recorded in the checkpoint. InputError if a given flag contradicts the model or the mode."""
    recorded = read_flags(flags, args.weight)
    fixed = {"model_type": checkpoint.model_type(model), "encoder": model.config["encoder"] or "bottom_up"}
    fixed |= {name: model.config[name] for name in SIZES if name in model.config}
    settings = Namespace(**vars(args))
    for name in FROM_CHECKPOINT:
        given = getattr(args, name)
        if given is None:
            setattr(settings, name, fixed.get(name, recorded[name]))
        elif name in fixed and given != fixed[name]:
            raise InputError(f"{args.weight} has --{name} {fixed[name]}, not {given}: omit the flag")
    if settings.encoder == "bottom_up" and settings.from_pixels:
        raise InputError(f"{args.weight} reads region features: omit --from_pixels and --finetune_encoder")
    settings.from_pixels = settings.from_pixels or settings.finetune_encoder
    mode = next(name for name in MODES if getattr(args, name))
    settings.save_path = args.save_path or f"{Path(args.weight).parent}_{mode}"
    if Path(args.weight).resolve().parent == Path(settings.save_path).resolve():
        raise InputError(f"--save_path {settings.save_path} contains the checkpoint to start from: choose another "
                         "folder")
    if args.lrp_tune and args.label_smoothing:
        raise InputError("--lrp_tune trains without label smoothing: omit --label_smoothing")
    other_loss = args.ss_prob or args.region_loss or args.region_epochs or args.label_smoothing
    if other_loss and (is_self_critical(args) or args.erase_tune):
        raise InputError(f"--{mode} has a loss of its own: omit --ss_prob, --region_loss, --region_epochs and "
                         "--label_smoothing")
    if is_self_critical(args):
        if args.baseline == "mean" and args.samples == 1:
            raise InputError("--baseline mean compares samples of the same image: give --samples 2 or more")
        settings.captions_per_step = None       # all captions are references
    return settings


def is_self_critical(args):
    """Whether the mode is --cider_tune or --lrp_cider_tune."""
    return args.cider_tune or args.lrp_cider_tune


def set_dropout(model, settings):
    """Sets the dropout to --dropout; in self-critical training to 0, so that the distribution that is trained is the
    one that captions are sampled from."""
    if is_self_critical(settings):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    elif settings.dropout is not None:
        model.dropout.p = settings.dropout


def stop_word_ids(path, vocabulary):
    """The set of ids of the `object_words.stop_words` of the text file, and of the special tokens."""
    return {vocabulary.wordmap[word] for word in stop_words(path) if word in vocabulary.wordmap} | {
        vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end}


def check_references(data):
    """InputError that names the first image whose references are all empty."""
    empty = (data.captions[..., 2] == 0).all(1).nonzero()       # <start> and <end> alone
    if len(empty):
        raise InputError(f"{data.names[empty[0]]} has no reference to compute a reward from: add captions and run "
                         "preparedataset.py again")


def make_loss(settings, vocabulary, data, stop, device):
    """The loss function for `fit`, and its measure; stop: bool (V,), the stop words of LRP-inference, or None."""
    if is_self_critical(settings):
        check_references(data)
        reward = CiderD(frequencies_path(settings.data_folder, settings.dataset), len(vocabulary))
        max_len = data.captions.shape[-1] - 1
        # of every word of every sample: its logit, its log-probability and its gradient, of 4 bytes each
        check_memory(12 * settings.batch_size * settings.samples * max_len * len(vocabulary),
                     f"--samples {settings.samples} with --batch_size {settings.batch_size}", "lower one of them")
        return SCST(vocabulary, reward, max_len, settings.samples, settings.baseline, stop), "reward"
    if settings.erase_tune:
        objects = load_objects(settings.data_folder, settings.dataset, {}, settings.synonyms)
        categories = objects.category_ids(vocabulary).to(device)
        if (categories < 0).all():
            raise InputError("the vocabulary contains no object word, so that --erase_tune has nothing to erase: give "
                             "the object words with --synonyms")
        return ErasureLoss(vocabulary, categories, settings.erase_weight, settings.keep_weight, settings.erase_share,
                           settings.evidence, settings.own_evidence, settings.erase_fill,
                           settings.erase_every), "accuracy"
    criterion = partial(lrp_loss, stop=stop, weight=settings.lrp_weight) if settings.lrp_tune else None
    return teacher_forced_loss(vocabulary, criterion, settings.ss_prob, settings.region_loss, settings.region_epochs,
                               settings.label_smoothing), "accuracy"


def main(args, make_loss=make_loss):
    processes.start()
    print_settings(args)
    device = pick_device(args.device)
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    recorded = (checkpoint.read(args.weight).get("training") or {}).get("flags", {})
    settings = complete_settings(args, model, recorded)
    completed = [f"--{name} {value}" for name, value in vars(settings).items() if value != getattr(args, name)]
    print(f"settings completed from the checkpoint: {' '.join(completed)}", flush=True)
    set_seed(settings.seed)
    record_run(settings.save_path, settings, "finetune.py")
    train_data, val_data = train.open_data(settings, "train", augment=True), train.open_data(settings, "val")
    if train_data.vocabulary.wordmap != vocabulary.wordmap:
        raise InputError(f"{settings.data_folder}/{settings.dataset} has another vocabulary than {args.weight}: give "
                         "the data set that it was trained on with --dataset and --data_folder")
    for data in (train_data, val_data):
        if data.features:
            check_features(data, model)
    set_dropout(model, settings)
    stop, fingerprints = None, {}
    if settings.lrp_tune or settings.lrp_cider_tune:
        stop_ids = stop_word_ids(settings.stop_words, vocabulary)
        stop = stop_mask(model, stop_ids)
        fingerprints = {"stop_words_fingerprint": fingerprint(sorted(stop_ids))}
    loss_function, measure = make_loss(settings, vocabulary, train_data, stop, device)
    if settings.erase_tune:
        fingerprints = {"object_words_fingerprint": fingerprint(loss_function.categories.tolist())}
    options = TrainingOptions.from_settings(settings, **fingerprints)
    on_epoch = train.make_logger(settings, model, vocabulary, val_data, device)
    best = fit(options, model, vocabulary, train_data, val_data, loss_function, device, measure, on_epoch)
    print(f"best validation CIDEr {best:.3f}: {settings.save_path}/checkpoint_best.pth", flush=True)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
