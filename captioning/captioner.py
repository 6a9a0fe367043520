"""What all captioning models have in common: their base class, and their names."""
from importlib import import_module

import torch
from torch import nn

from captioning import weights
from captioning.data.images import preprocess
from captioning.explanation import encoders
from captioning.explanation.lrp_inference import stop_mask, weighted_hidden

# --model_type: module and class, imported when they are used; register a model of yours here
MODELS = {"gridtd": ("gridTDmodel", "GridTDModel"), "aoa": ("aoamodel", "AOAModel")}


def model_class(model_type):
    """The class of --model_type: GridTDModel of "gridtd", AOAModel of "aoa"."""
    module, name = MODELS[model_type]
    return getattr(import_module(module), name)


def model_type(model):
    """The --model_type of a model: the inverse of `model_class`."""
    return next(key for key, (_, name) in MODELS.items() if type(model).__name__ == name)


class Captioner(nn.Module):
    """A model that captions images word by word, from features (B, K, C) of K regions.

    A subclass defines start, initial_state, step and teacher_force, the layers embedding, dropout
    and W_o, the explanation methods as in gridTDmodel.py, and for the region loss region_logits
    (docs/new_model.md). config: the arguments from which a checkpoint rebuilds it. Its entry
    "encoder" is a name in encoders.IMAGE_SIZE, an nn.Sequential of layers that the rules know, or
    None for region features.
    """

    eps = 0.01      # ε of LRP by default

    def __init__(self, config):
        super().__init__()
        self.config = config
        encoder = config["encoder"]
        self.encoder = encoders.architecture(encoder) if isinstance(encoder, str) else encoder
        if encoder is None:
            self.feature_dim = config["feature_dim"]
        else:
            self.feature_dim = encoders.feature_dim(self.encoder)

    @property
    def device(self):
        return self.W_o.weight.device

    def prepare(self, image):
        """uint8 (3, H, W) -> float32 (3, S, S), as the encoder reads it."""
        return preprocess(image, encoders.IMAGE_SIZE[self.config["encoder"]])

    def window(self, width, height):
        """The part (x0, y0, x1, y1) that `prepare` keeps of an image, as fractions of it."""
        return 0, 0, 1, 1

    def encode(self, images):
        """images (B, 3, H, W) -> features (B, K, C), the K positions row by row.

        Region features (B, K, C) are returned unchanged."""
        images = images.to(self.W_o.weight.dtype)
        if images.dim() == 3:
            return images
        return self.encoder(images).flatten(2).transpose(1, 2)

    def region_mask(self, features):
        """(B, K) bool, False at padding: regions that are all zero; None if there is an encoder."""
        return None if self.encoder is not None else (features != 0).any(-1)

    def output(self, hidden):
        """The predictor's input (..., d) -> logits (..., V)."""
        return self.W_o(self.dropout(hidden))

    def forward(self, images, captions):
        """Logits (B, T, V), teacher-forced on captions[:, :-1].

        images (B, 3, H, W) or region features (B, K, C); captions (B, T+1): ids from <start> on,
        zero-padded."""
        trace = self.teacher_force(self.encode(images), captions[:, None])
        return self.output(trace.hidden[:, 0])

    def log_p(self, features, captions, steps=None):
        """(B, T) log-probabilities of the words captions[:, 1:] from features (B, K, C); with steps
        (B,) only of the word captions[b, steps[b] + 1] each, (B,)."""
        hidden = self.teacher_force(features, captions[:, None]).hidden[:, 0]
        words = captions[:, 1:]
        if steps is not None:
            rows = torch.arange(len(captions), device=captions.device)
            hidden, words = hidden[rows, steps], words[rows, steps]
        return self.output(hidden).log_softmax(-1).gather(-1, words[..., None])[..., 0]

    def lrp_inference(self, images, captions, stop_words, eps=0.01):
        """Logits p and weighted logits p̃ (docs/method.md, section 7), each of `forward`'s shape.

        stop_words: set of ids, special tokens included, whose weights stay 1."""
        trace = self.teacher_force(self.encode(images), captions[:, None])
        # p and p̃ have the same dropout mask
        mask = self.dropout(torch.ones_like(trace.hidden))
        logits = self.W_o(mask * trace.hidden)
        stop = stop_mask(self, stop_words)
        hidden = weighted_hidden(self, trace.c_hat, trace.h, logits.argmax(-1), stop, eps)
        return logits[:, 0], self.W_o(mask * hidden)[:, 0]

    def load_published(self, state_dict):
        """Loads a state_dict with the names of the published checkpoints (section 10).

        InputError if it belongs to another model. Sets `query_per_region`, if the model has it."""
        weights.load_published(self, state_dict, self.PUBLISHED_NAMES)
        if "query_per_region" in self.config:
            self.config["query_per_region"] = True
            self.query_per_region = True
