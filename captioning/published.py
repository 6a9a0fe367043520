"""Weights under the names of the published checkpoints (method.md, section 10)."""
from captioning.errors import InputError


def load(model, state_dict, names):
    """Copies `state_dict` into `model`; names: {published prefix: our prefix}. InputError if anything does not fit."""
    wanted = model.state_dict()
    state = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
        if prefix is None:
            raise InputError(f"the published checkpoint holds '{key}', which {type(model).__name__} does not have: "
                             "is it of the other model type?")
        key = names[prefix] + key.removeprefix(prefix)
        # an LSTM's weights are named with or without the layer's number; W_v is published as a 1×1 convolution
        key = next((k for k in (key, f"{key}_l0", key.removesuffix("_l0")) if k in wanted), key)
        if key in wanted and value.dim() == 4 and wanted[key].dim() == 2:
            value = value.flatten(1)
        if key not in wanted or value.shape != wanted[key].shape:
            raise InputError(f"the published checkpoint's '{key}', {tuple(value.shape)}, does not fit "
                             f"{tuple(wanted[key].shape) if key in wanted else 'the model'}: check the model's sizes")
        state[key] = value
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise InputError(f"the published checkpoint lacks {', '.join(missing[:5])}: is it of the other model type?")
    model.load_state_dict(state)
