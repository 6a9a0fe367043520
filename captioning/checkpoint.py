"""Checkpoints: files that contain a model, its vocabulary and its training state. Loading never
executes code. To make a small file of a trained model, to be published:
python -m captioning.checkpoint CHECKPOINT OUTPUT"""
import io
import zipfile
from pathlib import Path

import torch

from captioning.captioner import model_class, model_type
from captioning.cli import Parser
from captioning.data.vocabulary import Vocabulary
from captioning.data.vocabulary import read as read_wordmap
from captioning.errors import InputError, run_script
from captioning.explanation.encoders import IMAGE_SIZE
from captioning.files import atomic_path, expect, reading, shortened, write_bytes
from captioning.weights import check_finite

PHOTOGRAPHS = str(Path(__file__).parents[1] / "models" / "photographs.pth")     # models/README.md
OTHER = "check the path, or use another checkpoint"


def image_size(model):
    """Side S, in pixels, of the images that the model's encoder reads; None for region features."""
    return None if model.encoder is None else IMAGE_SIZE[model.config["encoder"]]


def save(path, model, vocabulary, training=None):
    """Writes a checkpoint. training: the state to resume from, of tensors and plain types.
    ValueError if the model's encoder has no name."""
    if not isinstance(model.config["encoder"], str | None):
        raise ValueError("only models with a named encoder can be saved: build the model with the "
                         "name of an encoder")
    content = {"model_type": model_type(model), "config": model.config,
               "state_dict": model.state_dict(), "wordmap": vocabulary.wordmap,
               "training": training}
    buffer = io.BytesIO()       # torch.save to a file raises RuntimeError on a full disk
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def is_pretrained(path):
    """Whether `path` is a model of transformers, a folder or a name on its hub, and no file."""
    is_name = not str(path).endswith((".pth", ".pt", ".bin", ".ckpt", ".tar"))
    return Path(path).is_dir() or (is_name and str(path).count("/") < 2 and not Path(path).exists())


def load(path, device="cpu", wordmap=None, num_head=8, content=None, prompt=None):
    """Loads a checkpoint of ours or a published one: (model in evaluation mode, Vocabulary); or
    what captioning.pretrained.load returns for a model of transformers, with a prompt.

    wordmap: a {word: id} file, required for published checkpoints; for others it must match.
    num_head: of a published AOA checkpoint, which does not contain it. content: what `read`
    returned, if it was called before."""
    if is_pretrained(path):
        from captioning import pretrained  # without transformers all else works
        return pretrained.load(path, device, prompt)
    if prompt is not None:
        raise InputError(f"--prompt is for models of transformers, and {path} takes none: omit it")
    content = content or read(path)
    vocabulary = read_wordmap(wordmap) if wordmap else None
    if "model_type" not in content:
        model = _load_published(content["state_dict"], path, vocabulary, num_head)
        return model.to(device).eval(), vocabulary
    if vocabulary and vocabulary.wordmap != content["wordmap"]:
        raise InputError(f"the word map {wordmap} is not the one that {path} was trained with: "
                         "omit --wordmap, as the checkpoint contains its own")
    model = model_class(content["model_type"])(**content["config"])
    model.load_state_dict(content["state_dict"])
    return model.to(device).eval(), Vocabulary(content["wordmap"])


def read(path):
    """The dict that a checkpoint contains, on the CPU, with finite weights of the shapes that its
    configuration requires; captioning.training.state checks its training state."""
    # published checkpoints contain a pickled optimizer, which is replaced without executing code
    inert = [(_Inert, "torch.optim.adam.Adam"), (_empty_dict, "collections.defaultdict"),
             (dict, "builtins.dict")]
    with reading(path, OTHER):
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_finite(content["state_dict"], path)
        if "model_type" in content:
            _check_model(content, path)
        training = content.get("training")
        if training is not None:
            expect(isinstance(training.get("flags", {}), dict), "its flags are not named")
    return content


def _check_model(content, path):
    """ValueError, or another exception, unless weights and word map fit the configuration."""
    config = content["config"]
    # what no shape tells
    heads = config.get("num_head", 1)
    expect(type(heads) is int and heads > 0 and config.get("hidden_dim", 0) % heads == 0,
           f"its num_head is {shortened(heads, 40)}")
    for name in ("dropout", "attention_dropout"):
        value = config.get(name, 0)
        expect(0 <= value <= 1, f"its {name} is {shortened(value, 40)}")
    expect(config["encoder"] is None or config["encoder"] in IMAGE_SIZE, "its encoder is unknown")
    with torch.device("meta"):      # sizes alone, without memory
        expected = model_class(content["model_type"])(**config).state_dict()
    weights = content["state_dict"]
    for name in sorted(expected.keys() | weights.keys()):
        expect(name in expected and name in weights, f"its model or this version of it lacks "
                                                     f"'{shortened(name, 60)}'")
        value = weights[name]
        expect(value.shape == expected[name].shape
               and value.is_floating_point() == expected[name].is_floating_point(),
               f"{name} has the shape {tuple(value.shape)}, its configuration requires "
               f"{tuple(expected[name].shape)}")
    words = len(Vocabulary(content["wordmap"], source=f"the word map in {path}"))
    expect(words == config["vocab_size"], f"its model has {config['vocab_size']} words, its word "
                                          f"map {words}")


def _empty_dict(*_):
    return {}


class _Inert:
    """Replaces a pickled optimizer and discards its state."""

    def __setstate__(self, state):
        pass


def _load_published(state, path, vocabulary, num_head):
    """The model of a published checkpoint, whose sizes are those of its weights."""
    if vocabulary is None:
        raise InputError(f"the published checkpoint {path} contains no vocabulary: give its word "
                         "map with --wordmap")
    with reading(path, OTHER):
        state = {key.removeprefix("module."): value for key, value in state.items()}
        V, e = state["embedding.weight"].shape
        d, C = state["img_projector.weight"].shape[:2]
        convolutions = [key for key, value in state.items()
                        if key.startswith("img_encoder.encoder.") and value.dim() == 4]
        encoder = {0: None, 13: "vgg16", 16: "vgg19"}[len(convolutions)]
        sizes = {"vocab_size": V, "embed_dim": e, "hidden_dim": d, "encoder": encoder,
                 "feature_dim": C}
        if "AdaAttention.w_h.weight" in state:
            attention_dim = state["AdaAttention.w_h.weight"].shape[1]
            model = model_class("gridtd")(**sizes, attention_dim=attention_dim)
        else:
            model = model_class("aoa")(**sizes, num_head=num_head)
    model.load_published(state)
    if len(vocabulary) != V:
        raise InputError(f"the word map has {len(vocabulary)} words, but the published checkpoint "
                         f"{path} has {V}: use the word map that was published with it")
    return model


def release(sources, path):
    """Writes a checkpoint to `path` with weights in float16, compressed, and without its training
    state; it is read like any other checkpoint.

    sources: one checkpoint, or several that were fine-tuned from the same one, whose weights are
    averaged (Wortsman et al. 2022). The weights of an encoder whose features were stored stay as
    they are if float16 would change them."""
    contents = [read(source) for source in sources]
    content = contents[0]
    for other, source in zip(contents, sources, strict=True):
        if "model_type" not in other:
            raise InputError(f"{source} is a published checkpoint: give one of train.py or "
                             "finetune.py")
        if any(other[key] != content[key] for key in ("model_type", "config", "wordmap")):
            raise InputError(f"{source} is of another model than {sources[0]}: average checkpoints "
                             "that were fine-tuned from the same one")
    # evaluation.py reads whether the model was trained on stored features
    from_features = any((other.get("training") or {}).get("from_features") for other in contents)
    for name, value in content["state_dict"].items():
        values = [other["state_dict"][name] for other in contents]
        if any(not torch.equal(value, other) for other in values):      # a mean of −0 would be 0
            if from_features and name.startswith("encoder."):
                raise InputError(f"{sources[0]} and others have different encoders, but stored "
                                 "features: average checkpoints with the same encoder")
            content["state_dict"][name] = torch.stack(values).double().mean(0).to(value.dtype)

    for name, value in content["state_dict"].items():
        keeps = from_features and name.startswith("encoder.")
        if value.is_floating_point() and not (keeps and (value.half() != value).any()):
            content["state_dict"][name] = value.half()
    content["training"] = {"from_features": from_features}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with (atomic_path(path) as temporary, zipfile.ZipFile(buffer) as stored,
          zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as compressed):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))


if __name__ == "__main__":
    parser = Parser("Makes a small file of a trained model, to be published.")
    parser.add_argument("checkpoint", nargs="+", help="checkpoint of train.py or finetune.py; of "
                        "several, fine-tuned from the same one, the weights are averaged")
    parser.add_argument("output", help="file to write")
    run_script(lambda args: release(args.checkpoint, args.output), parser.parse_args())
