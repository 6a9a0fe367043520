"""Checkpoints: files that contain a model, its vocabulary and its training state. Loading never executes code."""
import io
from pathlib import Path

import torch

from captioning.data.vocabulary import Vocabulary
from captioning.data.vocabulary import read as read_wordmap
from captioning.errors import InputError
from captioning.explanation.encoders import IMAGE_SIZE
from captioning.files import atomic_path, check_file, shortened
from captioning.weights import check_finite

FLICKR8K = str(Path(__file__).parents[1] / "models" / "flickr8k.pth")       # see models/README.md
MODEL_TYPES = ("gridtd", "aoa")
SIZES = ("vocab_size", "embed_dim", "hidden_dim", "attention_dim", "num_head", "feature_dim")
SHARES = ("dropout", "attention_dropout")


def model_class(model_type):
    """The class of --model_type: GridTDModel of "gridtd", AOAModel of "aoa"."""
    from aoamodel import AOAModel
    from gridTDmodel import GridTDModel
    return {"gridtd": GridTDModel, "aoa": AOAModel}[model_type]


def model_type(model):
    """The inverse of `model_class`: "gridtd" or "aoa"."""
    return next(name for name in MODEL_TYPES if isinstance(model, model_class(name)))


def save(path, model, vocabulary, training=None):
    """Writes a checkpoint to `path` atomically. training: the state to resume from, of tensors and plain types.

    ValueError if the model's encoder has no name."""
    if not isinstance(model.config["encoder"], str | None):
        raise ValueError("only models with a named encoder can be saved: build the model with the name of an encoder")
    content = {"model_type": model_type(model), "config": model.config, "state_dict": model.state_dict(),
               "wordmap": vocabulary.wordmap, "training": training}
    buffer = io.BytesIO()       # torch.save to a file raises RuntimeError on a full disk
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path, device="cpu", wordmap=None, num_head=8, content=None):
    """Loads a checkpoint of this repository or a published one: (model in evaluation mode on `device`, Vocabulary).

    wordmap: a {word: id} file, required for published checkpoints; if given for others it must match. num_head: number
    of heads of a published AOA checkpoint, which does not contain it. content: of `read`, if it was called. InputError if the file is damaged or does not
    match.
    """
    content = content or read(path)
    vocabulary = read_wordmap(wordmap) if wordmap else None
    if "model_type" not in content:
        return _load_published(content["state_dict"], path, device, vocabulary, num_head)
    if vocabulary and vocabulary.wordmap != content["wordmap"]:
        raise InputError(f"the word map {wordmap} is not the one that {path} was trained with: omit --wordmap, as the "
                         "checkpoint contains its own")
    vocabulary = Vocabulary(content["wordmap"], source=str(path))
    model = model_class(content["model_type"])(**content["config"])
    model.load_state_dict(content["state_dict"])
    return model.to(device).eval(), vocabulary


def read(path):
    """The dict that a checkpoint contains, on the CPU, with the weights of the model that its configuration describes.

    InputError if the file is not a checkpoint, or contains weights of other shapes or that are not finite. What the
    training state contains is checked by captioning.training.state."""
    content = _read_file(path)
    source = f"the checkpoint {path}"
    check_finite(content["state_dict"], source)
    if "model_type" in content:
        _check_model(content, source)
    training = content.get("training")
    if training is not None and not (isinstance(training, dict) and isinstance(training.get("flags", {}), dict)):
        raise InputError(f"{source} is damaged (its training state is {shortened(training)}): use another")
    return content


def _check_model(content, source):
    """InputError unless the configuration is valid, and the weights and the word map have the sizes that it states."""
    config, weights = content["config"], content["state_dict"]
    if not isinstance(config, dict) or not all(_is_valid(key, value) for key, value in config.items()):
        raise InputError(f"{source} is damaged (its configuration is {shortened(config)}): use another")
    try:
        with torch.device("meta"):      # shapes alone, so that wrong sizes allocate no memory
            expected = model_class(content["model_type"])(**config).state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source} does not match this version of the models ({shortened(error)}): train it again"
                         ) from error
    for name in sorted(expected.keys() ^ weights.keys()):
        raise InputError(f"{source} does not match this version of the models ({shortened(name, 60)} is in only one of "
                         "them): train it again")
    for name, value in expected.items():
        if weights[name].shape != value.shape or weights[name].is_floating_point() != value.is_floating_point():
            raise InputError(f"{source} is damaged ({name} has shape {tuple(weights[name].shape)}, its configuration "
                             f"requires {tuple(value.shape)}): use another")
    words = len(Vocabulary(content["wordmap"], source=source))
    if words != config["vocab_size"]:
        raise InputError(f"{source} is damaged (its model has {config['vocab_size']} words, its word map {words}): use "
                         "another")


def _is_valid(key, value):
    """Whether `value` is possible for the entry `key` of a model's configuration."""
    if key in SIZES:
        return type(value) is int and 0 < value <= 10 ** 7
    if key in SHARES:
        return type(value) in (int, float) and 0 <= value <= 1
    return type(value) is bool if key == "query_per_region" else value is None or str(value) in IMAGE_SIZE


def _read_file(path):
    check_file(path)
    # published checkpoints contain a pickled optimizer, which these classes replace without executing code
    inert = [(_Inert, "torch.optim.adam.Adam"), (_empty_dict, "collections.defaultdict"), (dict, "builtins.dict")]
    try:
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises various exceptions for damaged files
        raise InputError(f"the checkpoint {path} cannot be read ({shortened(error)}): check the path, or use another "
                         "checkpoint") from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"{path} is not a checkpoint of a captioning model, as it has no state_dict: check the path")
    if "model_type" in content and not ({"config", "wordmap"} <= content.keys()
                                        and content["model_type"] in MODEL_TYPES):
        raise InputError(f"the checkpoint {path} is damaged (its configuration or word map is missing): use another")
    return content


def image_size(model):
    """Side S, in pixels, of the images that the model's encoder reads; None for region features."""
    return None if model.encoder is None else IMAGE_SIZE[model.config["encoder"]]


def _empty_dict(*_):
    return {}


class _Inert:
    """Replaces a pickled optimizer and discards its state."""

    def __setstate__(self, state):
        pass


def _load_published(state, path, device, vocabulary, num_head):
    if vocabulary is None:
        raise InputError(f"the published checkpoint {path} contains no vocabulary: give its word map with --wordmap")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        V, e = state["embedding.weight"].shape
        d, C = state["img_projector.weight"].shape[:2]
        convolutions = sum(key.startswith("img_encoder.encoder.") and value.dim() == 4 for key, value in state.items())
        encoder = {0: None, 13: "vgg16", 16: "vgg19"}[convolutions]
        sizes = {"vocab_size": V, "embed_dim": e, "hidden_dim": d, "encoder": encoder, "feature_dim": C}
        if "AdaAttention.w_h.weight" in state:
            model = model_class("gridtd")(**sizes, attention_dim=state["AdaAttention.w_h.weight"].shape[1])
        else:
            model = model_class("aoa")(**sizes, num_head=num_head)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path} is neither a checkpoint of this repository nor a published one ({shortened(error)}): "
                         "check the path") from error
    model.load_published(state)
    if len(vocabulary) != V:
        raise InputError(f"the word map has {len(vocabulary)} words, but the published checkpoint {path} has {V}: use "
                         "the word map that was published with it")
    return model.to(device).eval(), vocabulary
