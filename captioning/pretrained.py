"""Captioners of the library `transformers`, explained like the models of this project.

A model is an image-to-text model with an image encoder: encoder and decoder joined by
VisionEncoderDecoderModel, BLIP, GIT, or a language model that reads image tokens (BLIP-2, LLaVA,
PaliGemma, SmolVLM and others). Nothing in the library is changed: the rules of
captioning.explanation.rules surround its forward pass, and temporary hooks make leaves of what is
to be explained, the outputs of the image encoder and of the embeddings.

Relevance belongs to words, not to the pieces of words that the model reads: a word's value is the
sum of its pieces' logits. Images are explained one by one: they need no padding then, for which
these models have different conventions.
"""
import copy
import inspect
import warnings
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from captioning.errors import InputError
from captioning.explanation import attribution
from captioning.explanation.attribution import Derivatives, own_targets
from captioning.explanation.rules import (
    LRP,
    AttnGammaLinear,
    AttnLRP,
    Gamma,
    GammaLinear,
    Gradient,
    is_signal,
    name_of,
)
from captioning.files import check_memory, shortened
from captioning.weights import check_finite

LOST = 1e-3     # share of the parts' magnitude by which their sum may miss a word's logit
DESCRIBE = "Describe the image in one sentence."
PROMPTS = {"paligemma": "caption en", "blip-2": ""}     # of models that need another one


class Words:
    """The words of captions, a vocabulary that grows: a word is a tuple of the tokenizer's pieces.

    It is used like captioning.data.vocabulary.Vocabulary, by ids of words. ends: ids of the pieces
    that end a caption."""

    pad, start, end, unk = range(4)

    def __init__(self, tokenizer, ends):
        self.tokenizer = tokenizer
        self.ends = ends
        self.words = ["<pad>", "<start>", "<end>", "<unk>"]
        self.pieces = [(), (), (ends[0],), ()]
        self.ids = {(ends[0],): self.end}
        self.known = {}         # {words of a caption, as text: ids}

    def __len__(self):
        return len(self.words)

    def split(self, pieces):
        """The ids of the words that pieces form. A word ends before a space, and where letters and
        digits meet other characters."""
        groups = []             # [text, its pieces]
        before = ""
        for n in range(len(pieces)):
            text = self.tokenizer.decode(pieces[:n + 1], clean_up_tokenization_spaces=False)
            added = text[len(before):]
            is_same = added[:1].isalnum() == before[-1:].isalnum() and not added[:1].isspace()
            if groups and (not added or is_same or not groups[-1][0].strip()):
                groups[-1][0] += added
                groups[-1][1] += (pieces[n],)
            else:
                groups.append([added, (pieces[n],)])
            before = text
        ids = []
        for text, own in groups:
            if own not in self.ids:
                self.ids[own] = len(self.words)
                self.words.append(text.strip())
                self.pieces.append(own)
            ids.append(self.ids[own])
        self.known[" ".join(self.decode(ids))] = ids
        return ids

    def read(self, text):
        """The ids of a text's words."""
        return self.split(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, words, max_len):
        """Ids [<start>, those of words that `decode` returned, <end>]."""
        text = " ".join(words[:max_len])
        return [self.start, *(self.known.get(text) or self.read(text)), self.end]

    def decode(self, ids):
        """The words of ids up to <end>, in lower case, without <pad> and <start>."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        return [self.words[i].lower() for i in ids if i not in (self.pad, self.start)]

    @cached_property
    def outputs(self):
        """The texts of the pieces, one for each logit."""
        return [piece.strip("▁Ġ ") for piece in
                self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))]


class Cut:
    """A context in which the outputs of the image encoder and of the embeddings are leaves.

    rule: the one under which the encoder runs."""

    def __init__(self, model, encoder, rule):
        self.model = model
        self.encoder = encoder
        self.rule = rule
        self.outputs = []           # of the encoder, tensors (1, K, C)
        self.features = []          # the leaves in their place
        self.embeddings = []        # leaves (1, L, d) of words, and of their positions and types

    def __enter__(self):
        inside = {id(module) for module in self.encoder.modules()}
        embeddings = [module for module in self.model.modules()
                      if isinstance(module, nn.Embedding) and id(module) not in inside]
        self.hooks = [module.register_forward_hook(self.embedded) for module in embeddings]
        self.hooks.append(self.encoder.register_forward_pre_hook(self.before))
        self.hooks.append(self.encoder.register_forward_hook(self.after, always_call=True))
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def embedded(self, module, args, output):
        self.embeddings.append(output.detach().requires_grad_())
        return self.embeddings[-1].clone()      # models may add positions in place

    def before(self, module, args):
        self.rule.__enter__()

    def after(self, module, args, output):
        self.rule.__exit__(None, None, None)
        leaves = {}

        def leaf(value):
            if isinstance(value, tuple | list):
                return type(value)(map(leaf, value))
            if not isinstance(value, torch.Tensor) or value.dim() != 3:
                return value
            if id(value) not in leaves:         # the last hidden state may occur twice
                leaves[id(value)] = value.detach().requires_grad_()
                self.outputs.append(value)
                self.features.append(leaves[id(value)])
            return leaves[id(value)]

        for name, value in (output or {}).items():      # None after an error
            output[name] = leaf(value)


class PretrainedCaptioner:
    """A captioner of `transformers` with what scripts and experiments use of a Captioner.

    images: (B, 3, H, W) as the model's processor prepares them, which are also their `features`;
    captions: ids (B, T+1) of `words` from <start> on, zero-padded. prompt: ids (n,) of the tokens
    before a caption, from the start token on; among them those in whose place the model puts
    features of the image."""

    def __init__(self, model, words, prompt, image_processor=None):
        self.model = model.eval().requires_grad_(False)
        self.words = words
        self.prompt = prompt.to(model.device)
        self.image_processor = image_processor
        self.encoder = image_encoder(model)
        self.accepts = inspect.signature(model.forward).parameters
        self.is_tiled = model.config.model_type in ("smolvlm", "idefics3")
        # which tokens of the prompt stand for the image
        self.is_image = self.prompt == (getattr(model.config, "image_token_id", None) or -1)
        self.windows = {}       # those measured

    @property
    def device(self):
        return self.model.device

    def state_dict(self):
        return self.model.state_dict()

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
        values = values.flatten(0, -4)
        if values.dim() != 4 or len(values) != 1 or values.shape[1] != 3:
            raise InputError("models that cut images into tiles or patches themselves are not "
                             "supported: use another model")
        return values[0].float()

    def window(self, width, height):
        """x0, y0, x1, y1: where what the model sees lies in an image of this size, as fractions.

        Processors may stretch, crop or pad. It is measured: images whose brightness grows from left
        to right or from top to bottom show which place each pixel of the input comes from."""
        if (width, height) in self.windows:
            return self.windows[width, height]
        ramps = np.zeros((4, 3, height, width), np.uint8)
        ramps[1] = 255
        ramps[2] = 255 * (np.arange(width) + 0.5) / width
        ramps[3] = 255 * (np.arange(height)[:, None] + 0.5) / height
        black, white, x, y = (self.prepare(torch.from_numpy(ramp))[0] for ramp in ramps)
        is_seen = (white - black).abs() > 0.5 * (white - black).abs().max()     # not padding
        edges = []
        for places, axis in ((x, 0), (y, 1)):
            places = ((places - black) / (white - black)).where(is_seen, torch.nan)
            places = places.nanmean(axis).numpy()
            known = np.flatnonzero(np.isfinite(places))
            slope, first = np.polyfit(known, places[known], 1)
            if not slope > 0 or np.abs(first + slope * known - places[known]).max() > 0.05:
                raise InputError("the image processor of this model does more than to scale, crop "
                                 "and pad: it is not supported")
            edges.append((first - slope / 2, first + slope * (len(places) - 0.5)))
        # within the accuracy of the measurement, the image's edges are meant
        places = np.transpose(edges).ravel()
        places = np.where(np.abs(places - places.round().clip(0, 1)) < 0.015,
                          places.round(), places.round(3))
        self.windows[width, height] = tuple(places.tolist())
        return self.windows[width, height]

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
        options = own | {"do_sample": method == "sample", "max_new_tokens": max_len,
                         "no_repeat_ngram_size": 3 * block_trigrams}
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
        name = "decoder_input_ids" if hasattr(self.model, "decoder") else "input_ids"
        inputs = self.inputs(images) | {name: ids}
        try:
            generated = self.model.generate(**inputs, **options)
        except ValueError as error:         # such as a method that the library gave up
            raise InputError(f"transformers cannot caption like this ({shortened(error)}): choose "
                             "another --decoding") from error
        rows = []
        for row in generated.tolist():
            if row[:len(self.prompt)] == self.prompt.tolist():
                row = row[len(self.prompt):]
            ends = [row.index(end) for end in self.words.ends if end in row]
            words = self.words.split(row[:min(ends)] if ends else row)
            rows.append(torch.tensor(words + [self.words.end] * bool(ends)))
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
        return replace(result.summed(), words=None, features=None)

    def explain(self, images, captions, rule, encoder_rule=None, steps=None, **options):
        """The Derivatives of a batch under a rule; under a rule of relevance its Explanation.

        encoder_rule: another rule in the image encoder."""
        steps = [None] * len(images) if steps is None else steps
        try:
            results = [self.explain_one(image[None], caption, copy.copy(rule), encoder_rule, step,
                                        **options)
                       for image, caption, step in zip(images, captions, steps, strict=True)]
        except NotImplementedError as error:        # a function without a rule
            raise InputError(f"{self.model.config.model_type}: {error}") from error
        batch = {}
        for field in fields(results[0]):
            values = [getattr(result, field.name) for result in results]
            is_shared = values[0] is None or field.name == "grid"
            batch[field.name] = values[0] if is_shared else torch.cat(values)
        return type(results[0])(**batch)

    def explain_one(self, image, caption, rule, encoder_rule=None, steps=None, weights=None,
                    contrast=None, chunk=None, pixels=True, shared=None):
        """`explain` for an image (1, 3, H, W) and a caption (T+1,)."""
        T = len(caption) - 1
        is_relevance = isinstance(rule, LRP)
        image = image.detach().to(self.model.dtype).requires_grad_(pixels)
        if is_relevance:
            rule.one = image.new_ones((), requires_grad=True)
        encoder_rule = encoder_rule or copy.copy(rule)
        attentions = []

        def watch(function, args, kwargs, result):
            if name_of(function) == "softmax" and result.dim() == 4:
                attentions.append(result.detach()[0])
        rule.watch = watch

        # the forward pass, and one backward pass from the words' logits
        with torch.inference_mode(False), torch.enable_grad():
            cut, logits, targets, rows = self.run(image, caption, rule, encoder_rule, contrast)
            rows = (weights or own_targets)(caption[None], rows.dtype)[0] @ rows
            rows = rows if steps is None else rows[steps]                       # (S, targets)
            leaves = [*cut.embeddings, *cut.features] + ([rule.one] if is_relevance else [])
            derivatives = torch.autograd.grad(targets, leaves, rows, is_grads_batched=True,
                                              allow_unused=True)
            r_features = derivatives[len(cut.embeddings):][:len(cut.features)]
            used = [(x, y, r) for x, y, r in zip(cut.features, cut.outputs, r_features, strict=True)
                    if r is not None]
            r_pixels = None
            if pixels:
                r_maps = torch.cat([r for _, _, r in used], 2)
                maps = torch.cat([y for _, y, _ in used], 1)
                r_pixels = attribution.through_encoder(maps, image, r_maps, chunk).transpose(0, 1)

        # what is the same for all rules
        S = len(rows)
        features, _, r_features = used[-1]
        grid = self.grid(image, features.shape[1])
        own = slice(features.shape[1] - grid[0] * grid[1], None)     # without a class token
        step = slice(None) if steps is None else steps
        pieces, word = self.pieces_of(caption)
        first = torch.searchsorted(word, torch.arange(T, device=word.device))
        first = first.clamp(max=len(word) - 1)      # of the pieces of each word
        is_word = caption[1:] != 0

        def of_words(values):
            values = values.gather(1, pieces[:, None])[:, 0]
            return values.new_zeros(T).index_add(0, word, values)[None, step]
        logits = logits.detach()
        attention = self.attention_of(attentions, pieces, word, features.shape[1], own, T)
        attention = attention if attention is None else attention[None, step]
        result = Derivatives(
            logits=(logits[first] * is_word[:, None])[None, step],
            targets=(rows @ targets.detach())[None], word_logits=of_words(logits),
            word_log_p=of_words(logits.log_softmax(-1)), features=r_features[:, 0, own][None],
            words=None, pixels=r_pixels, attention=attention, beta=None, grid=grid,
             inputs=features.detach()[:, own], images=image.detach())

        # columns: what belongs to the tokens of a word, and to those before the caption
        L = len(self.prompt) + len(pieces) - 1
        tokens, others = self.tokens(cut.embeddings, derivatives, L, is_relevance)
        is_image = F.pad(self.is_image, (0, len(pieces) - 1))
        column = F.pad(word[:-1] + 1, (len(self.prompt), 0)).clamp(max=T - 1)
        words = tokens.new_zeros(S, T).index_add(1, column, tokens * ~is_image)
        if not is_relevance:
            return replace(result, words=words[None, ..., None])

        # relevance, and whether it adds up
        image_part = (tokens * is_image).sum(1) + sum(
            (x.detach() * r).flatten(1).sum(1) for x, _, r in used)
        rest = others + (0 if derivatives[-1] is None else derivatives[-1])
        missing = result.targets[0] - image_part - words.sum(1) - rest
        magnitude = image_part.abs() + words.abs().sum(1) + rest.abs()
        if (missing.abs() > LOST * magnitude).any():
            worst = (missing.abs() / magnitude).argmax()
            function = self.where_lost(image, caption, rule, encoder_rule, rows[worst],
                                       LOST * magnitude[worst])
            warnings.warn(f"the parts of a logit do not add up to it ({missing[worst]:+.2g} are "
                          f"missing): relevance is lost in the function {function}", stacklevel=2)
        if pixels:
            side = next(module.stride for module in self.encoder.modules()
                        if isinstance(module, nn.Conv2d))
            r_pixels = (r_pixels[0] * image.detach()).sum(1, keepdim=True)
            patches = F.avg_pool2d(r_pixels, side)
            r_pixels = F.interpolate(patches, size=image.shape[-2:])[None]
        return result.explanation(
            words=words[None], features=result.features * result.inputs[:, None], pixels=r_pixels,
            image=image_part[None], start=words[None, :, 0], previous=words[None, :, 1:].sum(-1),
            rest=rest.expand(S)[None])

    def run(self, image, caption, rule, encoder_rule, contrast=None):
        """A forward pass: the Cut, the logits (P, V) of the pieces of the caption's words, targets
        and rows (T, targets), the sum of targets that is explained for each word.

        With a contrast, a word is explained by the first of its pieces that differs from the
        contrast's: by how much its logit exceeds the other's."""
        pieces, word = self.pieces_of(caption)
        T = len(caption) - 1
        with Cut(self.model, self.encoder, encoder_rule) as cut, rule:
            logits = self.logits(image, pieces)
            if contrast is None:
                rows = F.one_hot(word, T).T.to(logits.dtype)
                return cut, logits, logits.gather(1, pieces[:, None])[:, 0], rows

            places = []
            tokens = []
            rows = logits.new_zeros(T, 2 * T)
            other = self.words.pieces[contrast]
            for t, i in enumerate(caption[1:].tolist()):
                own = self.words.pieces[i]
                n = next((n for n, pair in enumerate(zip(own, other, strict=False))
                          if pair[0] != pair[1]), None)
                place = 0 if n is None else int(torch.searchsorted(word, t)) + n
                places += [place, place]
                tokens += [0, 0] if n is None else [own[n], other[n]]
                rows[t, 2 * t:2 * t + 2] = torch.tensor([1, -1])
            return cut, logits, logits[places, tokens], rows

    def where_lost(self, image, caption, rule, encoder_rule, row, tolerance):
        """The name of the function nearest the logits that loses more relevance than `tolerance`.

        row: of the targets that are explained."""
        calls = []

        def watch(function, args, kwargs, result):
            if is_signal(result):
                calls.append((function, args, kwargs, result))
        rule = copy.copy(rule)
        rule.watch = watch
        with torch.enable_grad():
            _, _, targets, _ = self.run(image, caption, rule, copy.copy(encoder_rule))
            results = [result for *_, result in calls]
            derivatives = torch.autograd.grad(targets @ row, results, allow_unused=True)
        rule.watch = None
        for (function, args, kwargs, y), r in reversed(list(zip(calls, derivatives, strict=True))):
            if r is None:
                continue
            leaves = [rule.one]

            def leaf(x, leaves=leaves):
                """Relevance arrives at copies of the signals among the arguments."""
                if isinstance(x, tuple | list):
                    return type(x)(map(leaf, x))
                if not is_signal(x):
                    return x
                leaves.append(x.detach().clone().requires_grad_())
                if hasattr(x, "is_gate"):
                    leaves[-1].is_gate = True
                return leaves[-1]
            with torch.enable_grad(), rule:
                again = function(*map(leaf, args), **kwargs)
            if again.requires_grad:
                parts = torch.autograd.grad(again, leaves, r, allow_unused=True)
                arrived = sum((x * part).sum() for x, part in zip(leaves, parts, strict=True)
                              if part is not None)
                if ((y * r).sum() - arrived).abs() > tolerance:
                    return name_of(function)
        return "none that is nearest"

    # -- the parts of `explain_one` ----------------------------------------------------------------

    def pieces_of(self, caption):
        """The pieces (P,) of a caption's words, and the step t of the word that each belongs to."""
        own = [self.words.pieces[i] for i in caption.tolist()[1:]]
        pieces = [piece for word in own for piece in word]
        word = [t for t, word in enumerate(own) for _ in word]
        return tuple(torch.tensor(values, device=self.device) for values in (pieces, word))

    def inputs(self, images):
        """The images as an argument of the model."""
        images = images.to(self.device, self.model.dtype)
        return {"pixel_values": images[:, None] if self.is_tiled else images}

    def logits(self, image, pieces):
        """Logits (P, V) of `pieces` (P,), each predicted after the prompt and those before it."""
        P = len(pieces)
        ids = torch.cat([self.prompt, pieces[:-1]])[None]
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if hasattr(self.model, "decoder"):
            options = {"decoder_input_ids": ids}
        if "logits_to_keep" in self.accepts:
            options["logits_to_keep"] = P
        if self.model.config.model_type == "paligemma":     # image and prompt see each other
            types = F.pad(torch.zeros_like(self.prompt), (0, P - 1), value=1)
            options["token_type_ids"] = types[None]
        return self.model(**self.inputs(image), use_cache=False, **options).logits[0, -P:]

    def grid(self, image, tokens):
        """(h, w) of the image's tokens at the encoder's output, the last h·w of them."""
        H, W = image.shape[-2:]
        side = next(side for side in range(1, H + 1) if (H // side) * (W // side) <= tokens)
        return H // side, W // side

    def tokens(self, embeddings, derivatives, L, is_relevance):
        """(S, L) of the tokens read, with their positions and types; and (S,) what belongs to none.

        Gradients are those of the words, which are embedded first."""
        tokens = []
        others = 0.0 * derivatives[0].flatten(1).sum(1)
        for leaf, r in zip(embeddings, derivatives, strict=False):
            if r is None:
                continue
            value = (r * leaf.detach() if is_relevance else r).sum(-1)
            if leaf.numel() == L * leaf.shape[-1]:
                tokens.append(value.reshape(len(value), L))
            else:
                others = others + value.flatten(1).sum(1)
        return sum(tokens) if is_relevance else tokens[0], others

    def attention_of(self, attentions, pieces, word, K, own, T):
        """(T, M, K) weights of the image's tokens, the mean over layers and over a word's pieces.

        attentions: (M, n, m) of all layers of the decoder. `own`: the tokens on the grid, of K."""
        L = len(self.prompt) + len(pieces) - 1
        slots = int(self.is_image.sum())
        is_self = [a.shape[1:] == (L, L) and not a.triu(1).any() for a in attentions]
        found = [a for a, is_causal in zip(attentions, is_self, strict=True)
                 if a.shape[1:] == (L, K) and not is_causal]
        if slots:       # language model that reads image tokens, or what a Q-Former made of them
            columns = F.pad(self.is_image, (0, len(pieces) - 1))
            found = [a[..., columns] for a in attentions if a.shape[1:] == (L, L)]
            queried = [a for a in attentions if a.shape[1:] == (slots, K)]
            if queried and slots != K:
                found = [a @ torch.stack(queried).mean((0, 1)) for a in found]
        elif not found:     # image and text in one sequence
            found = [a[:, -L:, :-L] for a in attentions if a.shape[1:] == (K + L, K + L)]
        if not found:
            return None
        weights = torch.stack(found).mean(0)[:, -len(pieces):].transpose(0, 1)      # (P, M, m)
        weights = weights[..., own] if weights.shape[-1] == K else weights
        sums = weights.new_zeros(T, *weights.shape[1:]).index_add(0, word, weights)
        return sums / torch.bincount(word, minlength=T).clamp(min=1)[:, None, None]


# -- reading a model -------------------------------------------------------------------------------


def load(name, device="cpu", prompt=None):
    """(PretrainedCaptioner, Words) of a folder that `save_pretrained` wrote, or of a name of its hub.

    Code that comes with a model is never run, and weights of any type are used in float32. prompt:
    a text that precedes the captions. InputError for whatever is no captioner."""
    try:
        import transformers
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CAPTIONERS,
        )
    except ImportError as error:
        raise InputError(f"{name} is not a file, and a folder or a name on the hub requires "
                         f"transformers ({error}): pip install transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if config.model_type not in CAPTIONERS:
            raise InputError(f"{name} is a model of the type {config.model_type}, which does not "
                             "caption images: give a captioner")
        check_size(name, config, device)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):
            raise InputError(f"{name} lacks weights of its model, {missing[0]} first: it was saved "
                             "by another version of transformers, or is incomplete")
        if image_encoder(model) is None or (model.config.is_encoder_decoder
                                            and not hasattr(model, "decoder")):
            raise InputError(f"{name} has no image encoder and decoder of the kinds that can be "
                             "explained: give another captioner")
        check_finite(model.state_dict(), name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        processor = transformers.AutoImageProcessor.from_pretrained(name, **options)
        for cuts in ("do_image_splitting", "do_pan_and_scan", "crop_to_patches"):
            if hasattr(processor, cuts):
                setattr(processor, cuts, False)
        text = getattr(config, "text_config", config)
        if getattr(config, "image_token_id", None) is not None:
            whole = transformers.AutoProcessor.from_pretrained(name, **options)
            whole.image_processor = processor
            ids = prompt_of_images(whole, config.model_type, prompt)
        else:
            start = (getattr(config, "decoder_start_token_id", None)
                     or tokenizer.cls_token_id or text.bos_token_id)
            if config.model_type == "blip":
                start = text.bos_token_id
            ids = [start, *tokenizer(prompt or "", add_special_tokens=False).input_ids]
        ends = model.generation_config.eos_token_id
        if config.model_type == "blip" or ends is None:
            ends = text.sep_token_id if config.model_type == "blip" else tokenizer.eos_token_id
        words = Words(tokenizer, [ends] if isinstance(ends, int) else list(ends))
        model = PretrainedCaptioner(model.to(device), words, torch.tensor(ids), processor)
        model.prepare(torch.zeros(3, 64, 96, dtype=torch.uint8))
    except InputError:
        raise
    except Exception as error:      # of any kind: the library parses arbitrary files
        raise InputError(f"{name} cannot be loaded as a captioner of transformers "
                         f"({shortened(error) or type(error).__name__}): give a folder in which "
                         "save_pretrained wrote model, image processor and tokenizer") from error
    return model, words


def check_size(name, config, device):
    """InputError if a folder's weights do not fit into memory; a sentence if they take long."""
    size = sum(path.stat().st_size for kind in ("*.safetensors", "*.bin")
               for path in Path(name).glob(kind))
    stored = getattr(config, "dtype", None) or torch.float32
    size *= 4 / stored.itemsize
    check_memory(1.25 * size, f"explaining {name} in float32", "use a smaller model")
    if size > 4e9 and str(device) == "cpu":
        print(f"{name} has {size / 4e9:.1f} billion weights, {size / 1e9:.0f} GB: on a CPU each "
              "word takes minutes to explain")


def prompt_of_images(processor, model_type, prompt):
    """The ids of a prompt with the tokens in whose place a language model reads the image."""
    text = PROMPTS.get(model_type, DESCRIBE) if prompt is None else prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}],
                                             add_generation_prompt=True)
    elif model_type == "llava":
        text = f"USER: {processor.image_token}\n{text} ASSISTANT:"
    blank = np.zeros((3, 64, 64), np.uint8)
    return processor(images=[blank], text=[text])["input_ids"][0]


def image_encoder(model):
    """The outermost module that takes pixels and has no embeddings of words; None if there is none.
    """
    words = getattr(model, "decoder", model).get_input_embeddings()
    for module in model.modules():
        if ("pixel_values" in inspect.signature(module.forward).parameters
                and not any(part is words for part in module.modules())):
            return module
    return None
