"""The relevance of words and images in captioners of `transformers`, and whether it adds up."""
import copy
import warnings
from dataclasses import fields, replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from captioning.errors import InputError
from captioning.explanation import attribution
from captioning.explanation.attribution import Derivatives, own_targets
from captioning.explanation.functions import is_signal, name_of
from captioning.explanation.rules import LRP
from captioning.pretrained.passes import Passes

FEW = 100_000   # features; through fewer, starting a backward pass takes a CPU most of the time
LOST = 1e-3     # share of the parts' magnitude by which their sum may miss a word's logit


class Explainer(Passes):
    """Explanations of a captioner of `transformers` under the rules of captioning.explanation."""

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
        encoder_rule = encoder_rule or copy.copy(rule)
        if is_relevance:        # of constants of the encoder nothing is reported
            rule.one = image.new_ones((), requires_grad=True)
        attentions = []

        def watch(function, args, kwargs, result):
            if name_of(function) == "softmax" and result.dim() == 4:
                attentions.append(result.detach()[0].to(image.dtype))
        rule.watch = watch

        # the forward pass, and one backward pass from the words' logits
        with torch.inference_mode(False), torch.enable_grad():
            cut, logits, targets, rows = self.run(image, caption, rule, encoder_rule, contrast)
            own_rows = rows     # each word's value, before `weights` mixes those of several words
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
                if chunk is None and maps.device.type == "cpu":
                    chunk = max(1, FEW // maps.numel())
                r_pixels = attribution.through_encoder(maps, image, r_maps, chunk).transpose(0, 1)

        # what is the same for all rules
        features, _, r_features = used[-1]
        grid = self.grid(image, features.shape[1])
        # the encoder's last tokens form the grid; class tokens come before them
        own = slice(features.shape[1] - grid[0] * grid[1], None)
        step = slice(None) if steps is None else steps
        pieces, word = self.pieces_of(caption)
        first = torch.searchsorted(word, torch.arange(T, device=word.device))
        first = first.clamp(max=len(word) - 1)      # of the pieces of each word
        is_word = caption[1:, None] != 0
        logits = logits.detach()
        log_p = logits.log_softmax(-1).gather(1, pieces[:, None])[:, 0]
        attention = self.attention_of(attentions, pieces, word, features.shape[1], own, T)
        result = Derivatives(
            logits=(logits[first] * is_word)[None, step], targets=(rows @ targets.detach())[None],
            word_logits=(own_rows @ targets.detach())[None, step],
            word_log_p=log_p.new_zeros(T).index_add(0, word, log_p)[None, step],
            words=None, features=r_features[:, 0, own][None], pixels=r_pixels, beta=None, grid=grid,
            attention=None if attention is None else attention[None, step],
            inputs=features.detach()[:, own], images=image.detach())

        # columns: what belongs to the tokens of a word, and to those before the caption
        L = len(self.prompt) + len(pieces) - 1
        tokens, others = self.tokens(cut.embeddings, derivatives, L, is_relevance)
        is_image = F.pad(self.is_image, (0, len(pieces) - 1))
        column = F.pad(word[:-1] + 1, (len(self.prompt), 0)).clamp(max=T - 1)
        words = tokens.new_zeros(len(rows), T).index_add(1, column, tokens * ~is_image)
        if not is_relevance:
            return replace(result, words=words[None, ..., None])

        # relevance, and whether it adds up
        image_part = (tokens * is_image).sum(1) + sum(
            (x.detach() * r).flatten(1).sum(1) for x, _, r in used)
        rest = others + (0 if derivatives[-1] is None else derivatives[-1])
        missing = result.targets[0] - image_part - words.sum(1) - rest
        tolerance = LOST * (image_part.abs() + words.abs().sum(1) + rest.abs())
        if (missing.abs() > tolerance).any():
            worst = (missing.abs() - tolerance).argmax()
            function = self.where_lost(image, caption, rule, encoder_rule, rows[worst],
                                       tolerance[worst])
            warnings.warn(f"the parts of a logit do not add up to it ({missing[worst]:+.2g} are "
                          f"missing): relevance is lost in the function {function}", stacklevel=2)
        if pixels:
            r_pixels = self.over_patches((r_pixels[0] * image.detach()).sum(1, keepdim=True))[None]
        return result.explanation(
            words=words[None], features=result.features * result.inputs[:, None], pixels=r_pixels,
            image=image_part[None], start=words[None, :, 0], previous=words[None, :, 1:].sum(-1),
            rest=rest.expand(len(rows))[None])

    def over_patches(self, relevance):
        """Maps (S, 1, H, W), spread evenly over each patch that the encoder reads."""
        side = next(module.stride for module in self.encoder.modules()
                    if isinstance(module, nn.Conv2d))
        return F.interpolate(F.avg_pool2d(relevance, side), size=relevance.shape[-2:])

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
                if not is_signal(x):
                    return x
                leaves.append(x.detach().clone().requires_grad_())
                if hasattr(x, "is_gate"):
                    leaves[-1].is_gate = True
                return leaves[-1]
            with torch.enable_grad(), rule:
                again = function(*tree_map(leaf, args), **kwargs)
            if again.requires_grad:
                parts = torch.autograd.grad(again, leaves, r, allow_unused=True)
                arrived = sum((x * part).sum() for x, part in zip(leaves, parts, strict=True)
                              if part is not None)
                if ((y * r).sum() - arrived).abs() > tolerance:
                    return name_of(function)
        return "none that is nearest"
