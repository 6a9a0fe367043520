"""A captioner of `transformers` with what scripts and experiments use of a Captioner."""
import math
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from captioning.errors import InputError
from captioning.explanation import attribution
from captioning.explanation.attn_lrp import AttnGammaLinear, AttnLRP, GammaLinear
from captioning.explanation.rules import LRP, Gamma, Gradient
from captioning.files import shortened
from captioning.pretrained.relevance import Explainer


class PretrainedCaptioner(Explainer):
    """images: (B, 3, H, W) as the model's processor prepares them, which are also its `features`;
    captions: ids (B, T+1) of `words` from <start> on, zero-padded."""

    eps = 0.0       # sums of a residual stream pass near zero

    def __init__(self, model, words, prompt, image_processor=None, settings=""):
        super().__init__(model, words, prompt)
        self.image_processor = image_processor
        self.settings = settings        # what it depends on besides its weights
        self.window = cache(self.measured_window)
        text = model.config.get_text_config(decoder=True)
        words.size = text.vocab_size
        positions = getattr(text, "max_position_embeddings", None)
        words.limit = positions and positions - len(prompt)

    def state_dict(self):
        return self.model.state_dict()

    def parameters(self):
        return self.model.parameters()

    def eval(self):
        """The model itself, which is never trained."""
        return self

    def encode(self, images):
        """The images themselves: image encoder and decoder are run together."""
        return images

    def log_p(self, images, captions, steps=None):
        """(B, T) log-probabilities of the words captions[:, 1:]; with steps (B,) of one each."""
        rows = []
        with torch.no_grad():
            for image, caption in zip(images, captions, strict=True):
                pieces, word = self.pieces_of(caption)
                log_p = self.logits(image[None], pieces).log_softmax(-1)
                own = log_p.gather(1, pieces[:, None])[:, 0]
                rows.append(own.new_zeros(len(caption) - 1).index_add(0, word, own))
        rows = torch.stack(rows)
        return rows if steps is None else rows.gather(1, steps[:, None])[:, 0]

    # -- images ------------------------------------------------------------------------------------

    def prepare(self, image):
        """uint8 (3, H, W) -> float32 (3, S, S'), as the model reads it."""
        values = self.image_processor(images=[image.numpy()], return_tensors="pt",
                                      input_data_format="channels_first")["pixel_values"]
        values = values.flatten(0, -4) if values.dim() > 4 else values
        if values.dim() != 4 or len(values) != 1 or values.shape[1] != 3:
            raise InputError("models that cut images into tiles or patches themselves are not "
                             "supported: use another model")
        return values[0].float()

    def measured_window(self, width, height):
        """x0, y0, x1, y1: where what the model sees lies in an image of this size, as fractions.

        Processors may stretch, crop or pad. It is measured: images whose brightness grows from left
        to right or from top to bottom show which place each pixel of the input comes from."""
        # of a few pixels there would be too few places
        enlarged = math.ceil(16 / min(width, height))
        width, height = enlarged * width, enlarged * height
        ramps = np.zeros((4, 3, height, width), np.uint8)
        ramps[1] = 255
        ramps[2] = np.round(255 * (np.arange(width) + 0.5) / width)
        ramps[3] = np.round(255 * (np.arange(height)[:, None] + 0.5) / height)
        black, white, x, y = (self.prepare(torch.from_numpy(ramp))[0] for ramp in ramps)
        is_seen = (white - black).abs() > 0.5 * (white - black).abs().max()     # not padding
        edges = []
        for places, axis in ((x, 0), (y, 1)):
            places = ((places - black) / (white - black)).where(is_seen, torch.nan)
            places = places.nanmean(axis).numpy()
            known = np.flatnonzero(np.isfinite(places))
            slope, first = np.polyfit(known, places[known], 1) if len(known) > 1 else (0, 0)
            if not slope > 0 or np.abs(first + slope * known - places[known]).max() > 0.05:
                raise InputError("the image processor of this model does more than to scale, crop "
                                 "and pad: it is not supported")
            edges.append((first - slope / 2, first + slope * (len(places) - 0.5)))
        # within the accuracy of the measurement, the image's edges are meant
        places = np.transpose(edges).ravel()
        places = np.where(np.abs(places - places.round().clip(0, 1)) < 0.015,
                          places.round(), places.round(3))
        return tuple((places + 0.0).tolist())       # no −0

    # -- captions ----------------------------------------------------------------------------------

    def caption(self, images, method="beam_search", max_len=50, seeds=None, block_trigrams=False,
                beam_size=3, length_penalty=0.0, diversity=0.5, temperature=1.0, top_k=0,
                top_p=1.0):
        """Captions (B, T) of images by the library's `generate`: ids of words, zero-padded.

        Options: as in captioning.decoding.decode; max_len counts pieces of words."""
        own = {"greedy": {"num_beams": 1},
               "beam_search": {"num_beams": beam_size, "length_penalty": length_penalty},
               "diverse_beam_search": {
                   "num_beams": beam_size, "num_beam_groups": beam_size,
                   "diversity_penalty": diversity, "length_penalty": length_penalty},
               "sample": {"num_beams": 1, "temperature": temperature, "top_k": top_k,
                          "top_p": top_p}}[method]
        options = own | {"do_sample": method == "sample",
                         "max_new_tokens": min(max_len, self.words.limit or max_len),
                         "no_repeat_ngram_size": 3 * block_trigrams,
                         "return_dict_in_generate": False, "num_return_sequences": 1}
        rows = []
        # sampled one by one, so that a caption does not depend on the other images
        for number, part in enumerate(images.split(1 if method == "sample" else len(images))):
            with torch.random.fork_rng():
                torch.manual_seed(0 if seeds is None else int(seeds[number]))
                rows += self.generate(part, options)
        return pad_sequence(rows, batch_first=True).to(images.device)

    def generate(self, images, options):
        """Ids of words (T,) of each image, by the library's options."""
        ids = self.prompt.expand(len(images), -1)
        if self.model.config.model_type == "blip":      # which omits the last token of a prompt
            ids = F.pad(ids, (0, 1))
        if self.image_token is not None:
            options = options | {"suppress_tokens": [self.image_token]}
        inputs = self.inputs(images) | self.text(ids)
        try:
            generated = self.model.generate(**inputs, **options)
        except (ValueError, OSError) as error:      # such as a method that the library gave up
            raise InputError(f"transformers cannot caption like this ({shortened(error)}): choose "
                             "another --decoding") from error
        rows = []
        for row in generated.tolist():
            if row[:len(self.prompt)] == self.prompt.tolist():
                row = row[len(self.prompt):]
            ends = [row.index(end) for end in self.words.ends if end in row]
            words = self.words.split(row[:min(ends)] if ends else row)
            rows.append(torch.tensor(words + [self.words.end] * bool(ends), dtype=torch.long))
        return rows

    # -- explanations of every word captions[:, t + 1] at every step t -----------------------------
    # Each returns an attribution.Explanation; options: those of attribution.explain.

    def lrp(self, images, captions, eps=0.0, rule=None, **options):
        """LRP with attention weights as constants; rule: Gamma() for the γ-rule in the encoder."""
        own = GammaLinear(rule.gamma, eps) if isinstance(rule, Gamma) else None
        return self.explain(images, captions, LRP(eps), own, **options)

    def lrp_specific(self, images, captions, **options):
        """LRP of each word minus the mean of LRP of the caption's other words."""
        return attribution.minus_other_words(self.lrp, images, captions, **options)

    def attn_lrp(self, images, captions, eps=0.0, gamma=0.0, **options):
        """AttnLRP (Achtibat et al. 2024); gamma: of the γ-rule in the encoder, if it is not 0."""
        own = AttnGammaLinear(gamma, eps) if gamma else None
        return self.explain(images, captions, AttnLRP(eps), own, **options)

    def gradient(self, images, captions, **options):
        """The gradient of each word's logit."""
        return self.explain(images, captions, Gradient(), **options).summed()

    def grad_cam(self, images, captions, pixels=True, **options):
        """Grad-CAM at the encoder's output (Selvaraju et al. 2017)."""
        result = self.explain(images, captions, Gradient(), **options | {"pixels": False})
        return result.class_activation_map(pixels)

    def attention(self, images, captions, **options):
        """The attention weights alone; words, features and pixels are None."""
        result = self.explain(images, captions, Gradient(), **options | {"pixels": False})
        if result.attention is None:
            raise InputError(f"the attention of {self.model.config.model_type} to the image is not "
                             "known: omit attention from --methods")
        K = result.attention.shape[-1]
        if math.prod(result.grid) != K:         # the language model reads fewer tokens
            result.grid = (math.isqrt(K),) * 2
        return replace(result.summed(), words=None, features=None)
