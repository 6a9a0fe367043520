"""Weights: from a file, whose reading never runs code, from torchvision, or published ones."""
import torch

from captioning.errors import InputError
from captioning.files import reading, shortened


def read_weights(path, what="encoder"):
    """The state_dict stored in a file; of a checkpoint of ours, that of its encoder. what: kind of
    network, for messages."""
    with reading(path, f"give weights of the {what}, a state_dict saved with torch.save"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state.get("state_dict"), dict):
            everything = state["state_dict"]
            state = {key.removeprefix("encoder."): everything[key] for key in everything
                     if key.startswith("encoder.")}
        check_finite(state, path)
    return state


def check_finite(state, source):
    """InputError, about `source`, unless the tensors {name: tensor} are complete and finite."""
    for name, value in state.items():
        # a small file may announce a tensor of terabytes
        is_whole = value.untyped_storage().nbytes() >= value.nbytes
        if not (is_whole and value.isfinite().all()):
            raise InputError(f"{source} contains values of '{shortened(name, 60)}' that are "
                             "missing or not finite numbers: use another")


def download_weights(name, version, flag):
    """The state_dict of torchvision's weights `version` of the model `name`, downloaded once.
    InputError if that fails, which names the flag that takes a local file."""
    from torchvision import models
    try:
        weights = models.get_model_weights(name)[version]
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"the weights of {name} cannot be downloaded ({error}): give a local "
                         f"file with {flag}") from error


def load_published(model, state_dict, names):
    """Copies weights with published names into `model` (docs/method.md, section 10).

    names: {published prefix: prefix in this model}. InputError if they do not match."""
    expected = model.state_dict()
    state = {}
    for key, value in state_dict.items():
        name = key.removeprefix("module.")
        for published, prefix in names.items():
            if name.startswith(published):
                name = prefix + name.removeprefix(published)
                break
        if name not in expected:
            # names of LSTM weights may or may not end with the number of the layer
            other = name.removesuffix("_l0") if name.endswith("_l0") else f"{name}_l0"
            name = other if other in expected else name
        if name in expected and value.dim() == 4 and expected[name].dim() == 2:
            value = value.flatten(1)        # W_v is published as a 1×1 convolution
        state[name] = value
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the published checkpoint does not match {type(model).__name__} "
                         f"({shortened(error)}): check whether it belongs to "
                         "the other model type, and build the model with its sizes") from error
