"""Weights of encoders and detectors: from a file, whose reading never runs code, or from torchvision."""
from urllib.error import URLError

import torch

from captioning.errors import InputError
from captioning.files import check_file, shortened


def read_weights(path, what="encoder"):
    """The state_dict stored in a file; InputError if there is none, or if weights are not finite numbers. what: kind of
    network, for the message."""
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = shortened(error) or "it is damaged"
        raise InputError(f"the {what} weights {path} cannot be read ({reason}): give a state_dict saved with "
                         "torch.save") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                              for key, value in state.items()):
        raise InputError(f"the {what} weights {path} must contain a state_dict: give one saved with torch.save")
    check_finite(state, f"the {what} weights {path}")
    return state


def check_finite(state, source):
    """InputError unless the values of {name: tensor} are dense tensors of finite numbers; source: for the message."""
    for name, value in state.items():
        if (not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized
                or value.device.type == "meta"):
            raise InputError(f"{source} contains no tensor '{shortened(name, 60)}': use another file")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size() or not value.isfinite().all():
            raise InputError(f"{source} contains values of '{shortened(name, 60)}' that are not finite numbers: use "
                             "another file")


def download_weights(name, version, flag):
    """The state_dict of torchvision's weights `version` of the model `name`, downloaded once; InputError if that fails,
    which names the flag that takes a local file."""
    from torchvision import models
    try:
        return models.get_model_weights(name)[version].get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(f"the weights of {name} cannot be downloaded ({error}): give a local file with {flag}"
                         ) from error
