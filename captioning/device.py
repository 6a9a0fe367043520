"""Devices, and the number format that mixed precision uses on them."""
import contextlib
import os

import torch

from captioning import processes
from captioning.errors import InputError


def pick_device(name):
    """torch.device for --device, under torchrun of each process its own GPU; InputError if this
    machine does not have it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available.get(name):
        raise InputError(f"--device {name} was requested, but PyTorch finds no such device on this "
                         "machine: use --device cpu or auto")
    if name == "cuda" and processes.count() > 1:
        number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    return torch.device(name)


def supports_amp(device):
    """Whether mixed precision can pay: CPUs without bfloat16 instructions emulate it slowly."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def amp_dtype(device):
    """bfloat16, or float16 on GPUs without it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def autocast(device, enabled):
    """torch.autocast to `amp_dtype`, without effect unless enabled and supported."""
    return torch.autocast(device.type, amp_dtype(device), enabled=enabled and supports_amp(device))


@contextlib.contextmanager
def without_gradient():
    """torch.no_grad() for a pass that precedes a trained one under `autocast`.

    Older versions of PyTorch, such as 2.6, keep the weights that autocast has cast here, without
    their gradient, and would use them in the trained pass: they are dropped."""
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()
