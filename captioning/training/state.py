"""Training state: what checkpoints hold to resume from."""
import time
from pathlib import Path

from captioning import checkpoint
from captioning.errors import InputError
from captioning.training.log import write_log

# flags that may not change between an interruption and the run that goes on
FIXED_FLAGS = ("weight", "ce_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "lrp_weight", "samples", "baseline",
               "dataset", "model_type", "encoder", "finetune_encoder", "embed_dim", "hidden_dim", "num_head",
               "batch_size", "captions_per_step", "seed", "ss_prob", "region_loss", "region_epochs",
               "amp", "weight_decay", "dropout", "from_pixels", "decoder_lr", "encoder_lr", "lr_schedule", "grad_clip")


def new_state():
    """Where a training run stands, of plain types, so that a checkpoint can hold it."""
    return {"epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "best": -1.0, "bad_epochs": 0, "seconds": 0.0, "log": []}


class Saver:
    """Writes checkpoint_last.pth: every args.save_every minutes, at the end of epochs and when asked to stop."""

    def __init__(self, args, model, vocabulary, optimizer, scaler, state):
        self.args, self.model, self.vocabulary, self.state = args, model, vocabulary, state
        self.optimizer, self.scaler, self.saved_at = optimizer, scaler, time.monotonic()

    def save(self, name="checkpoint_last.pth"):
        flags = {key: value for key, value in vars(self.args).items()
                 if isinstance(value, bool | int | float | str | None)}
        training = {"state": self.state, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                    "flags": flags, "from_features": not self.args.from_pixels}
        checkpoint.save(Path(self.args.save_path) / name, self.model, self.vocabulary, training)
        self.saved_at = time.monotonic()

    def save_if_due(self, stop, only_on_request=False):
        if stop:
            self.save()
            again = "" if self.args.resume == "auto" else " with --resume auto"
            raise KeyboardInterrupt(f"interrupted: {self.args.save_path}/checkpoint_last.pth holds everything; run the "
                                    f"same command again{again} to go on")
        if not only_on_request and time.monotonic() - self.saved_at > 60 * self.args.save_every:
            self.save()


def resume(args, model, vocabulary, optimizer, scaler, measure):
    """The state to go on from, model and optimizer loaded, or None; by --resume auto, never or a file."""
    last = Path(args.save_path) / "checkpoint_last.pth"
    if args.resume == "never" or (args.resume == "auto" and not last.exists()):
        return None
    path = last if args.resume == "auto" else args.resume
    content = checkpoint.read(path)
    training = content.get("training")
    if not training:
        raise InputError(f"{path} holds no training state to resume from: use --resume never")
    for flag in FIXED_FLAGS:
        then, now = training["flags"].get(flag), getattr(args, flag, None)
        if then != now:
            raise InputError(f"{path} was trained with --{flag} {then}, not {now}: give the same flags to go on, or "
                             "another --save_path, or --resume never to start anew")
    if content["config"] != model.config or content["wordmap"] != vocabulary.wordmap:
        raise InputError(f"{path} holds a model of other sizes or another vocabulary: use another --save_path, or "
                         "--resume never to start anew")
    model.load_state_dict(content["state_dict"])
    optimizer.load_state_dict(training["optimizer"])
    scaler.load_state_dict(training["scaler"])
    state = training["state"]
    if not (Path(args.save_path) / "checkpoint_best.pth").exists():
        state["best"] = -1.0
    if state["log"]:
        write_log(args.save_path, state["log"], measure)
    print(f"going on from {path}: epoch {state['epoch'] + 1}, batch {state['step']}", flush=True)
    return state
