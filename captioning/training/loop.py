"""The training loop, shared by training and fine-tuning: epochs, steps, validation, the log.

Each of several processes has its own images: an equal part of every batch, in one pass or several.
Every pass returns its share of the mean loss of the whole batch, so that neither the number of
processes nor --accumulate changes what is computed. All random numbers are functions of --seed,
epoch and image, or, for dropout, of --seed, epoch, step and pass: a run that was interrupted and
resumed ends with the same weights as one that was not."""
import math
import time

import torch
from tqdm import tqdm

from captioning import processes
from captioning.data.loader import make_loader
from captioning.decoding import caption_batch, image_seeds
from captioning.device import amp_dtype, autocast, supports_amp
from captioning.errors import InputError
from captioning.training.log import write_log
from captioning.training.losses import cross_entropy
from captioning.training.state import Saver, catch_stop_requests, new_state, resume

STEPS_PER_TRANSFER = 10     # steps whose results stay on the device, as each transfer waits for it


def fit(settings, model, vocabulary, train_data, val_data, loss, device):
    """Trains for --epochs epochs, or until --patience epochs bring no better validation CIDEr.

    settings: a namespace of the flags of train.py. loss: see captioning/training/losses.py. Returns
    the best validation CIDEr."""
    if settings.amp and not supports_amp(device):
        print("--amp has no effect: this CPU has no bfloat16 instructions, so that training uses "
              "float32", flush=True)
    batches = epoch_batches(len(train_data), settings.batch_size, settings.seed, epoch=0)
    smallest = min(map(len, batches))
    passes = processes.count() * settings.accumulate
    if smallest < passes:
        raise InputError(f"a batch of {smallest} images cannot be split into {passes} passes, "
                         "--accumulate times the number of processes: lower one of them")

    encoder_lr = settings.encoder_lr if settings.finetune_encoder else None
    optimizer = make_optimizer(model, device, settings.decoder_lr, encoder_lr,
                               settings.weight_decay, settings.frozen_layers or 0)
    is_scaled = settings.amp and amp_dtype(device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
    state = resume(settings, model, vocabulary, optimizer, scaler, loss.measure, len(batches))
    state = state or new_state()

    with catch_stop_requests() as stop_requests:
        saver = Saver(settings, model, vocabulary, optimizer, scaler, state, stop_requests)
        while state["epoch"] < settings.epochs and state["bad_epochs"] < settings.patience:
            train_epoch(saver, loss, train_data, device)
            metrics = validate(settings, model, vocabulary, val_data, device, saver)
            end_epoch(saver, loss.measure, metrics)
    print(f"best validation CIDEr {state['best']:.3f}: {settings.save_path}/checkpoint_best.pth",
          flush=True)
    return state["best"]


def make_optimizer(model, device, decoder_lr, encoder_lr=None, weight_decay=0.0, frozen_layers=0):
    """Adam over the decoder's parameters and the encoder's but for its first `frozen_layers`; not
    the encoder's if encoder_lr is None."""
    frozen = tuple(f"encoder.{layer}." for layer in range(frozen_layers))
    if encoder_lr is None:
        frozen = ("encoder.",)
    decoder, encoder = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
        if parameter.requires_grad:
            (encoder if name.startswith("encoder.") else decoder).append(parameter)
    groups = [{"params": decoder, "lr": decoder_lr}]
    if encoder:
        groups.append({"params": encoder, "lr": encoder_lr})
    fused = device.type in ("cpu", "cuda")
    return torch.optim.Adam(groups, weight_decay=weight_decay, fused=fused)


def train_epoch(saver, loss, data, device):
    """Trains from step state["step"] to the end of epoch state["epoch"]. saver: the run's."""
    settings = saver.settings
    model = saver.model
    state = saver.state
    epoch = state["epoch"]
    model.train()
    if model.encoder is not None and not settings.finetune_encoder:
        model.encoder.eval()        # its batch-norms must not move

    # this process's images of every remaining step: a list of indices for each pass
    data.epoch = epoch
    steps = epoch_batches(len(data), settings.batch_size, settings.seed, epoch)
    own = [own_passes(step, settings.accumulate) for step in steps[state["step"]:]]
    passes = [indices for step in own for indices in step]
    loader = iter(make_loader(data, passes, settings.workers, device))

    bar = tqdm(own, initial=state["step"], total=len(steps), desc=f"epoch {epoch + 1}",
               unit="batch", disable=processes.rank() > 0)
    results = []        # of the steps since the last transfer from the device
    waited = 0.0
    began = counted = time.monotonic()      # counted: until when state["seconds"] counts
    for step in bar:
        loading = time.monotonic()
        batches = [next(loader) for _ in step]
        waited += time.monotonic() - loading
        for batch in batches:
            batch["seeds"] = image_seeds(batch["index"].tolist(), settings.seed, epoch)
            batch["epoch"] = epoch
            batch["step"] = epoch * len(steps) + state["step"]

        if settings.lr_schedule == "cosine":        # half a wave: from 1 to 0 after --epochs
            progress = min(1, (epoch + state["step"] / len(steps)) / settings.epochs)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
            rates = settings.decoder_lr, settings.encoder_lr
            for group, lr in zip(saver.optimizer.param_groups, rates, strict=False):
                group["lr"] = lr * factor
        seed = step_seed(settings.seed, epoch, state["step"])
        results.append(train_step(model, loss, batches, saver.optimizer, saver.scaler, device,
                                  settings.grad_clip, settings.amp, seed))
        state["step"] += 1

        # results are read every few steps, and before a checkpoint is written
        save = saver.is_due()
        now = time.monotonic()
        if save or state["step"] % STEPS_PER_TRANSFER == 0 or state["step"] == len(steps):
            add_results(settings, state, results, saver.scaler.is_enabled())
            results.clear()
            total, correct, words = state["sums"]
            bar.set_postfix({"loss": f"{total / max(words, 1):.3f}",
                             loss.measure: f"{correct / max(words, 1):.3f}",
                             "waiting for data": f"{waited / (now - began):.1%}"})
        state["seconds"] += now - counted
        counted = now
        if save:
            saver.save_and_stop_if_requested()
    bar.close()


def train_step(model, loss, batches, optimizer, scaler, device, grad_clip, amp=False, seed=0):
    """One update of the parameters by this process's passes over a batch.

    batches: of each pass, the dictionary that losses.py describes, with "images". Returns a tensor
    (4,) on the device: loss, correct words and words of this process, and the gradient's norm."""
    optimizer.zero_grad(set_to_none=True)

    # the words of the whole batch, by which every pass of every process divides its sums
    for batch in batches:
        batch["captions"] = batch["captions"].to(device, non_blocking=True)
    counts = processes.total(sum(loss.counts(batch) for batch in batches))

    # the gradient of the whole batch's loss is the sum of those of all passes
    sums = 0
    for number, batch in enumerate(batches, start=processes.rank() * len(batches)):
        # dropout differs in each pass; a CPU uses the lowest 32 bits of a seed alone
        torch.manual_seed((seed + number * 0x9E3779B1) % 2**63)
        images = batch["images"].to(device, non_blocking=True)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(device, amp):
            value, log = loss(model, model.encode(images), batch, counts)
        scaler.scale(value).backward()
        sums = sums + torch.stack([value.detach(), *log])
    processes.sum_gradients(model.parameters())

    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([sums, norm[None]])


def add_results(settings, state, results, is_scaled):
    """Adds the last steps' loss, correct words and words, of all processes, to state["sums"].

    InputError that names the first step whose loss or gradient is not finite. is_scaled: the
    gradient scaler skips such gradients, so that only the loss counts."""
    rows = torch.stack(results).cpu().double()      # in this order, as MPS has no float64
    rows[:, :3] = processes.total(rows[:, :3].contiguous())
    finite = (rows[:, :3] if is_scaled else rows).isfinite().all(1).tolist()
    if not all(finite):
        step = state["step"] - len(results) + finite.index(False) + 1
        raise InputError(f"the loss or its gradient is not a finite number at epoch "
                         f"{state['epoch'] + 1}, step {step}: lower --decoder_lr "
                         f"{settings.decoder_lr:g}, --encoder_lr or --grad_clip; the checkpoints "
                         f"in {settings.save_path} were written before that step")
    sums = torch.tensor(state["sums"], dtype=torch.float64)
    for loss, correct, words, _ in rows:
        sums += torch.stack([loss * words, correct, words])
    state["sums"] = sums.tolist()


def validate(settings, model, vocabulary, data, device, saver):
    """CIDEr and BLEU of greedy captions of the validation images; "loss": of their references."""
    from pycocoevalcap.caption_metrics import scores
    model.eval()
    batches = torch.arange(len(data)).split(settings.batch_size)
    batches = processes.shard([batch.tolist() for batch in batches])
    captions = []
    sums = torch.zeros(2, device=device)        # of the loss, and of words
    for batch in tqdm(make_loader(data, batches, settings.workers, device), desc="validation",
                      unit="batch", leave=False, disable=processes.rank() > 0):
        references = batch["captions"].to(device)
        with torch.no_grad(), autocast(device, settings.amp):
            features = model.encode(batch["images"].to(device))
            hidden = model.teacher_force(features, references).hidden
            loss, _, words = cross_entropy(model, hidden, references)
        sums += torch.stack([loss, words])
        captions.append(caption_batch(model, features, vocabulary, settings.amp, device,
                                      method="greedy"))
        if saver.stop_requests:
            break
    if processes.any_of(saver.stop_requests):
        saver.save_and_stop_if_requested()
    loss, words = processes.total(torch.tensor(sums.tolist(), dtype=torch.float64)).tolist()
    captions = sum(processes.gather(captions), [])
    return scores(captions, data.references, ("cider", "bleu")) | {"loss": loss / words}


def end_epoch(saver, measure, metrics):
    """Logs the epoch, lowers the learning rate on a plateau of CIDEr, and saves checkpoints."""
    settings = saver.settings
    state = saver.state
    groups = saver.optimizer.param_groups
    loss, correct, words = state["sums"]
    cider = metrics["cider"]
    state["log"].append([state["epoch"] + 1, state["step"], loss / words, correct / words, cider,
                         metrics["bleu_4"], groups[0]["lr"],
                         round(state["seconds"], 1), metrics["loss"]])
    print(f"epoch {state['epoch'] + 1}: loss {loss / words:.3f}, {measure} {correct / words:.3f}, "
          f"validation loss {metrics['loss']:.3f}, CIDEr {cider:.3f}, BLEU-4 "
          f"{metrics['bleu_4']:.3f}", flush=True)

    # epochs on the region loss alone do not train captions
    is_better = cider > state["best"]
    state["best"] = max(cider, state["best"])
    if is_better or state["epoch"] < settings.region_epochs:
        state["bad_epochs"] = 0
    else:
        state["bad_epochs"] += 1
    is_plateau = state["bad_epochs"] > 0 and state["bad_epochs"] % 2 == 0
    if settings.lr_schedule == "plateau" and is_plateau:
        for group in groups:
            group["lr"] *= 0.8

    state.update(epoch=state["epoch"] + 1, step=0, sums=[0.0, 0.0, 0.0], seconds=0.0)
    if is_better:
        saver.save("checkpoint_best.pth")
    saver.save()
    if not processes.rank():
        write_log(settings.save_path, state["log"], measure, settings.region_epochs)


def epoch_batches(size, batch_size, seed, epoch):
    """The indices of each batch: a permutation that depends on (seed, epoch) alone.

    Batches have equally many images, or one fewer, so that none is too small to be split."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, -1))
    order = torch.randperm(size, generator=generator)
    return [batch.tolist() for batch in order.tensor_split(math.ceil(size / batch_size))]


def own_passes(indices, passes):
    """This process's images of a batch: for each of its passes the same number, or one more."""
    parts = torch.tensor(indices).tensor_split(processes.count() * passes)
    first = processes.rank() * passes
    return [part.tolist() for part in parts[first:first + passes]]


def step_seed(seed, epoch, step):
    """The random seed of one step; step -1: of the order of the epoch's batches."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + step + 1) % 2**63
