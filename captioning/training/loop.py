"""The training loop, shared by training and fine-tuning: epochs, validation, checkpoints, resuming and the log."""
import contextlib
import math
import signal
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from captioning import processes
from captioning.data.loader import make_loader
from captioning.decoding import caption_batch
from captioning.device import amp_dtype, autocast, supports_amp
from captioning.errors import InputError
from captioning.training.log import columns, write_log
from captioning.training.losses import cross_entropy
from captioning.training.parts import Loss, Part, PartsOfBatches, own_slices
from captioning.training.state import Saver, new_state, resume

STEPS_PER_TRANSFER = 10     # steps whose results stay on the device, as each transfer waits for the device


def fit(options, model, vocabulary, train_data, val_data, loss_function, device, measure="accuracy",
        on_epoch=None):
    """Trains for options.epochs epochs, or until options.patience epochs bring no better CIDEr; returns the best
    validation CIDEr.

    loss_function(model, features, captions, epoch, part) -> (loss, correct words, words), scalar tensors; if `measure`
    is "reward": (loss, summed reward, samples); see `parts.Part`. on_epoch: called after each epoch with {column of
    log.csv: value}. All random numbers are functions of (seed, epoch, step), so that a run that was interrupted and
    resumed ends with the same weights as one that was not. Under torchrun the processes share each batch; their number
    changes the results only through dropout and scheduled sampling.
    """
    if options.amp and not supports_amp(device):
        print("--amp has no effect: this CPU has no bfloat16 instructions, so training uses float32", flush=True)
    optimizer = make_optimizer(model, device, options.decoder_lr, options.encoder_lr if options.finetune_encoder
                               else None, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and amp_dtype(device) == torch.float16)
    batches = math.ceil(len(train_data) / options.batch_size)
    state = resume(options, model, vocabulary, optimizer, scaler, measure, batches) or new_state()
    loss = Loss(model, loss_function)
    if processes.count() > 1:   # some parameters are unused: those of the LSTMs where the region loss trains alone
        loss = DistributedDataParallel(loss, find_unused_parameters=True, broadcast_buffers=False)
    with catch_stop_requests() as stop_requests:
        saver = Saver(options, model, vocabulary, optimizer, scaler, state, stop_requests)
        while state["epoch"] < options.epochs and state["bad_epochs"] < options.patience:
            train_epoch(options, loss, train_data, device, optimizer, scaler, state, saver, measure)
            metrics = validate(options, model, vocabulary, val_data, device, saver)
            end_epoch(options, state, metrics, optimizer, saver, measure)
            if on_epoch:
                on_epoch(dict(zip(columns(measure), state["log"][-1], strict=True)))
    return state["best"]


def make_optimizer(model, device, decoder_lr, encoder_lr=None, weight_decay=0.0):
    """Adam over the decoder's parameters and the encoder's; encoder_lr None: the encoder is not trained."""
    encoder = list(model.encoder.parameters()) if model.encoder is not None else []
    for parameter in encoder:
        parameter.requires_grad_(encoder_lr is not None)
    encoder_ids = {id(parameter) for parameter in encoder}
    groups = [{"params": [p for p in model.parameters() if id(p) not in encoder_ids], "lr": decoder_lr}]
    if encoder and encoder_lr is not None:
        groups.append({"params": encoder, "lr": encoder_lr})
    return torch.optim.Adam(groups, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda"))


def train_epoch(options, loss_module, data, device, optimizer, scaler, state, saver, measure):
    """Trains from step state["step"] to the end of epoch state["epoch"]."""
    epoch = state["epoch"]
    loss_module.train()
    data.set_epoch(epoch)
    batches = epoch_batches(len(data), options.batch_size, options.seed, epoch)
    passes, first_step = options.accumulate, epoch * len(batches)
    parts = [(batch, images) for batch in batches[state["step"]:] for images, _ in own_slices(len(batch), passes)]
    loader = Timed(make_loader(PartsOfBatches(data), parts, options.workers, device))
    bar = tqdm(batches[state["step"]:], initial=state["step"], total=len(batches), desc=f"epoch {epoch + 1}",
               unit="batch", disable=processes.rank() > 0)
    results = []        # of the steps since the last transfer from the device
    began = started = time.monotonic()
    for batch in bar:
        if options.lr_schedule == "cosine":
            anneal(options, optimizer, epoch + state["step"] / len(batches))
        seed = step_seed(options.seed, epoch, state["step"])
        own_parts = step_parts(len(batch), passes, seed, device, first_step + state["step"])
        results.append(train_step(loss_module, zip(own_parts, loader, strict=False), epoch, optimizer, scaler, device,
                                  options.grad_clip, options.amp))
        state["step"] += 1
        save, now = saver.is_due(), time.monotonic()
        if save or state["step"] % STEPS_PER_TRANSFER == 0 or state["step"] == len(batches):
            add_results(options, state, results, scaler.is_enabled())
            results.clear()
            loss, correct, words = state["sums"]
            bar.set_postfix({"loss": f"{loss / max(words, 1):.3f}", measure: f"{correct / max(words, 1):.3f}",
                             "waiting for data": f"{loader.seconds / (now - began):.1%}"})
        state["seconds"], started = state["seconds"] + now - started, now
        if save:
            saver.save_and_stop_if_requested()
    bar.close()


class Timed:
    """An iterator over `items` that counts the seconds spent waiting for them."""

    def __init__(self, items):
        self.iterator, self.seconds = iter(items), 0.0

    def __iter__(self):
        return self

    def __next__(self):
        started = time.monotonic()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.monotonic() - started


def anneal(options, optimizer, epochs):
    """Sets the learning rates after `epochs` epochs: half a cosine that reaches zero after options.epochs."""
    factor = 0.5 * (1 + math.cos(math.pi * min(1, epochs / options.epochs)))
    for group, lr in zip(optimizer.param_groups, (options.decoder_lr, options.encoder_lr), strict=False):
        group["lr"] = lr * factor


def step_parts(size, passes, seed, device, step):
    """Yields this process's Parts of batch number `step`, of `size` images, and seeds PyTorch's random numbers for
    each of them."""
    for i, (images, share) in enumerate(own_slices(size, passes), start=processes.rank() * passes):
        # dropout differs in each part, and from the generator, also in the lowest 32 bits, which are all a CPU uses
        torch.manual_seed((seed + i * 0x9E3779B1) % 2**63)
        generator = torch.Generator(device).manual_seed((seed + 2**62 + 2**31) % 2**63)
        yield Part(images, generator, size, passes, share, step)


def train_step(loss_module, parts, epoch, optimizer, scaler, device, grad_clip, amp=False):
    """One update of the parameters. loss_module: a `parts.Loss`, possibly in DistributedDataParallel; parts: pairs of
    Part and batch. Returns a tensor (4,) on the device: the process's loss, correct words and words, and the
    gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    sums = 0
    for number, (part, batch) in enumerate(parts, start=1):
        images, captions = (batch[key].to(device, non_blocking=True) for key in ("images", "captions"))
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        # DistributedDataParallel averages gradients over the processes in the last pass
        is_last = processes.count() == 1 or number == part.passes
        with contextlib.nullcontext() if is_last else loss_module.no_sync():
            with autocast(device, amp):
                loss, *counts = loss_module(images, captions, epoch, part._replace(index=batch.get("index")))
            scaler.scale(loss * processes.count()).backward()
        sums = sums + torch.stack([loss.detach(), *counts])
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(loss_module.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([sums, norm[None]])


def add_results(options, state, results, scaled):
    """Transfers the results of the last steps from the device, adds those of all processes, and adds summed loss,
    correct words and words to state["sums"], in float64.

    InputError that names the first step whose loss or gradient is not finite; scaled: with a gradient scaler, which
    skips such gradients, only the loss counts.
    """
    rows = torch.stack(results).cpu().double()      # in this order, as MPS devices have no float64
    rows[:, :3] = processes.total(rows[:, :3].contiguous())
    finite = (rows[:, :3] if scaled else rows).isfinite().all(1).tolist()
    if not all(finite):
        step = state["step"] - len(results) + finite.index(False) + 1
        raise InputError(f"the loss or its gradient is not a finite number at epoch {state['epoch'] + 1}, step {step}: "
                         f"lower --decoder_lr {options.decoder_lr:g}, --encoder_lr or --grad_clip; the checkpoints in "
                         f"{options.save_path} were written before that step")
    sums = torch.tensor(state["sums"], dtype=torch.float64)
    for row in rows:
        sums += row[:3] * torch.stack([row[2], *row.new_ones(2)])
    state["sums"] = sums.tolist()


def validate(options, model, vocabulary, data, device, saver):
    """CIDEr and BLEU of the greedy captions of the validation split; "loss": cross-entropy of its references."""
    from pycocoevalcap.caption_metrics import scores
    model.eval()
    captions, sums = [], torch.zeros(2, device=device)      # sums: of the loss, and of words
    batches = processes.shard([batch.tolist() for batch in torch.arange(len(data)).split(options.batch_size)])
    for batch in tqdm(make_loader(data, batches, options.workers, device), desc="validation", unit="batch",
                      leave=False, disable=processes.rank() > 0):
        images, references = (batch[key].to(device) for key in ("images", "captions"))
        with torch.no_grad(), autocast(device, options.amp):
            features = model.encode(images)
            loss, _, words = cross_entropy(model, model.teacher_force(features, references, skip_padding=True),
                                           references)
        sums += torch.stack([loss * words, words])
        captions.append(caption_batch(model, features, vocabulary, options.amp, device))
        if saver.stop_requests:
            break
    if processes.any_of(saver.stop_requests):
        saver.save_and_stop_if_requested()
    loss, words = processes.total(torch.tensor(sums.tolist(), dtype=torch.float64)).tolist()
    captions = sum(processes.gather(captions), [])
    return scores(captions, data.references, ("cider", "bleu")) | {"loss": loss / words}


def end_epoch(options, state, metrics, optimizer, saver, measure):
    """Logs the epoch, lowers the learning rate on a plateau of CIDEr, and saves checkpoints."""
    loss, correct, words = state["sums"]
    state["log"].append([state["epoch"] + 1, state["step"], loss / words, correct / words, metrics["cider"],
                         metrics["bleu_4"], optimizer.param_groups[0]["lr"], round(state["seconds"], 1),
                         metrics["loss"]])
    print(f"epoch {state['epoch'] + 1}: loss {loss / words:.3f}, {measure} {correct / words:.3f}, validation loss "
          f"{metrics['loss']:.3f}, CIDEr {metrics['cider']:.3f}, BLEU-4 {metrics['bleu_4']:.3f}", flush=True)
    is_better = metrics["cider"] > state["best"]
    state["best"] = max(metrics["cider"], state["best"])
    trains_captions = state["epoch"] >= options.region_epochs
    state["bad_epochs"] = 0 if is_better or not trains_captions else state["bad_epochs"] + 1
    if options.lr_schedule == "plateau" and state["bad_epochs"] and state["bad_epochs"] % 2 == 0:
        for group in optimizer.param_groups:
            group["lr"] *= 0.8
    state.update(epoch=state["epoch"] + 1, step=0, sums=[0.0, 0.0, 0.0], seconds=0.0)
    if is_better:
        saver.save("checkpoint_best.pth")
    saver.save()
    if not processes.rank():
        write_log(options.save_path, state["log"], measure, options.region_epochs)


@contextlib.contextmanager
def catch_stop_requests():
    """Yields a list, to which Ctrl-C and SIGTERM append instead of ending the process; a second Ctrl-C ends it."""
    requests = []

    def request_stop(number, frame):
        requests.append(number)
        if processes.count() == 1:      # torchrun sends a second signal
            signal.signal(signal.SIGINT, handlers[0])

    handlers = [signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield requests
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)


def epoch_batches(size, batch_size, seed, epoch):
    """Lists of the indices of each batch: a permutation that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, -1))
    return [batch.tolist() for batch in torch.randperm(size, generator=generator).split(batch_size)]


def step_seed(seed, epoch, step):
    """The random seed of one step; step -1: of the order of the epoch's batches."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + step + 1) % 2**63
