"""Weights under the names of the published checkpoints (method.md, section 10)."""
from captioning.errors import InputError


def load(model, state_dict, names):
    """Copies `state_dict` into `model`; names: {published prefix: our prefix}. InputError if anything does not fit."""
    wanted = model.state_dict()
    state = {_our_name(key.removeprefix("module."), names, wanted): value for key, value in state_dict.items()}
    odd = sorted(wanted.keys() ^ state.keys())
    if odd:
        raise InputError(f"the published checkpoint does not fit {type(model).__name__}, which {odd[0]} shows: is it "
                         "of the other model type?")
    for key, value in state.items():
        if value.dim() == 4 and wanted[key].dim() == 2:    # W_v is published as a 1×1 convolution
            state[key] = value = value.flatten(1)
        if value.shape != wanted[key].shape:
            raise InputError(f"the published checkpoint has {tuple(value.shape)} for {key}, the model "
                             f"{tuple(wanted[key].shape)}: give the model the checkpoint's sizes")
    model.load_state_dict(state)


def _our_name(key, names, wanted):
    """Our name for a published one; an LSTM's weights are named with or without the layer's number."""
    prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
    if prefix is None:
        return key
    key = names[prefix] + key.removeprefix(prefix)
    return next((name for name in (key, f"{key}_l0", key.removesuffix("_l0")) if name in wanted), key)
