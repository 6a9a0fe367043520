"""Devices and the number formats that they compute in."""
import os

import torch

from captioning.errors import InputError
from captioning.processes import count


def pick_device(name):
    """torch.device for --device; InputError for an accelerator that this machine does not have."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name} was asked for, but this machine has none that PyTorch can use: "
                         "use --device cpu or auto")
    return torch.device(name)


def own_device(device):
    """This process's: each its own GPU, where there are some."""
    if count() > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def amp_dtype(device):
    """bfloat16, or float16 on GPUs that lack it."""
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
