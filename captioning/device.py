"""Devices, and the number format that mixed precision uses on them."""
import contextlib
import os

import torch

from captioning import processes
from captioning.errors import InputError


def pick_device(name):
    """torch.device for --device, under torchrun each process its own GPU; InputError for an accelerator that this
    machine does not have."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available[name]:
        raise InputError(f"--device {name} was requested, but PyTorch finds no such device on this machine: use "
                         "--device cpu or auto")
    if name == "cuda" and processes.count() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def supports_amp(device):
    """Whether mixed precision can pay on the device: not on CPUs without bfloat16 instructions, where PyTorch emulates
    it many times slower than float32, or not at all."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device, enabled):
    """torch.autocast to bfloat16 (float16 on GPUs without it), if enabled and supported; else without effect."""
    return torch.autocast(device.type, amp_dtype(device), enabled=enabled and supports_amp(device))


@contextlib.contextmanager
def without_gradient():
    """torch.no_grad() for a pass that precedes a trained one under `autocast`.

    Older versions of PyTorch, such as 2.6, keep the weights that autocast has cast here, without their gradient, and
    would use them in the trained pass: they are dropped.
    """
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


def amp_dtype(device):
    """bfloat16, or float16 on GPUs without it."""
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
