"""Weights of encoders and detectors: from a file, whose reading never runs code, or torchvision."""
from urllib.error import URLError

import torch

from captioning.errors import InputError
from captioning.files import reading, shortened


def read_weights(path, what="encoder"):
    """The state_dict stored in a file. what: kind of network, for messages."""
    with reading(path, f"give weights of the {what}, a state_dict saved with torch.save"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_finite(state, path)
    return state


def check_finite(state, source):
    """InputError, about `source`, unless {name: tensor} are dense tensors of finite numbers."""
    for name, value in state.items():
        is_dense = (isinstance(value, torch.Tensor) and value.layout == torch.strided
                    and not value.is_quantized and value.device.type != "meta")
        # a small file may announce a tensor of terabytes
        if not is_dense or value.untyped_storage().nbytes() < value.nbytes:
            raise InputError(f"{source} contains no tensor '{shortened(name, 60)}': use another")
        if not value.isfinite().all():
            raise InputError(f"{source} contains values of '{shortened(name, 60)}' that are not "
                             "finite numbers: use another")


def download_weights(name, version, flag):
    """The state_dict of torchvision's weights `version` of the model `name`, downloaded once.
    InputError if that fails, which names the flag that takes a local file."""
    from torchvision import models
    try:
        weights = models.get_model_weights(name)[version]
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(f"the weights of {name} cannot be downloaded ({error}): give a local "
                         f"file with {flag}") from error
