"""The state of a training run: what checkpoints contain besides the model, when they are written, and resuming."""
import math
import time
from pathlib import Path

import torch

from captioning import checkpoint, processes
from captioning.errors import InputError
from captioning.training.log import columns, write_log
from captioning.weights import check_finite

# flags that must not change when a run is resumed; control: of studies/tuning_controls.py
FIXED_FLAGS = ("weight", "ce_tune", "erase_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "lrp_weight", "samples",
               "baseline", "dataset", "model_type", "encoder", "finetune_encoder", "embed_dim", "hidden_dim",
               "num_head", "batch_size", "captions_per_step", "seed", "ss_prob", "region_loss", "region_epochs",
               "label_smoothing", "amp", "weight_decay", "dropout", "from_pixels", "decoder_lr", "encoder_lr",
               "lr_schedule", "grad_clip", "control")
ERASE_FLAGS = ("erase_weight", "keep_weight", "erase_share", "erase_fill", "erase_every", "evidence", "own_evidence",
               "synonyms")
# what differs if the fingerprint of a file's content does
FINGERPRINTS = {"stop_words_fingerprint": "other words in the file of --stop_words",
                "object_words_fingerprint": "other object words (those of the data set or of --synonyms)"}


def new_state():
    """The progress of a training run that has not started: plain types, which a checkpoint can contain.

    epoch: number of completed epochs. Of the current epoch: step, the number of completed steps; sums of loss, correct
    words and words; seconds of training. best: highest validation CIDEr; bad_epochs: epochs since then. log: rows of
    log.csv.
    """
    return {"epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "best": -1.0, "bad_epochs": 0, "seconds": 0.0, "log": []}


class Saver:
    """Writes checkpoints of a training run; of several processes the first one writes.

    stop_requests: a list that is empty until the user asks the run to stop.
    """

    def __init__(self, options, model, vocabulary, optimizer, scaler, state, stop_requests):
        self.options, self.model, self.vocabulary, self.state = options, model, vocabulary, state
        self.optimizer, self.scaler, self.stop_requests = optimizer, scaler, stop_requests
        self.saved_at = time.monotonic()

    def save(self, name="checkpoint_last.pth"):
        """Writes a checkpoint to the run's folder."""
        self.saved_at = time.monotonic()
        if processes.rank():
            return
        training = {"state": self.state, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                    "flags": self.options.flags, "from_features": self.options.from_features}
        checkpoint.save(Path(self.options.save_path) / name, self.model, self.vocabulary, training)

    def is_due(self):
        """Whether all processes save now: in one of them, a stop was requested, or the last checkpoint is --save_every
        minutes old."""
        return processes.any_of(self.stop_requests or time.monotonic() - self.saved_at > 60 * self.options.save_every)

    def save_and_stop_if_requested(self):
        """Writes checkpoint_last.pth; raises KeyboardInterrupt afterwards if a stop was requested in any process."""
        self.save()
        if processes.any_of(self.stop_requests):
            resume_flag = "" if self.options.resume == "auto" else " with --resume auto"
            raise KeyboardInterrupt(f"interrupted: the training state is in {self.options.save_path}/"
                                    f"checkpoint_last.pth; run the same command again{resume_flag} to resume")


def resume(options, model, vocabulary, optimizer, scaler, measure, batches):
    """Loads the checkpoint that --resume selects into model, optimizer and scaler, and returns its training state.

    batches: number of batches of an epoch. Returns None if there is no checkpoint to resume from; InputError if the
    checkpoint belongs to a run with other settings, another model or another vocabulary.
    """
    last, best = (Path(options.save_path) / f"checkpoint_{name}.pth" for name in ("last", "best"))
    if options.resume == "never" or (options.resume == "auto" and not last.exists()):
        return None
    path = last if options.resume == "auto" else options.resume
    content = checkpoint.read(path)
    if not content.get("training"):
        raise InputError(f"{path} contains no training state to resume from: use --resume never")
    training = checked_training(content["training"], path, batches)
    check_flags(path, training["flags"], options.flags)
    if content["config"] != model.config or content["wordmap"] != vocabulary.wordmap:
        raise InputError(f"{path} contains a model of other sizes or another vocabulary: choose another --save_path, "
                         "or add --resume never to overwrite it")
    if not options.finetune_encoder:
        check_encoder(content["state_dict"], model, path)
    optimizer_state = checked_optimizer(training["optimizer"], optimizer, path)
    model.load_state_dict(content["state_dict"])
    optimizer.load_state_dict(optimizer_state)
    if scaler.is_enabled():
        scaler.load_state_dict(training["scaler"])
    state = training["state"]
    if not best.exists() or Path(path).resolve() not in (last.resolve(), best.resolve()):
        state["best"] = -1.0        # the folder has no best checkpoint, or that of another run
    if state["log"] and not processes.rank():
        write_log(options.save_path, state["log"], measure, options.region_epochs)
    print(f"resuming from {path}: epoch {state['epoch'] + 1}, batch {state['step']}", flush=True)
    return state


def checked_training(training, path, batches):
    """Returns `training`, the entry of the checkpoint `path`; InputError unless it is what `Saver.save` writes in
    epochs of this many batches.

    The optimizer's state is checked by `checked_optimizer`, since it depends on the model."""
    kinds = {"state": dict, "optimizer": dict, "scaler": dict, "flags": dict}
    if not (isinstance(training, dict) and all(isinstance(training.get(key), kind) for key, kind in kinds.items())):
        raise damaged(path, "training state")
    if not all(isinstance(flag, str) and isinstance(value, bool | int | float | str | None)
               for flag, value in training["flags"].items()):
        raise damaged(path, "list of flags")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in training["scaler"].values()):
        raise damaged(path, "scaler of gradients")
    state, new = training["state"], new_state()
    if not (state.keys() == new.keys() and all(type(state[key]) is type(value) for key, value in new.items())
            and min(state["epoch"], state["step"], state["bad_epochs"], state["seconds"]) >= 0
            and state["step"] <= batches and _are_numbers(state["sums"], 3)
            and (state["step"] == 0 or state["sums"][2] > 0) and _are_numbers([state["best"], state["seconds"]], 2)
            and all(isinstance(row, list) and len(columns()) - len(row) in (0, 1) and _are_numbers(row, len(row))
                    for row in state["log"])):      # rows of earlier versions lack the last column
        raise damaged(path, "progress of the training or its log")
    return training


def _are_numbers(values, count):
    return len(values) == count and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def damaged(path, part):
    """The InputError for a checkpoint whose training state cannot be used."""
    return InputError(f"{path} is damaged (its {part} is not valid): give another checkpoint with --resume FILE, or "
                      "start again with --resume never")


def check_encoder(weights, model, path):
    """InputError if the encoder in the state_dict `weights` is not the model's: then the features are not those that
    the checkpoint was trained with."""
    if not all(torch.equal(weights[name].to(value), value) for name, value in model.state_dict().items()
               if name.startswith("encoder.")):
        raise InputError(f"{path} was trained with other weights of the encoder: give its --encoder_weights or "
                         "--weight, and its features, to resume that run; for a new run, choose another --save_path, "
                         "or add --resume never")


def checked_optimizer(recorded, optimizer, path):
    """The state_dict for `optimizer`, an Adam, with the moments and learning rates of `recorded`, that of the
    checkpoint `path`; InputError unless moments have the shapes of their parameters. PyTorch does not check this, and
    its fused kernels would write beyond the moments."""
    own, groups, states = optimizer.state_dict()["param_groups"], recorded.get("param_groups"), recorded.get("state")
    if not (isinstance(groups, list) and len(groups) == len(own) and isinstance(states, dict)
            and all(isinstance(group, dict) and group.get("params") == expected["params"]
                    and _are_numbers([group.get("lr")], 1) and group["lr"] >= 0
                    for group, expected in zip(groups, own, strict=True))):
        raise damaged(path, "optimizer")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not states.keys() <= set(range(len(parameters))):
        raise damaged(path, "optimizer")
    for i, state in states.items():
        shapes = {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
        if not (isinstance(state, dict) and state.keys() == shapes.keys()
                and all(isinstance(state[name], torch.Tensor) and state[name].shape == shape
                        and state[name].is_floating_point() for name, shape in shapes.items())):
            raise damaged(path, "optimizer")
        check_finite(state, f"the optimizer in {path}")
        if state["step"] < 0 or state["exp_avg_sq"].min() < 0:
            raise damaged(path, "optimizer")
    return {"state": states, "param_groups": [expected | {"lr": group["lr"]}
                                              for group, expected in zip(groups, own, strict=True)]}


def check_flags(path, recorded, current):
    """InputError if flags that must not change differ between a checkpoint (recorded) and this run (current)."""
    fixed = FIXED_FLAGS + (ERASE_FLAGS if current.get("erase_tune") else ())
    differences = [f"--{flag} {recorded.get(flag)}, not {current.get(flag)}" for flag in fixed
                   if recorded.get(flag) != current.get(flag)]
    # checkpoints of earlier versions have no fingerprint
    differences += [what for name, what in FINGERPRINTS.items() if recorded.get(name) not in (None, current.get(name))]
    if differences:
        raise InputError(f"{path} was trained with {' and '.join(differences)}: give the same flags to resume that "
                         "run; for a new run, choose another --save_path, or add --resume never to overwrite it")
