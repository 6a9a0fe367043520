"""A batch of captioned images and the explanations of its words, computed on first use."""
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from captioning.data.vocabulary import tokenise
from captioning.experiments.correctness import word_boxes
from captioning.explanation import attribution
from captioning.explanation.methods import METHODS, pixel_maps, region_relevance
from captioning.files import fingerprint

RANDOM = "random"       # the baseline of measures: uniform noise


@dataclass
class Study:
    """What all batches share: the model, the methods to measure, and the annotations of the data set."""
    model: object
    vocabulary: object
    methods: tuple                  # of METHODS, and RANDOM
    objects: object                 # captioning.metrics.object_words.Objects; if empty, frequent words are object words
    boxes: dict                     # {file name: boxes of the image} (docs/method.md, section 8)
    frequent: set                   # frequent object words
    stop_words: set
    masks: object = None            # captioning.experiments.localisation.Masks
    decode: object = None           # function: features (B, K, C) -> captions (B, T), ids after <start>
    seed: int = 1                   # random seed of the baseline
    read_boxes: object = None       # function: indices -> boxes (B, K, 4) of the regions in pixels, for region features
    calibration: object = None      # captioning.grounding.Calibration, if the checkpoint has one


class Batch:
    """B images with one caption each.

    indices: of the images in their split; names: file names; images (B, 3, H, W) or region features (B, K, C); words:
    captions as lists of words; references: lists of reference captions; only (B, T) bool: the words that may be
    measured (default: all).

    Step t predicts words[b][t]; T counts <end>. The properties *_words and words_with_* are (B, T) bool masks of the
    words of a kind; the methods below take such words as (rows, steps), both (n,).
    """

    def __init__(self, study, indices, names, images, words, references, only=None):
        self.study, self.indices, self.names, self.images = study, indices, names, images
        self.words, self.references, self.only = words, references, only
        encode = study.vocabulary.encode
        self.captions = pad_sequence([torch.tensor(encode(caption, len(caption))) for caption in words],
                                     batch_first=True).to(images.device)               # (B, T+1)
        named = study.objects.named if study.objects.words else self._frequent
        self.categories = [dict(named(caption)) for caption in words]                  # of each image {step: category}
        self._explanations, self._pixels = {}, {}

    def _frequent(self, caption):
        return [(t, word) for t, word in enumerate(caption) if word in self.study.frequent]

    def _mask(self, is_selected):
        """(B, T) bool: is_selected(row, step, word) of every word."""
        mask = torch.zeros(len(self.words), self.captions.shape[1] - 1, dtype=torch.bool)
        for b, caption in enumerate(self.words):
            mask[b, :len(caption)] = torch.tensor([bool(is_selected(b, t, word)) for t, word in enumerate(caption)],
                                                  dtype=torch.bool)
        mask = mask.to(self.images.device)
        return mask if self.only is None else mask & self.only

    @cached_property
    def object_words(self):
        """Words that name an object."""
        return self._mask(lambda b, t, _: t in self.categories[b])

    @cached_property
    def stop_words(self):
        """Words of the study's stop words."""
        return self._mask(lambda b, t, word: word in self.study.stop_words)

    @cached_property
    def frequent_words(self):
        """Words of the study's frequent object words."""
        return self._mask(lambda b, t, word: word in self.study.frequent)

    @cached_property
    def words_with_box(self):
        """Object words whose object has a box in the image."""
        return self._mask(lambda b, t, _: self.categories[b].get(t) in self.study.boxes.get(
            self.names[b], {}).get("categories", ()))

    @cached_property
    def words_with_mask(self):
        """Object words whose object has a segmentation mask in the image."""
        return self._mask(lambda b, t, _: self.study.masks.has(self.indices[b], self.categories[b].get(t)))

    def boxes(self, rows, steps):
        """(n, m, 4): the boxes of the words' objects as fractions of the image, padded with NaN."""
        boxes = [word_boxes(self.study.boxes[self.names[b]], self.categories[b][t])
                 for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
        return pad_sequence(boxes, batch_first=True, padding_value=torch.nan).to(self.images)

    def masks(self, rows, steps):
        """(n, H, W) bool: the pixels of the words' objects."""
        masks = [self.study.masks.mask(self.indices[b], self.categories[b][t], self.images.shape[-2:])
                 for b, t in zip(rows.tolist(), steps.tolist(), strict=True)]
        return torch.stack(masks).to(self.images.device)

    @property
    def on_regions(self):
        """Whether the batch contains region features instead of images."""
        return self.images.dim() == 3

    @cached_property
    def region_is_present(self):
        """(B, K): 1 for regions and 0 for padding."""
        return (self.images != 0).any(-1).to(self.images.dtype)

    def region_boxes(self, rows):
        """(n, K, 4): the boxes of the images' regions as fractions of the image."""
        sides = torch.tensor([self.study.boxes[self.names[b]]["shape"] * 2 for b in rows.tolist()])
        return (self.study.read_boxes(self.indices)[rows.cpu()] / sides[:, None]).to(self.images)

    def correct_words(self, rows, steps):
        """(n,) bool: whether a reference contains the word."""
        reference_words = [set().union(*map(tokenise, captions)) for captions in self.references]
        return torch.tensor([self.words[b][t] in reference_words[b]
                             for b, t in zip(rows.tolist(), steps.tolist(), strict=True)], device=self.images.device)

    @cached_property
    def features(self):
        """(B, K, C)"""
        return encode_images(self.study.model, self.images)

    @cached_property
    def _trace(self):
        return self.study.model.teacher_force(self.features, self.captions[:, None])

    @cached_property
    def log_p(self):
        """(B, T): log-probabilities of the words."""
        log_p = self.study.model.output(self._trace.hidden[:, 0]).log_softmax(-1)
        return log_p.gather(2, self.captions[:, 1:, None]).squeeze(2)

    @property
    def beta(self):
        """(B, T): the sentinel's weight β (docs/method.md, section 2); None for models without a sentinel."""
        return None if self._trace.beta is None else self._trace.beta[:, 0, :, 0]

    @cached_property
    def _steps(self):
        """(B, S): the steps of object words and frequent words, and (B, T): the position of each step among them.

        Pixel maps are computed for these steps only.
        """
        has_map = self.object_words | self.frequent_words
        width = max(1, int(has_map.sum(1).max()))
        return has_map.int().argsort(dim=1, descending=True, stable=True)[:, :width], has_map.cumsum(1) - 1

    def maps(self, method, rows, steps):
        """(n, H, W): the maps of object words or frequent words by a method of METHODS, summed over channels; (n, K)
        with region features."""
        if self.on_regions:
            return self._region_relevance(method)[rows, steps]
        return self._pixel_maps(method)[rows, self._steps[1][rows, steps]]

    def _region_relevance(self, method):
        """(B, T, K)"""
        if method == "random":
            return torch.stack([maps for _, maps in self._random]) * self.region_is_present[:, None]
        return region_relevance(self.explanation(method), method)

    def _pixel_maps(self, method):
        """(B, S, H, W) at the steps of self._steps."""
        if method not in self._pixels:
            map_steps = self._steps[0]
            if method == "guided_grad_cam":     # the product of two methods that are often measured too
                maps = self._pixel_maps("guided_backprop") * self._pixel_maps("grad_cam")
            elif method == "random":
                maps = torch.stack([maps[steps] for steps, (_, maps) in zip(map_steps, self._random, strict=True)])
            else:
                explanation = METHODS[method].explain(self.study.model, self.images, self.captions,
                                                      steps=map_steps)
                maps = pixel_maps(explanation, method, tuple(self.images.shape[-2:]))
            self._pixels[method] = maps
        return self._pixels[method]

    def relevance(self, method, rows, steps):
        """(n, T): the relevance of the word read at each step i ≤ t."""
        if method == "random":
            return torch.stack([words for words, _ in self._random])[rows, steps]
        return self.explanation({"guided_grad_cam": "guided_backprop"}.get(method, method)).words[rows, steps]

    def explanation(self, method):
        """The Explanation of all T steps down to the encoder's output, with `features` summed over channels."""
        if method not in self._explanations:
            explanation = METHODS[method].explain(self.study.model, self.images, self.captions, pixels=False)
            if explanation.features is not None:
                explanation.features = explanation.features.sum(-1, keepdim=True)      # all channels need much memory
            self._explanations[method] = explanation
        return self._explanations[method]

    @cached_property
    def _random(self):
        """Of each image uniform noise: words (T, T), and maps (T, H, W) or (T, K).

        It depends on the random seed and the file name only, so that results do not depend on the batches.
        """
        T, size = self.captions.shape[1] - 1, self.images.shape[1:2] if self.on_regions else self.images.shape[2:]
        noise = []
        for name, caption in zip(self.names, self.words, strict=True):
            generator = torch.Generator().manual_seed(int(fingerprint([self.study.seed, name]), 16) % 2**63)
            length = len(caption) + 1
            words, maps = torch.zeros(T, T), torch.zeros(T, *size)
            words[:length, :length] = torch.rand(length, length, generator=generator)
            maps[:length] = torch.rand(length, *size, generator=generator)
            noise.append((words.to(self.images), maps.to(self.images)))
        return noise


def encode_images(model, images):
    """images (n, 3, H, W) -> features (n, K, C), in chunks that suit a CPU's caches or a GPU's memory."""
    chunk = 16 if images.device.type == "cpu" else 128
    return torch.cat([model.encode(attribution.fast_format(part)) for part in images.split(chunk)])


def word_log_p(model, features, captions, steps, rows=None):
    """(n,): log-probability of the word captions[i, steps[i] + 1] after the words captions[i, :steps[i] + 1].

    captions (n, T+1); features (n, K, C), or features (B, K, C) and rows (n,), the row of features for each caption.
    """
    context = model.start(features)
    if rows is not None:
        context = context.select(rows)
    hidden = model.teacher_force(features, captions[:, None, :int(steps.max()) + 2], context=context).hidden
    n = torch.arange(len(captions), device=captions.device)
    return model.output(hidden[n, 0, steps]).log_softmax(-1)[n, captions[n, steps + 1]]
