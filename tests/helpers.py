"""Models, inputs and reference implementations that several test modules share."""
import base64
import contextlib
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
from aoamodel import AOAModel
from captioning import checkpoint
from captioning.data.dataset import features_path, split_path
from captioning.data.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.decoding import image_seeds
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, SPLIT
from captioning.files import fingerprint
from captioning.training import log
from gridTDmodel import GridTDModel

V, T = 12, 5
MODEL_TYPES = [GridTDModel, AOAModel]
MODELS = pytest.mark.parametrize("model_type", MODEL_TYPES)

# the explanation methods of this project's models, and the fields of their explanations
OWN_METHODS = [name for name, method in METHODS.items() if method.needs != "attn_lrp"]
FIELDS = ("logits", "targets", "words", "features", "pixels", "attention", "beta", *SPLIT)

CAPTIONS = torch.tensor([[1, 7, 3, 3, 9, 2], [1, 4, 11, 2, 0, 0], [1, 5, 0, 0, 0, 0]])


def max_pooled():
    """An encoder of 8×8 pixels to 4×4 regions."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())


ENCODERS = pytest.mark.parametrize("encoder", [None, max_pooled])


def make(model_type, encoder=None, seed=0, biased=True, **options):
    """A model in float64 whose weights and biases are far from their small initial values."""
    torch.manual_seed(seed)
    attention = {AOAModel: {"num_head": 2}, GridTDModel: {"attention_dim": 5}}
    options = {"feature_dim": 7} | attention.get(model_type, {}) | options
    model = model_type(V, 4, 6, encoder=encoder and encoder(), **options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.4 if biased else 0)
            elif not name.startswith("embedding"):
                parameter.mul_(2)
    return model


def small_model(name, vocabulary, seed=0, **options):
    """A random "gridtd" or "aoa", by default with the encoder "small"."""
    torch.manual_seed(seed)
    model_type, attention = {"gridtd": (GridTDModel, {"attention_dim": 6}),
                             "aoa": (AOAModel, {"num_head": 2})}[name]
    sizes = {"embed_dim": 8, "hidden_dim": 8, "encoder": "small"}
    return model_type(len(vocabulary), **sizes | attention | options)


def vocabulary_of(words):
    """<pad>, the words, <unk>, <start> and <end>."""
    return Vocabulary({word: i for i, word in enumerate([PAD, *words, UNK, START, END])})


def make_batch(captions, seed=0, epoch=0, step=0, **more):
    """What the training loop gives to a loss besides features."""
    index = torch.arange(len(captions))
    return {"captions": captions, "index": index, "seeds": image_seeds(index.tolist(), seed),
            "epoch": epoch, "step": step, **more}


def random_images(seed=0):
    """(3, 3, 8, 8)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)


def random_regions(seed=0):
    """(3, 6, 7) region features of both signs; images 2 and 3 lack some."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    features[1, 4:], features[2, 2] = 0, 0
    return features


def inputs_of(encoder):
    """Images for a model with an encoder, region features for one without."""
    return random_images() if encoder else random_regions()


def assert_close(actual, expected, tolerance=1e-12):
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_same(actual, expected, *but):
    """All fields of two explanations are equal."""
    for field in FIELDS:
        if field not in but:
            torch.testing.assert_close(getattr(actual, field), getattr(expected, field),
                                       rtol=1e-12, atol=1e-12)


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@contextlib.contextmanager
def refused(message=None):
    """Expects an InputError of one line that the regular expression describes."""
    with pytest.raises(InputError, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def call(script, *flags):
    """Runs a script in this process -> whether the arguments that it is given are unchanged."""
    args = script.get_args_parser().parse_args([*map(str, flags)])
    before = dict(vars(args))
    script.main(args)
    return vars(args) == before


PUBLISHED = {
    GridTDModel: {"encoder.": "img_encoder.encoder.", "W_v.": "img_projector.",
                  "W_g.": "global_img_feature_proj.", "lstm1.": "AdaLSTM.lstm_cell.",
                  "W_x.": "AdaLSTM.x_gate.",
                  "W_h.": "AdaLSTM.h_gate.",
                  "W_a.": "AdaAttention.W_v_proj.", "W_s.": "AdaAttention.W_s_proj.",
                  "W_q.": "AdaAttention.W_g_proj.", "w_a.": "AdaAttention.w_h.",
                  "lstm2.": "LanguageLSTM.",
                  "embedding.": "embedding.", "W_o.": "fc."},
    AOAModel: {"encoder.": "img_encoder.encoder.", "W_v.": "img_projector.",
               "embedding.": "embedding.", "lstm.": "LanguageLSTM.",
               "W_K.": "decoder_k_proj.", "W_U.": "decoder_v_proj.",
               "W_Q.": "decoder_multihead_attention.q_proj.", "W_G.": "decoder_aoa_linear_gate.",
               "W_L.": "decoder_aoa_linear.", "W_o.": "fc."}}


def published_state(model):
    """The model's weights with published names: an LSTMCell, W_v as a 1×1 convolution."""
    state = {}
    for key, value in model.state_dict().items():
        prefix = next(prefix for prefix in PUBLISHED[type(model)] if key.startswith(prefix))
        name = PUBLISHED[type(model)][prefix] + key.removeprefix(prefix).removesuffix("_l0")
        state[name] = value[..., None, None] if key == "W_v.weight" else value
    return state


def prepare_flags(folder):
    """Of the session's demo data set."""
    return ["--dataset", "demo", "--output_folder", str(folder), "--demo_size", "24", "8", "8",
            "--workers", "0", "--features", "cnn", "--encoder", "small", "--batch_size", "7",
            "--device", "cpu"]


def train_flags(data, save_path, *extra):
    return ["--data_folder", str(data), "--encoder", "small", "--embed_dim", "8",
            "--hidden_dim", "16", "--attention_dim", "8", "--num_head", "2", "--batch_size", "4",
            "--epochs", "2", "--workers", "0", "--device", "cpu",
            "--save_path", str(save_path), *extra]


# without a CNN: where only the course of the training matters, which is then several times faster
REGIONS = ("--encoder", "bottom_up")


def train_run(data, save_path, *extra, curves=False):
    """`run_training` of train.py."""
    return run_training(train, train_flags(data, save_path, *extra), save_path, curves)


def run_training(script, flags, save_path, curves=False):
    """Runs train.py or finetune.py -> its last checkpoint. curves: draw curves.png (slow)."""
    draw = log.draw_training_curves if curves else lambda *_: None
    with mock.patch.object(log, "draw_training_curves", draw):
        assert call(script, *flags)
    return checkpoint.read(Path(save_path) / "checkpoint_last.pth")


def same(a, b):
    """Whether two nested values are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def literal_of_regions(relevance, regions, boxes, tau):
    """Correctness of a word by loops: relevance (K,), regions (K, 4), boxes of its kind (m, 4)."""
    positive = [max(0.0, value) for value in relevance.tolist()]
    shares = [value / max(positive) for value in positive]
    remaining = [value if value > tau else 0.0 for value in shares]
    best = 0.0
    for a0, b0, a1, b1 in boxes.tolist():
        inside = 0.0
        for value, (x0, y0, x1, y1) in zip(remaining, regions.tolist(), strict=True):
            width, height = min(x1, a1) - max(x0, a0), min(y1, b1) - max(y0, b0)
            if width > 0 and height > 0:
                inside += value * width * height / ((x1 - x0) * (y1 - y0))
        best = max(best, inside / sum(remaining))
    return best


def encoded(values, kind=np.float32):
    """base64 text of an array, as in a tsv file of region features."""
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()


def write_region_features(demo_data):
    """Stores random features of 5 regions, some padding, and 6 channels for the demo data."""
    for split, size in (("train", 24), ("val", 8)):
        with h5py.File(split_path(demo_data, "demo", split)) as file:
            names = file["names"].asstr()[:].tolist()
        features = np.random.default_rng(0).random((size, 5, 6), dtype=np.float32)
        features[::2, 4] = 0
        with h5py.File(features_path(demo_data, "demo", split, "bottom_up"), "w") as file:
            file["features"] = features.astype(np.float16)
            file.attrs["names"] = fingerprint(names)


def pixels(path):
    """The colours (H, W, 3) of a plot."""
    with Image.open(path) as plot:
        return np.asarray(plot.convert("RGB")).astype(int)


def reds_and_blues(path):
    """Numbers of red and of blue pixels of a plot."""
    r, g, b = pixels(path).transpose(2, 0, 1)
    return ((r > b + 100) & (r > g + 100)).sum(), ((b > r + 100) & (b > g + 100)).sum()
