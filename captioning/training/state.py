"""The state of a training run: what checkpoints hold besides the model, saving and resuming."""
import contextlib
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from captioning import checkpoint, processes
from captioning.cli import RENAMED
from captioning.errors import InputError
from captioning.files import expect, reading
from captioning.training.log import columns, write_log

# flags that must not change when a run is resumed; control: of a study of fine-tuning
FIXED_FLAGS = ("weight", "mode", "lrp_weight", "samples", "baseline", "dataset", "model_type",
               "encoder", "finetune_encoder", "embed_dim", "hidden_dim", "num_head", "batch_size",
               "captions_per_epoch", "seed", "ss_prob", "region_loss", "region_epochs",
               "label_smoothing", "amp", "weight_decay", "dropout", "attention_dropout",
               "from_pixels", "frozen_layers", "decoder_lr", "encoder_lr", "lr_schedule",
               "grad_clip", "control")
ERASE_FLAGS = ("erase_weight", "erase_keep_weight", "erase_share", "erase_fill", "erase_every",
               "erase_evidence", "erase_own_evidence", "synonyms")
# what differs if the fingerprint of a file's content does
FINGERPRINTS = {"data_fingerprint": "other data (captions or images of the data set)",
                "stop_words_fingerprint": "other words in the file of --stop_words",
                "object_words_fingerprint": "other object words (of the data set or --synonyms)"}
MODES = ("erase_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "ce_tune")


def new_state():
    """The progress of a run that has not started: plain types, which a checkpoint can contain.

    epoch: number of completed epochs. Of the current epoch: step, the number of completed steps;
    sums of loss, correct words and words; seconds of training. best: highest validation CIDEr;
    bad_epochs: epochs since then. log: rows of log.csv."""
    return {"epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "best": -1.0, "bad_epochs": 0,
            "seconds": 0.0, "log": []}


@dataclass
class Saver:
    """A training run, and how its checkpoints are written; of several processes the first one
    writes."""
    settings: object
    model: object
    vocabulary: object
    optimizer: object
    scaler: object
    state: dict             # see new_state
    stop_requests: list     # empty until the user asks the run to stop
    saved_at: float = field(default_factory=time.monotonic)

    def save(self, name="checkpoint_last.pth"):
        """Writes a checkpoint to the run's folder."""
        self.saved_at = time.monotonic()
        if processes.rank():
            return
        flags = {flag: value for flag, value in vars(self.settings).items()
                 if isinstance(value, bool | int | float | str | None)}
        training = {"state": self.state, "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(), "flags": flags,
                    "from_features": not self.settings.from_pixels}
        path = Path(self.settings.save_path) / name
        checkpoint.save(path, self.model, self.vocabulary, training)

    def is_due(self):
        """Whether all processes save now: in one of them, a stop was requested, or the last
        checkpoint is --save_every minutes old."""
        age = time.monotonic() - self.saved_at
        return processes.any_of(self.stop_requests or age > 60 * self.settings.save_every)

    def save_and_stop_if_requested(self):
        """Writes checkpoint_last.pth; afterwards KeyboardInterrupt if any process is to stop."""
        self.save()
        if processes.any_of(self.stop_requests):
            flag = "" if self.settings.resume == "auto" else " with --resume auto"
            raise KeyboardInterrupt("interrupted: the training state is in "
                                    f"{self.settings.save_path}/checkpoint_last.pth; run the same "
                                    f"command again{flag} to resume")


@contextlib.contextmanager
def catch_stop_requests():
    """Yields a list, to which Ctrl-C and SIGTERM append instead of ending the process.

    A second Ctrl-C ends it."""
    requests = []

    def request_stop(number, frame):
        requests.append(number)
        if processes.count() == 1:      # torchrun sends a second signal
            signal.signal(signal.SIGINT, handlers[signal.SIGINT])

    handlers = {number: signal.signal(number, request_stop)
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def resume(settings, model, vocabulary, optimizer, scaler, measure, batches):
    """Loads the checkpoint that --resume selects and returns its training state, or None.

    It is checked before anything is loaded or written: InputError if it belongs to a run with other
    settings, another model or vocabulary, or is damaged. batches: number of batches of an epoch."""
    last = Path(settings.save_path) / "checkpoint_last.pth"
    best = Path(settings.save_path) / "checkpoint_best.pth"
    if settings.resume == "never" or (settings.resume == "auto" and not last.exists()):
        return None
    path = last if settings.resume == "auto" else Path(settings.resume)

    # the door: in this order, as the optimizer's state depends on flags and model
    content = checkpoint.read(path)
    training = content.get("training")
    if not training:
        raise InputError(f"{path} contains no training state to resume from: use --resume never")
    check_flags(path, training.get("flags", {}), vars(settings))
    new_run = "choose another --save_path, or add --resume never to overwrite it"
    if content["config"] != model.config or content["wordmap"] != vocabulary.wordmap:
        raise InputError(f"{path} contains a model of other sizes or another vocabulary: {new_run}")
    with reading(path, "give another checkpoint with --resume FILE, or start again with --resume "
                       "never"):
        check_progress(training, optimizer, batches)
    encoder = {name: value for name, value in model.state_dict().items()
               if name.startswith("encoder.") and not settings.finetune_encoder}
    if not all(torch.equal(content["state_dict"][name].to(value), value)
               for name, value in encoder.items()):
        raise InputError(f"{path} was trained with other weights of the encoder: give its "
                         "--encoder_weights or --weight, and its features, to resume that run; for "
                         f"a new run, {new_run}")

    # the optimizer's own settings, with the recorded moments and learning rates
    groups = optimizer.state_dict()["param_groups"]
    for group, recorded in zip(groups, training["optimizer"]["param_groups"], strict=True):
        group["lr"] = recorded["lr"]
    optimizer.load_state_dict({"state": training["optimizer"]["state"], "param_groups": groups})
    model.load_state_dict(content["state_dict"])
    if scaler.is_enabled():
        scaler.load_state_dict(training["scaler"])
    state = training["state"]
    if not is_best(best, state) or path.resolve() not in (last.resolve(), best.resolve()):
        state["best"] = -1.0
    if state["log"] and not processes.rank():
        write_log(settings.save_path, state["log"], measure, settings.region_epochs)
    print(f"resuming from {path}: epoch {state['epoch'] + 1}, batch {state['step']}", flush=True)
    return state


def check_progress(training, optimizer, batches):
    """ValueError, or another exception, unless the training state is one that `Saver.save` writes.

    Above all, moments must have the shapes of their parameters: PyTorch does not check this, and
    its fused kernels would write beyond them."""
    state = training["state"]
    # rows of earlier versions lack the last column
    rows = [row + [0.0] * (len(row) == len(columns()) - 1) for row in state["log"]]
    expect(is_like(state | {"log": []}, new_state())
           and is_like(rows, [[0.0] * len(columns())] * len(rows)), "its progress")
    expect(min(state["epoch"], state["bad_epochs"], state["seconds"]) >= 0
           and 0 <= state["step"] <= batches and (not state["step"] or state["sums"][2] > 0),
           "its progress")

    moments = training["optimizer"]["state"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {i: {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
                for i in moments}
    expect(is_like(moments, expected)
           and all(moment["exp_avg_sq"].min() >= 0 for moment in moments.values()), "its moments")
    groups = training["optimizer"]["param_groups"]
    expect([group["params"] for group in groups]
           == [group["params"] for group in optimizer.state_dict()["param_groups"]]
           and is_like([group["lr"] for group in groups], [0.0] * len(groups))
           and is_like(training["scaler"], dict.fromkeys(training["scaler"], 0.0)),
           "its optimizer")


def is_like(value, example):
    """Whether a value has the types, keys, lengths and shapes of the example and is finite."""
    if isinstance(example, dict):
        return (isinstance(value, dict) and value.keys() == example.keys()
                and all(is_like(value[key], example[key]) for key in example))
    if isinstance(example, list):
        return (isinstance(value, list) and len(value) == len(example)
                and all(map(is_like, value, example)))
    if isinstance(example, torch.Tensor):
        # an expanded tensor has less memory than values, beyond which Adam would write
        return (isinstance(value, torch.Tensor) and value.layout == torch.strided
                and value.shape == example.shape and value.is_floating_point()
                and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
                and bool(value.isfinite().all()))
    return type(value) in (int, type(example)) and math.isfinite(value)


def current_flags(recorded):
    """The flags that a checkpoint recorded, {name: value}, with the names of this version."""
    flags = {RENAMED.get(name, name): value for name, value in recorded.items()}
    for mode in MODES:
        if flags.pop(mode, False):
            flags["mode"] = mode
    return flags


def is_best(path, state):
    """Whether the file is the best checkpoint of the run with this state: not missing, damaged, or
    of another run, whose log differs."""
    try:
        with reading(path):
            other = checkpoint.read(path)["training"]["state"]
            rows = min(len(other["log"]), len(state["log"]))
            return other["best"] >= state["best"] and other["log"][:rows] == state["log"][:rows]
    except InputError:
        return False


def check_flags(path, recorded, current):
    """InputError if fixed flags differ between a checkpoint (recorded) and this run (current)."""
    recorded = current_flags(recorded)
    fixed = FIXED_FLAGS + (ERASE_FLAGS if current.get("mode") == "erase_tune" else ())
    differences = [f"--{flag} {recorded.get(flag)}, not {current.get(flag)}" for flag in fixed
                   if recorded.get(flag) != current.get(flag)]
    # checkpoints of earlier versions have no fingerprint
    differences += [what for name, what in FINGERPRINTS.items()
                    if recorded.get(name) not in (None, current.get(name))]
    if differences:
        raise InputError(f"{path} was trained with {' and '.join(differences)}: give the same "
                         "flags to resume that run; for a new run, choose another --save_path, or "
                         "add --resume never to overwrite it")
