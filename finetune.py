"""Fine-tunes a captioning model with explanations, self-critical training, or both.

Example: python finetune.py --weight output/demo/checkpoint_best.pth --erase_tune
The modes are described in docs/method.md, section 7."""
if __name__ == "__main__":
    import captioning.interrupt  # noqa: F401 (before the slow imports)

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

from torch import nn

import train
from captioning import checkpoint, cli, processes
from captioning.captioner import model_type
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.lrp_inference import stop_mask
from captioning.files import check_memory, expect, fingerprint, reading
from captioning.metrics.object_words import load_objects, stop_words
from captioning.runs import record_run
from captioning.training.erasure import EVIDENCE, FILL, ErasureLoss
from captioning.training.losses import CrossEntropy, LRPInferenceLoss
from captioning.training.reward import CiderD, frequencies_path
from captioning.training.scst import SCST
from captioning.training.state import current_flags

MODES = {"erase_tune": "cross-entropy, and words are unlearned where their own evidence is erased "
                       "from the image",
         "lrp_tune": "cross-entropy of p and of the LRP-inference p̃",
         "cider_tune": "self-critical training with CIDEr-D",
         "lrp_cider_tune": "self-critical training of captions sampled with LRP-inference",
         "ce_tune": "control: cross-entropy, as in training"}
SELF_CRITICAL = ("cider_tune", "lrp_cider_tune")
ERASE_WEIGHT = {"gridtd": 0.1, "aoa": 0.3}      # which suited them best (docs/results.md)
SIZES = ("embed_dim", "hidden_dim", "attention_dim", "num_head")        # fixed by the model
# flags whose default is the checkpoint's value
FROM_CHECKPOINT = ("dataset", "data_folder", "model_type", "encoder", *SIZES, "finetune_encoder",
                   "from_pixels", "dropout", "attention_dropout", "batch_size",
                   "captions_per_epoch", "weight_decay", "grad_clip", "amp")


def get_args_parser():
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("fine-tuning mode")
    add = group.add_argument
    add("--weight", metavar="CHECKPOINT", required=True, help="checkpoint to start from")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    modes = group.add_mutually_exclusive_group(required=True)
    for mode, description in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode,
                           help=description)
    add("--erase_weight", type=cli.non_negative, help="erase_tune: weight μ of the unlikelihood of "
        "the word on the erased image (default: 0.1 for gridtd, 0.3 for aoa, 0.2 for others)")
    add("--erase_keep_weight", type=cli.non_negative, default=0.1, help="erase_tune: weight κ of "
        "the cross-entropy of the caption without the word's noun phrase on the erased image")
    add("--erase_share", type=cli.fraction, default=0.2, help="erase_tune: share of the image's "
        "regions to erase")
    add("--erase_evidence", choices=EVIDENCE, default="lrp", help="erase_tune: relevance that "
        "selects the regions")
    add("--erase_own_evidence", action=BooleanOptionalAction, default=True,
        help="erase_tune: erase only regions that are more relevant for the word than for the "
        "caption's other object words")
    add("--erase_fill", choices=FILL, default="background", help="erase_tune: what replaces an "
        "erased region: a random one of the image's least relevant regions, the mean of the "
        "remaining regions, or zero")
    add("--erase_every", metavar="N", type=cli.positive_int, default=1, help="erase_tune: erase "
        "evidence only in every N-th step, with N times the weight: for speed")
    add("--synonyms", metavar="FILE", help="erase_tune: file with one line per object category: "
        "its name and its synonyms, separated by commas (default: the data set's objects or "
        "captioning/metrics/coco_objects.txt)")
    add("--lrp_weight", type=cli.non_negative, default=1.0, help="weight λ of the cross-entropy of "
        "p̃")
    add("--stop_words", metavar="FILE", help="text file of words that LRP-inference does not "
        "re-weight, separated by white space (default: captioning/metrics/stop_words.txt)")
    add("--baseline", choices=["greedy", "mean"], default="greedy", help="baseline of a sampled "
        "caption's reward: the reward of the greedy caption, or the mean reward of the image's "
        "other samples")
    add("--samples", type=cli.positive_int, default=1, help="sampled captions per image")
    train.add_training(parser)

    parser.set_defaults(**dict.fromkeys(FROM_CHECKPOINT), save_path=None, epochs=10,
                        decoder_lr=1e-4, encoder_lr=1e-5)
    for action in parser._actions:
        if action.dest in FROM_CHECKPOINT:
            action.help = action.help.split(" (default")[0] + " (default: as in the checkpoint)"
        elif action.dest == "save_path":
            action.help += " (default: the checkpoint's folder, followed by _ and the mode)"
        elif action.dest == "epochs":
            action.help = "maximum number of epochs"
    return parser


def with_recorded_flags(args, content, model):
    """`args`, in which flags that were not given have the values that the checkpoint recorded.

    content: the checkpoint's; InputError if it records a value that train.py would not accept, or
    if a given flag contradicts the model."""
    settings = Namespace(**vars(args))
    recorded = current_flags((content.get("training") or {}).get("flags", {}))
    fixed = {"model_type": model_type(model),
             "encoder": model.config["encoder"] or "bottom_up"}
    fixed |= {name: model.config[name] for name in SIZES if name in model.config}
    for action in train.get_args_parser()._actions:
        name = action.dest
        if name not in FROM_CHECKPOINT:
            continue
        given = getattr(args, name)
        if name in fixed and given not in (None, fixed[name]):
            raise InputError(f"{args.weight} has --{name} {fixed[name]}, not {given}: omit the "
                             "flag")
        if name in fixed:
            setattr(settings, name, fixed[name])
        elif given is None and recorded.get(name) is None:
            setattr(settings, name, action.default)
        elif given is None:
            value = recorded[name]
            with reading(args.weight, f"give --{name}, or another checkpoint"):
                expect(action.type(str(value)) == value if action.type
                       else type(value) is type(action.default), f"it records {value!r}")
            setattr(settings, name, value)
    return settings


def complete(settings):
    """Sets what follows from the flags; InputError for flags that contradict each other."""
    mode = settings.mode
    if settings.encoder == "bottom_up" and (settings.from_pixels or settings.finetune_encoder):
        raise InputError(f"{settings.weight} reads region features: omit --from_pixels and "
                         "--finetune_encoder")
    settings.from_pixels = settings.from_pixels or settings.finetune_encoder
    folder = Path(settings.weight).parent
    settings.save_path = settings.save_path or f"{folder}_{mode}"
    if folder.resolve() == Path(settings.save_path).resolve():
        raise InputError(f"--save_path {settings.save_path} contains the checkpoint to start from: "
                         "choose another folder")
    if settings.erase_weight is None:
        settings.erase_weight = ERASE_WEIGHT.get(settings.model_type, 0.2)
    if mode == "lrp_tune" and settings.label_smoothing:
        raise InputError("--lrp_tune trains without label smoothing: omit --label_smoothing")
    of_cross_entropy = (settings.ss_prob or settings.region_loss or settings.region_epochs
                        or settings.label_smoothing)
    if of_cross_entropy and mode in ("erase_tune", *SELF_CRITICAL):
        raise InputError(f"--{mode} has a loss of its own: omit --ss_prob, --region_loss, "
                         "--region_epochs and --label_smoothing")
    if mode in SELF_CRITICAL:
        if settings.baseline == "mean" and settings.samples == 1:
            raise InputError("--baseline mean compares samples of the same image: give --samples 2 "
                             "or more")
        settings.captions_per_epoch = None      # all captions of an image are references


def set_dropout(model, settings):
    """Sets the dropout to --dropout and --attention_dropout; in self-critical training to 0, so
    that the distribution that is trained is the one that captions are sampled from."""
    if settings.mode in SELF_CRITICAL:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return
    if settings.dropout is not None:
        model.dropout.p = settings.dropout
    if settings.attention_dropout is not None and "attention_dropout" in model.config:
        model.attention_dropout.p = settings.attention_dropout


def stop_word_ids(path, vocabulary):
    """The set of ids of the words in the text file, and of the special tokens."""
    words = {vocabulary.wordmap[word] for word in stop_words(path) if word in vocabulary.wordmap}
    return words.union(vocabulary.special)


def make_loss(settings, model, vocabulary, data, device):
    """The loss of the mode, as captioning/training/losses.py describes losses.

    Fingerprints of the words that it reads from a file are added to the settings."""
    stop = None
    if settings.mode in ("lrp_tune", "lrp_cider_tune"):
        ids = stop_word_ids(settings.stop_words, vocabulary)
        settings.stop_words_fingerprint = fingerprint(sorted(ids))
        stop = stop_mask(model, ids)
    if settings.mode in SELF_CRITICAL:
        return self_critical_loss(settings, vocabulary, data, stop)
    if settings.mode == "erase_tune":
        objects = load_objects(settings.data_folder, settings.dataset, {}, settings.synonyms)
        categories = objects.category_ids(vocabulary).to(device)
        if (categories < 0).all():
            raise InputError("the vocabulary contains no object word, so that --erase_tune has "
                             "nothing to erase: give the object words with --synonyms")
        settings.object_words_fingerprint = fingerprint(categories.tolist())
        options = {name.removeprefix("erase_"): value for name, value in vars(settings).items()
                   if name.startswith("erase_")}
        return ErasureLoss(vocabulary, categories=categories, **options)
    options = {"ss_prob": settings.ss_prob, "region_weight": settings.region_loss,
               "region_epochs": settings.region_epochs}
    if settings.mode == "lrp_tune":
        return LRPInferenceLoss(vocabulary, stop=stop, weight=settings.lrp_weight, **options)
    return CrossEntropy(vocabulary, label_smoothing=settings.label_smoothing, **options)


def self_critical_loss(settings, vocabulary, data, stop):
    """SCST; InputError if an image has no reference that is not empty, or samples do not fit."""
    data.captions = data.own_captions()
    empty = (data.captions[..., 2] == 0).all(1).nonzero()       # <start> and <end> alone
    if len(empty):
        raise InputError(f"{data.names[empty[0]]} has no reference to compute a reward from: add "
                         "captions and run preparedataset.py again")
    reward = CiderD(frequencies_path(settings.data_folder, settings.dataset), len(vocabulary))
    max_len = data.captions.shape[-1] - 1
    # of every word of every sample: its logit, log-probability and gradient, of 4 bytes each
    size = 12 * settings.batch_size * settings.samples * max_len * len(vocabulary)
    check_memory(size, f"--samples {settings.samples} with --batch_size {settings.batch_size}",
                 "lower one of them")
    return SCST(vocabulary, reward, max_len, settings.samples, settings.baseline, stop)


def main(args):
    processes.start()
    device = pick_device(args.device)
    cli.print_settings(args, get_args_parser(), device)
    content = checkpoint.read(args.weight)
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap, content=content)
    settings = with_recorded_flags(args, content, model)
    complete(settings)
    print(f"of the checkpoint: {settings.model_type} with {settings.encoder}, data set "
          f"{settings.dataset}; output: {settings.save_path}", flush=True)
    cli.set_seed(settings.seed)
    record_run(settings.save_path, settings, "finetune.py")

    train_data = train.open_split(settings, "train")
    val_data = train.open_split(settings, "val")
    if train_data.vocabulary.wordmap != vocabulary.wordmap:
        raise InputError(f"{settings.data_folder}/{settings.dataset} has another vocabulary than "
                         f"{args.weight}: give the data set that it was trained on with --dataset "
                         "and --data_folder")
    set_dropout(model, settings)
    loss = make_loss(settings, model, vocabulary, train_data, device)
    train.start_training(settings, model, vocabulary, train_data, val_data, loss, device)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
