"""Loading of weights with the names of the published checkpoints (docs/method.md, section 10)."""
from captioning.errors import InputError
from captioning.files import shortened


def load(model, state_dict, names):
    """Copies `state_dict` into `model`. names: {published prefix: prefix in this model}.

    InputError if names or shapes do not match."""
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
