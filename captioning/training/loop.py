"""What training and fine-tuning share: the loop over epochs with validation, checkpoints, resuming and the log."""
import contextlib
import math
import signal
import time

import torch
from tqdm import tqdm

from captioning.data.loader import make_loader
from captioning.decoding import caption_batch
from captioning.device import amp_dtype, autocast
from captioning.errors import InputError
from captioning.training.log import write_log
from captioning.training.state import Saver, new_state, resume


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
    with autocast(device, args.amp):
        loss, right, words = loss_function(model, model.encode(images), captions)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([loss.detach() * words, right, words, norm]).double().cpu()


def validate(args, model, vocabulary, data, device, stop, saver):
    """CIDEr and BLEU of greedy captions of the validation split."""
    from pycocoevalcap.caption_metrics import scores
    captions = []
    batches = list(torch.arange(len(data)).split(args.batch_size))
    for batch in tqdm(make_loader(data, [b.tolist() for b in batches], args.workers, device), desc="validation",
                      unit="batch", leave=False):
        captions += caption_batch(model, batch["images"].to(device), vocabulary, args.amp, device)
        saver.save_if_due(stop, only_on_request=True)
    return scores(captions, data.references, ("cider", "bleu"))


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
