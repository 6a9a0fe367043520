"""Weight files of encoders and detectors; reading one never runs code."""
import torch

from captioning.errors import InputError


def read_weights(path, what="encoder"):
    """The state_dict stored in a file; InputError if there is none. what: kind of network, for the message."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = " ".join(str(error).split())[:160] or "it is damaged"
        raise InputError(f"the {what} weights {path} cannot be read ({reason}): give a state_dict saved with "
                         "torch.save") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                              for key, value in state.items()):
        raise InputError(f"the {what} weights {path} must contain a state_dict: give one saved with torch.save")
    return state
