"""What training and fine-tuning share: the loop over epochs with validation, checkpoints, resuming and the log."""
import contextlib
import math
import signal
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioning import checkpoint, decoding
from captioning.dataset import collate
from captioning.errors import InputError
from captioning.log import write_log

# flags that may not change between an interruption and the run that goes on
FIXED_FLAGS = ("weight", "ce_tune", "lrp_tune", "cider_tune", "lrp_cider_tune", "lrp_weight", "samples", "baseline",
               "dataset", "model_type", "encoder", "finetune_encoder", "embed_dim", "hidden_dim", "num_head",
               "batch_size", "captions_per_step", "seed", "ss_prob", "region_loss", "region_epochs",
               "amp", "weight_decay", "dropout", "from_pixels", "decoder_lr", "encoder_lr", "lr_schedule", "grad_clip")


def new_state():
    """Where a training run stands, of plain types, so that a checkpoint can hold it."""
    return {"epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "best": -1.0, "bad_epochs": 0, "seconds": 0.0, "log": []}


def fit(args, model, vocabulary, train_data, val_data, loss_function, device, measure="accuracy"):
    """Trains until args.epochs or args.patience; returns the best validation CIDEr.

    loss_function(model, features, captions) -> (loss, number of right words, number of words), of tensors; where
    `measure` is "reward", the summed reward and the number of samples.
    Every random choice is a function of (seed, epoch, step), so a run that was interrupted ends with the same weights.
    """
    optimizer = make_optimizer(args, model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and amp_dtype(device) == torch.float16)
    state = resume(args, model, vocabulary, optimizer, scaler, measure) or new_state()
    saver = Saver(args, model, vocabulary, optimizer, scaler, state)
    with stop_requests() as stop:
        while state["epoch"] < args.epochs and state["bad_epochs"] < args.patience:
            train_epoch(args, model, train_data, loss_function, device, optimizer, scaler, state, saver, stop,
                        measure)
            metrics = validate(args, model, vocabulary, val_data, device, stop, saver)
            end_epoch(args, state, metrics, optimizer, saver, measure)
    return state["best"]


def make_optimizer(args, model, device):
    """Adam over the decoder and, with --finetune_encoder, the encoder at its own learning rate."""
    encoder = list(model.encoder.parameters()) if model.encoder is not None else []
    for parameter in encoder:
        parameter.requires_grad_(args.finetune_encoder)
    known = {id(parameter) for parameter in encoder}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "lr": args.decoder_lr}]
    if encoder and args.finetune_encoder:
        groups.append({"params": encoder, "lr": args.encoder_lr})
    return torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=device.type in ("cpu", "cuda"))


def train_epoch(args, model, data, loss_function, device, optimizer, scaler, state, saver, stop, measure):
    """The rest of the epoch from state["step"] on."""
    model.train()
    data.set_epoch(state["epoch"])
    batches = epoch_batches(len(data), args.batch_size, args.seed, state["epoch"])
    loader = make_loader(data, batches[state["step"]:], args.workers, device)
    bar = tqdm(loader, initial=state["step"], total=len(batches), desc=f"epoch {state['epoch'] + 1}", unit="batch")
    totals = torch.tensor(state["sums"], dtype=torch.float64)
    started = time.monotonic()
    for batch in bar:
        if args.lr_schedule == "cosine":
            anneal(args, optimizer, state["epoch"] + state["step"] / len(batches))
        torch.manual_seed(step_seed(args.seed, state["epoch"], state["step"]))
        sums, norm = train_step(args, model, batch, loss_function, device, optimizer, scaler).split([3, 1])
        state["step"] += 1
        if not sums.isfinite().all() or not (scaler.is_enabled() or norm.isfinite()):
            raise InputError(f"the loss or its gradient is not a number any more at epoch {state['epoch'] + 1}, step "
                             f"{state['step']}: lower --decoder_lr {args.decoder_lr:g}, --encoder_lr or --grad_clip; "
                             f"the checkpoints in {args.save_path} are from before")
        totals += sums
        now = time.monotonic()
        state["seconds"], started = state["seconds"] + now - started, now
        if state["step"] % 10 == 0 or state["step"] == len(batches):
            bar.set_postfix({"loss": f"{totals[0] / totals[2]:.3f}", measure: f"{totals[1] / totals[2]:.3f}"})
        state["sums"] = totals.tolist()
        saver.save_if_due(stop)
    bar.close()


def anneal(args, optimizer, epochs):
    """Learning rates after so many epochs, on half a cosine to zero at the last."""
    factor = 0.5 * (1 + math.cos(math.pi * min(1, epochs / args.epochs)))
    for group, lr in zip(optimizer.param_groups, (args.decoder_lr, args.encoder_lr), strict=False):
        group["lr"] = lr * factor


def train_step(args, model, batch, loss_function, device, optimizer, scaler):
    """One update -> tensor (4) of the summed loss, the right words, all words and the gradient's norm."""
    images, captions = (batch[key].to(device, non_blocking=True) for key in ("images", "captions"))
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, amp_dtype(device), enabled=args.amp):
        loss, right, words = loss_function(model, model.encode(images), captions)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([loss.detach() * words, right, words, norm]).double().cpu()


def teacher_forced_loss(args, vocabulary, data, criterion=None):
    """fit's loss_function for data's captions as they are: cross-entropy, or criterion(model, trace, captions) ->
    (loss, right words, words), with the scheduled sampling and the region losses that the flags ask for."""
    criterion = criterion or (lambda model, trace, captions: word_loss(model.output(trace.hidden), captions))

    def loss_function(model, features, captions):
        if data.epoch < args.region_epochs:
            return region_loss(model, features, captions, vocabulary)
        read = mix_in_predictions(model, features, captions, args.ss_prob) if args.ss_prob else captions
        loss, right, words = criterion(model, model.teacher_force(features, read), captions)
        if args.region_loss:
            loss = loss + args.region_loss * region_loss(model, features, captions, vocabulary)[0]
        return loss, right, words
    return loss_function


def word_loss(logits, captions):
    """Cross-entropy of logits (..., T, V) against captions (..., T+1) -> (mean loss, right words, words)."""
    targets = captions[..., 1:]
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=0)
    there = targets != 0
    return loss, ((logits.argmax(-1) == targets) & there).sum(), there.sum()


def region_loss(model, features, captions, vocabulary):
    """Multiple-instance loss (Fang et al. 2015) on what regions of features (B, K, C) say by themselves: some region
    should say each word of an image's captions (B, N, L), and none another word. Special tokens aside. Returns (binary
    cross-entropy per word of the captions, words that were said, words)."""
    logits = model.region_logits(features).float()                                     # (B, K, V)
    if model.encoder is None:       # regions that are all zero are padding
        logits = logits.masked_fill((features == 0).all(-1, keepdim=True), -100.0)
    most = logits.amax(1)                                                              # (B, V)
    there = torch.zeros_like(most).scatter_(1, captions.flatten(1), 1)
    ordinary = torch.ones_like(most)
    ordinary[:, [vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end]] = 0
    words = (there * ordinary).sum()
    loss = F.binary_cross_entropy_with_logits(most, there, ordinary, reduction="sum") / words.clamp(min=1)
    return loss, ((most > 0) * there * ordinary).sum(), words


def mix_in_predictions(model, features, captions, probability):
    """Scheduled sampling (Bengio et al. 2015) for all steps at once: a first pass on the true words predicts, then each
    word read is, with this probability, the one sampled there (Mihaylova and Martins 2019)."""
    with torch.no_grad():
        logits = model.output(model.teacher_force(features, captions).hidden)          # (B, N, T, V)
        sampled = torch.distributions.Categorical(logits=logits.float()).sample()
    read = captions[..., 1:-1]
    replace = (torch.rand(read.shape, device=read.device) < probability) & (captions[..., 2:] != 0)
    return torch.cat([captions[..., :1], torch.where(replace, sampled[..., :-1], read), captions[..., -1:]], -1)


def validate(args, model, vocabulary, data, device, stop, saver):
    """CIDEr and BLEU of greedy captions of the validation split."""
    from pycocoevalcap.scores import scores
    captions = []
    batches = list(torch.arange(len(data)).split(args.batch_size))
    for batch in tqdm(make_loader(data, [b.tolist() for b in batches], args.workers, device), desc="validation",
                      unit="batch", leave=False):
        captions += caption_batch(model, batch["images"].to(device), vocabulary, args.amp, device)
        saver.save_if_due(stop, only_on_request=True)
    return scores(captions, data.references, ("cider", "bleu"))


def caption_batch(model, images, vocabulary, amp, device, method="greedy", **options):
    """Sentences for images (B, 3, S, S) or features (B, K, C)."""
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, amp_dtype(device), enabled=amp):
        tokens = decoding.decode(model, model.encode(images), vocabulary, method, **{"max_len": 50} | options)
    return [" ".join(vocabulary.decode(ids)) for ids in tokens.tolist()]


def end_epoch(args, state, metrics, optimizer, saver, measure):
    """Logs the epoch and keeps the best checkpoint; on a plateau of CIDEr the learning rate falls every two epochs."""
    loss, right, words = state["sums"]
    state["log"].append([state["epoch"] + 1, state["step"], loss / words, right / words, metrics["cider"],
                         metrics["bleu_4"], optimizer.param_groups[0]["lr"], round(state["seconds"], 1)])
    print(f"epoch {state['epoch'] + 1}: loss {loss / words:.3f}, {measure} {right / words:.3f}, validation CIDEr "
          f"{metrics['cider']:.3f}, BLEU-4 {metrics['bleu_4']:.3f}", flush=True)
    better = metrics["cider"] > state["best"]
    state["best"] = max(metrics["cider"], state["best"])
    captions_are_learnt = state["epoch"] >= args.region_epochs
    state["bad_epochs"] = 0 if better or not captions_are_learnt else state["bad_epochs"] + 1
    if args.lr_schedule == "plateau" and state["bad_epochs"] and state["bad_epochs"] % 2 == 0:
        for group in optimizer.param_groups:
            group["lr"] *= 0.8
    state.update(epoch=state["epoch"] + 1, step=0, sums=[0.0, 0.0, 0.0], seconds=0.0)
    if better:
        saver.save("checkpoint_best.pth")
    saver.save()
    write_log(args.save_path, state["log"], measure)


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


@contextlib.contextmanager
def stop_requests():
    """Yields a list that becomes non-empty when Ctrl-C or SIGTERM asks to stop; the second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, before[0])

    before = [signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield asked
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def epoch_batches(size, batch_size, seed, epoch):
    """A list of lists of indices: a permutation that (seed, epoch) alone decide."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, -1))
    return [batch.tolist() for batch in torch.randperm(size, generator=generator).split(batch_size)]


def step_seed(seed, epoch, step):
    return ((seed * 1_000_003 + epoch) * 1_000_003 + step + 1) % 2**63


def make_loader(data, batches, workers, device):
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=min(workers, len(batches)),
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def ignore_signals(_):
    """Ctrl-C reaches a terminal's whole process group: the main process decides when its workers stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def amp_dtype(device):
    """bfloat16, or float16 on GPUs that lack it."""
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
