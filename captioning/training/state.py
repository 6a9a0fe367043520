"""The state of a training run: what checkpoints contain besides the model, when they are written, and resuming."""
import time
from pathlib import Path

from captioning import checkpoint
from captioning.errors import InputError
from captioning.training.log import write_log

# flags that must not change when a run is resumed
FIXED_FLAGS = ("weight", "ce_tune", "erase_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "lrp_weight", "samples",
               "baseline", "erase_weight", "keep_weight", "erase_share", "synonyms",
               "dataset", "model_type", "encoder", "finetune_encoder", "embed_dim", "hidden_dim", "num_head",
               "batch_size", "captions_per_step", "seed", "ss_prob", "region_loss", "region_epochs",
               "label_smoothing", "amp", "weight_decay", "dropout", "from_pixels", "decoder_lr", "encoder_lr",
               "lr_schedule", "grad_clip")


def new_state():
    """The progress of a training run that has not started: plain types, which a checkpoint can contain.

    epoch: number of completed epochs. Of the current epoch: step, the number of completed steps; sums of loss, correct
    words and words; seconds of training. best: highest validation CIDEr; bad_epochs: epochs since then. log: rows of
    log.csv.
    """
    return {"epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "best": -1.0, "bad_epochs": 0, "seconds": 0.0, "log": []}


class Saver:
    """Writes checkpoints of a training run.

    stop_requests: a list that is empty until the user asks the run to stop.
    """

    def __init__(self, options, model, vocabulary, optimizer, scaler, state, stop_requests):
        self.options, self.model, self.vocabulary, self.state = options, model, vocabulary, state
        self.optimizer, self.scaler, self.stop_requests = optimizer, scaler, stop_requests
        self.saved_at = time.monotonic()

    def save(self, name="checkpoint_last.pth"):
        """Writes a checkpoint to the run's folder."""
        training = {"state": self.state, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                    "flags": self.options.flags, "from_features": self.options.from_features}
        checkpoint.save(Path(self.options.save_path) / name, self.model, self.vocabulary, training)
        self.saved_at = time.monotonic()

    def is_due(self):
        """Whether to save now: a stop was requested, or the last checkpoint is --save_every minutes old."""
        return bool(self.stop_requests) or time.monotonic() - self.saved_at > 60 * self.options.save_every

    def save_and_stop_if_requested(self):
        """Writes checkpoint_last.pth; raises KeyboardInterrupt afterwards if a stop was requested."""
        self.save()
        if self.stop_requests:
            resume_flag = "" if self.options.resume == "auto" else " with --resume auto"
            raise KeyboardInterrupt(f"interrupted: the training state is in {self.options.save_path}/"
                                    f"checkpoint_last.pth; run the same command again{resume_flag} to resume")


def resume(options, model, vocabulary, optimizer, scaler, measure):
    """Loads the checkpoint that --resume selects into model, optimizer and scaler, and returns its training state.

    Returns None if there is no checkpoint to resume from; InputError if the checkpoint belongs to a run with other
    settings, another model or another vocabulary.
    """
    last = Path(options.save_path) / "checkpoint_last.pth"
    if options.resume == "never" or (options.resume == "auto" and not last.exists()):
        return None
    path = last if options.resume == "auto" else options.resume
    content = checkpoint.read(path)
    training = content.get("training")
    if not training:
        raise InputError(f"{path} contains no training state to resume from: use --resume never")
    check_flags(path, training["flags"], options.flags)
    if content["config"] != model.config or content["wordmap"] != vocabulary.wordmap:
        raise InputError(f"{path} contains a model of other sizes or another vocabulary: choose another --save_path, "
                         "or add --resume never to overwrite it")
    model.load_state_dict(content["state_dict"])
    optimizer.load_state_dict(training["optimizer"])
    scaler.load_state_dict(training["scaler"])
    state = training["state"]
    if not (Path(options.save_path) / "checkpoint_best.pth").exists():
        state["best"] = -1.0
    if state["log"]:
        write_log(options.save_path, state["log"], measure, options.region_epochs)
    print(f"resuming from {path}: epoch {state['epoch'] + 1}, batch {state['step']}", flush=True)
    return state


def check_flags(path, recorded, current):
    """InputError if flags that must not change differ between a checkpoint (recorded) and this run (current)."""
    differences = [f"--{flag} {recorded.get(flag)}, not {current.get(flag)}" for flag in FIXED_FLAGS
                   if recorded.get(flag) != current.get(flag)]
    # checkpoints of earlier versions have no fingerprint
    if recorded.get("stop_words_fingerprint") not in (None, current.get("stop_words_fingerprint")):
        differences.append("other words in the file of --stop_words")
    if differences:
        raise InputError(f"{path} was trained with {' and '.join(differences)}: give the same flags to resume that "
                         "run; for a new run, choose another --save_path, or add --resume never to overwrite it")
