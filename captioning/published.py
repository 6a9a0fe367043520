"""Loading of weights with the names of the published checkpoints (docs/method.md, section 10)."""
from captioning.errors import InputError


def load(model, state_dict, names):
    """Copies `state_dict` into `model`. names: {published prefix: prefix in this model}.

    InputError if names or shapes do not match."""
    expected = model.state_dict()
    state = {_model_name(key.removeprefix("module."), names, expected): value for key, value in state_dict.items()}
    unmatched = sorted(expected.keys() ^ state.keys())
    if unmatched:
        raise InputError(f"the published checkpoint does not match {type(model).__name__} ({unmatched[0]} is in only "
                         "one of them): check whether it belongs to the other model type")
    for key, value in state.items():
        if value.dim() == 4 and expected[key].dim() == 2:    # W_v is published as a 1×1 convolution
            state[key] = value = value.flatten(1)
        if value.shape != expected[key].shape:
            raise InputError(f"{key} has shape {tuple(value.shape)} in the published checkpoint and "
                             f"{tuple(expected[key].shape)} in the model: build the model with the checkpoint's sizes")
    model.load_state_dict(state)


def _model_name(key, names, expected):
    """The model's name for a published one; LSTM weights may or may not end with the layer number, `_l0`."""
    prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
    if prefix is None:
        return key
    key = names[prefix] + key.removeprefix(prefix)
    return next((name for name in (key, f"{key}_l0", key.removesuffix("_l0")) if name in expected), key)
