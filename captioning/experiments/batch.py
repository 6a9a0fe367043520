"""A batch of pictures with their captions, and the explanations of its words, made when they are asked for."""
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from captioning.data.vocabulary import tokenise
from captioning.experiments.correctness import word_boxes
from captioning.explanation import attribution, methods
from captioning.explanation.methods import pixel_maps, region_relevance
from captioning.files import fingerprint

METHODS = (*methods.METHODS, "random")


@dataclass
class Study:
    """What all pictures share; object words are those that `objects` names, frequent words where it names none."""
    model: object
    vocabulary: object
    methods: tuple
    objects: object                 # captioning.objects.Objects
    boxes: dict                     # {file name: entry}
    frequent: set                   # frequent object words
    stop_words: set
    masks: object = None            # captioning.localisation.Masks
    decode: object = None           # features (B, K, C) -> captions (B, T), ids after <start>
    seed: int = 1
    read_boxes: object = None       # indices -> boxes (B, K, 4) of their regions in pixels, for region features


class Batch:
    """B pictures: indices, names, images (B, 3, S, S) or region features (B, K, C), captions as lists of words,
    references as lists of sentences.

    only: (B, T) bool, the words that may be studied; all by default. Step t is that of the word captions[t], T steps
    with <end>. Every (B, T) mask below says of each step whether its word is of that kind.
    """

    def __init__(self, study, indices, names, images, words, references, only=None):
        self.study, self.indices, self.names, self.images = study, indices, names, images
        self.words, self.references, self.only = words, references, only
        encode = study.vocabulary.encode
        self.captions = pad_sequence([torch.tensor(encode(sentence, len(sentence))) for sentence in words],
                                     batch_first=True).to(images.device)               # (B, T+1)
        named = study.objects.named if study.objects.words else self._frequent
        self.categories = [dict(named(sentence)) for sentence in words]
        self._explanations, self._pixels = {}, {}

    def _frequent(self, sentence):
        return [(t, word) for t, word in enumerate(sentence) if word in self.study.frequent]

    def _mask(self, is_wanted):
        """(B, T): is_wanted(row, step, word)."""
        mask = torch.zeros(len(self.words), self.captions.shape[1] - 1, dtype=torch.bool)
        for b, sentence in enumerate(self.words):
            mask[b, :len(sentence)] = torch.tensor([bool(is_wanted(b, t, word)) for t, word in enumerate(sentence)],
                                                   dtype=torch.bool)
        mask = mask.to(self.images.device)
        return mask if self.only is None else mask & self.only

    @cached_property
    def object_words(self):
        return self._mask(lambda b, t, _: t in self.categories[b])

    @cached_property
    def stop_words(self):
        return self._mask(lambda b, t, word: word in self.study.stop_words)

    @cached_property
    def frequent_words(self):
        return self._mask(lambda b, t, word: word in self.study.frequent)

    @cached_property
    def boxed_words(self):
        """Object words whose object has a box in the picture."""
        return self._mask(lambda b, t, _: self.categories[b].get(t) in self.study.boxes.get(
            self.names[b], {}).get("categories", ()))

    @cached_property
    def masked_words(self):
        """Object words whose object has a mask in the picture."""
        return self._mask(lambda b, t, _: self.study.masks.has(self.indices[b], self.categories[b].get(t)))

    def boxes(self, rows, steps):
        """(n, m, 4) the boxes of the words' objects in shares of the picture, NaN where there are fewer than m."""
        found = [word_boxes(self.study.boxes[self.names[b]], self.categories[b][t])
                 for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
        return pad_sequence(found, batch_first=True, padding_value=torch.nan).to(self.images)

    @property
    def on_regions(self):
        return self.images.dim() == 3

    @cached_property
    def region_there(self):
        """(B, K), 1 for regions and 0 for padding."""
        return (self.images != 0).any(-1).to(self.images.dtype)

    def region_boxes(self, rows):
        """(n, K, 4) the boxes of the pictures' regions in shares of the picture."""
        sides = torch.tensor([self.study.boxes[self.names[b]]["shape"] * 2 for b in rows.tolist()])
        return (self.study.read_boxes(self.indices)[rows.cpu()] / sides[:, None]).to(self.images)

    def masks(self, rows, steps):
        """(n, S, S) bool, True where the words' objects are."""
        found = [self.study.masks.of(self.indices[b], self.categories[b][t], self.images.shape[-2:])
                 for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
        return torch.stack(found).to(self.images.device)

    def right_words(self, rows, steps):
        """(n,) bool: whether a reference has the word."""
        there = [set().union(*map(tokenise, texts)) for texts in self.references]
        return torch.tensor([self.words[b][t] in there[b] for b, t in zip(rows.tolist(), steps.tolist(), strict=True)],
                            device=self.images.device)

    @cached_property
    def features(self):
        """(B, K, C)"""
        return encode(self.study.model, self.images)

    @cached_property
    def _trace(self):
        return self.study.model.teacher_force(self.features, self.captions[:, None])

    @cached_property
    def log_p(self):
        """(B, T) the words' log-probabilities."""
        log_p = self.study.model.output(self._trace.hidden[:, 0]).log_softmax(-1)
        return log_p.gather(2, self.captions[:, 1:, None]).squeeze(2)

    @property
    def beta(self):
        """(B, T) the sentinel's share; None for models without."""
        return None if self._trace.beta is None else self._trace.beta[:, 0, :, 0]

    @cached_property
    def _steps(self):
        """(B, S) steps of the words whose maps can be asked for, and (B, T) each step's place among them."""
        wanted = self.object_words | self.frequent_words
        width = max(1, int(wanted.sum(1).max()))
        return wanted.int().argsort(dim=1, descending=True, stable=True)[:, :width], wanted.cumsum(1) - 1

    def maps(self, method, rows, steps):
        """(n, S, S) the method's maps of the words at (rows, steps), object or frequent words, summed over channels.
        For region features (n, K)."""
        if self.on_regions:
            return self._region_relevance(method)[rows, steps]
        return self._pixel_maps(method)[rows, self._steps[1][rows, steps]]

    def _region_relevance(self, method):
        """(B, T, K)"""
        if method == "random":
            return torch.stack([maps for _, maps in self._random]) * self.region_there[:, None]
        return region_relevance(self._without_pixels(method), method)

    def _pixel_maps(self, method):
        """(B, S, H, W) at the steps of self._steps."""
        if method not in self._pixels:
            chosen = self._steps[0]
            if method == "guided_grad_cam":     # both factors may already be there
                maps = self._pixel_maps("guided_backprop") * self._pixel_maps("grad_cam")
            elif method == "random":
                maps = torch.stack([maps[steps] for steps, (_, maps) in zip(chosen, self._random, strict=True)])
            else:
                explanation = getattr(self.study.model, method)(self.images, self.captions, steps=chosen)
                maps = pixel_maps(explanation, method, tuple(self.images.shape[-2:]))
            self._pixels[method] = maps
        return self._pixels[method]

    def relevance(self, method, rows, steps):
        """(n, T) the relevance of the word read at each step i ≤ t, for the words at (rows, steps)."""
        if method == "random":
            return torch.stack([words for words, _ in self._random])[rows, steps]
        return self._without_pixels({"guided_grad_cam": "guided_backprop"}.get(method, method)).words[rows, steps]

    def _without_pixels(self, method):
        """The Explanation of all T steps down to the encoder's output, features summed over channels."""
        if method not in self._explanations:
            explanation = getattr(self.study.model, method)(self.images, self.captions, pixels=False)
            if explanation.features is not None:
                explanation.features = explanation.features.sum(-1, keepdim=True)      # all channels are large
            self._explanations[method] = explanation
        return self._explanations[method]

    @cached_property
    def _random(self):
        """[(words (T, T), maps (T, S, S), or (T, K) of regions)] of each picture, uniform noise that (seed, file name)
        alone decide."""
        T, size = self.captions.shape[1] - 1, self.images.shape[1:2] if self.on_regions else self.images.shape[2:]
        noise = []
        for name, sentence in zip(self.names, self.words, strict=True):
            generator = torch.Generator().manual_seed(int(fingerprint([self.study.seed, name]), 16) % 2**63)
            own = len(sentence) + 1
            words, maps = torch.zeros(T, T), torch.zeros(T, *size)
            words[:own, :own] = torch.rand(own, own, generator=generator)
            maps[:own] = torch.rand(own, *size, generator=generator)
            noise.append((words.to(self.images), maps.to(self.images)))
        return noise


def encode(model, images):
    """images (n, 3, S, S) -> features (n, K, C), as many at once as a CPU's caches or a GPU's memory like."""
    at_once = 16 if images.device.type == "cpu" else 128
    return torch.cat([model.encode(attribution.fast_format(part)) for part in images.split(at_once)])


def word_log_p(model, features, captions, steps, rows=None):
    """Log-probability (n,) of the word captions[i, steps[i] + 1] after captions[i, :steps[i] + 1]; features (n, K, C),
    or, with rows (n,), those of features (B, K, C) in these rows."""
    context = model.start(features)
    if rows is not None:
        context = type(context)(*(part if part is None else part[rows] for part in context))
    hidden = model.teacher_force(features, captions[:, None, :int(steps.max()) + 2], context=context).hidden
    n = torch.arange(len(captions), device=captions.device)
    return model.output(hidden[n, 0, steps]).log_softmax(-1)[n, captions[n, steps + 1]]
