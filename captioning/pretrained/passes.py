"""Forward passes of captioners of `transformers` under a rule of relevance."""
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from captioning.errors import InputError

# models that read types of tokens, and whether those of an image have a type of their own
TYPED = {"paligemma": False, "gemma3": True}


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
            if value.dim() != 3:
                return value
            if id(value) not in leaves:         # the last hidden state may occur twice
                leaves[id(value)] = value.detach().requires_grad_()
                self.outputs.append(value)
                self.features.append(leaves[id(value)])
            return leaves[id(value)]
        return tree_map_only(torch.Tensor, leaf, output)


class Passes:
    """A captioner of `transformers`, for one image and one caption at a time: they need no padding
    then, for which these models have different conventions.

    model: of the library; words: `Words`; prompt: ids (n,) of the tokens before a caption, from the
    start token on, among them those in whose place the model puts features of the image."""

    def __init__(self, model, words, prompt):
        self.model = model.eval().requires_grad_(False)
        self.words = words
        self.prompt = prompt.to(model.device)
        self.encoder = image_encoder(model)
        self.accepts = inspect.signature(model.forward).parameters
        self.is_tiled = model.config.model_type in ("smolvlm", "idefics3")
        # the token in whose place the image is read
        self.image_token = getattr(model.config, "image_token_id", None)
        self.is_image = self.prompt == (-1 if self.image_token is None else self.image_token)

    @property
    def device(self):
        return self.model.device

    def pieces_of(self, caption):
        """The pieces (P,) of a caption's words, and the step t of the word that each belongs to."""
        own = [self.words.pieces[i] for i in caption.tolist()[1:]]
        pieces = [piece for word in own for piece in word]
        word = [t for t, word in enumerate(own) for _ in word]
        if self.image_token in pieces:
            raise InputError("a caption contains the token in whose place the model reads the "
                             "image: give another caption")
        return tuple(torch.tensor(values, device=self.device) for values in (pieces, word))

    def inputs(self, images):
        """The images as an argument of the model."""
        images = images.to(self.device, self.model.dtype)
        return {"pixel_values": images[:, None] if self.is_tiled else images}

    def logits(self, image, pieces):
        """Logits (P, V) of `pieces` (P,), each predicted after the prompt and those before it."""
        P = len(pieces)
        ids = torch.cat([self.prompt, pieces[:-1]])[None]
        arguments = self.inputs(image) | self.text(ids)
        if self.model.config.model_type == "paligemma":     # image and prompt see each other
            lowest = torch.finfo(self.model.dtype).min
            mask = image.new_full(2 * ids.shape[1:], lowest, dtype=self.model.dtype).triu(1)
            mask[:, :len(self.prompt)] = 0
            arguments["attention_mask"] = mask[None, None]
        for name, value in (("use_cache", False), ("logits_to_keep", P)):
            if name in self.accepts:
                arguments[name] = value
        return self.model(**arguments).logits[0, -P:]

    def text(self, ids):
        """Ids (B, L) that begin with the prompt, as arguments of the model."""
        if hasattr(self.model, "decoder"):
            return {"decoder_input_ids": ids}
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.model.config.model_type in TYPED:
            own = TYPED[self.model.config.model_type]
            arguments["token_type_ids"] = (ids == self.image_token).long() * own
        return arguments

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
                differs = [a != b for a, b in zip(own, other, strict=False)]
                n = differs.index(True) if any(differs) else None
                place = 0 if n is None else int(torch.searchsorted(word, t)) + n
                places += [place, place]
                tokens += [0, 0] if n is None else [own[n], other[n]]
                rows[t, 2 * t:2 * t + 2] = torch.tensor([1, -1])
            return cut, logits, logits[places, tokens], rows


def image_encoder(model):
    """The outermost module that takes pixels and has no embeddings of words; None if there is none.
    """
    words = getattr(model, "decoder", model).get_input_embeddings()
    for module in model.modules():
        if ("pixel_values" in inspect.signature(module.forward).parameters
                and not any(part is words for part in module.modules())):
            return module
    return None
