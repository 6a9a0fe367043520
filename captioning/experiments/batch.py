"""A batch of captioned images and the explanations of its words, computed on first use."""
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from captioning.explanation import attribution
from captioning.explanation.methods import METHODS, pixel_maps, region_relevance
from captioning.files import fingerprint

RANDOM = "random"       # the baseline of all experiments: uniform noise


@dataclass
class Study:
    """What all batches share: the model, the methods, and the annotations of the data set."""
    model: object
    vocabulary: object
    methods: tuple              # of METHODS, and RANDOM
    objects: object             # object_words.Objects; if empty, frequent words are object words
    boxes: dict                 # {file name: boxes of the image} (docs/method.md, section 8)
    frequent: set               # frequent object words
    stop_words: set
    masks: object = None        # mask_mass.Masks
    decode: object = None       # features (B, K, C) -> captions (B, T), ids after <start>
    seed: int = 1               # random seed of the baseline
    read_boxes: object = None   # indices -> boxes (B, K, 4) of the regions in pixels
    calibration: object = None  # captioning.grounding.Calibration, if the checkpoint has one


@dataclass(eq=False)
class Batch:
    """B images with one caption each.

    Step t predicts words[b][t]; T counts <end>. Masks of words are (B, T) bool; the words to
    explain are given as (rows, steps), both (n,)."""
    study: Study
    indices: list               # of the images in their split
    names: list                 # file names
    images: torch.Tensor        # (B, 3, H, W), or region features (B, K, C)
    words: list                 # captions as lists of words
    references: list            # lists of reference captions

    def __post_init__(self):
        study = self.study
        self.on_regions = self.images.dim() == 3
        ids = [torch.tensor(study.vocabulary.encode(words, len(words))) for words in self.words]
        self.captions = pad_sequence(ids, batch_first=True).to(self.images.device)     # (B, T+1)
        # of each image {step: category} of the object words in its caption
        if study.objects.words:
            self.categories = [dict(study.objects.named(caption)) for caption in self.words]
        else:
            self.categories = [{t: word for t, word in enumerate(caption) if word in study.frequent}
                               for caption in self.words]
        self._explanations = {}
        self._pixel_maps = {}

    # -- words ---------------------------------------------------------------------------------

    def words_where(self, condition):
        """(B, T) bool: the words for which condition(row, step, word) holds; never <end>."""
        mask = torch.zeros(len(self.words), self.captions.shape[1] - 1, dtype=torch.bool)
        for b, caption in enumerate(self.words):
            for t, word in enumerate(caption):
                mask[b, t] = condition(b, t, word)
        return mask.to(self.images.device)

    @cached_property
    def object_words(self):
        """The words that name an object."""
        return self.words_where(lambda b, t, word: t in self.categories[b])

    @property
    def later_object_words(self):
        """The object words at steps t ≥ 1, which have a word before them."""
        return from_step(self.object_words, 1)

    @cached_property
    def frequent_words(self):
        """The frequent object words."""
        return self.words_where(lambda b, t, word: word in self.study.frequent)

    def words_with_box(self):
        """The object words whose object has a box in the image."""
        boxed = [self.study.boxes.get(name, {}).get("categories", ()) for name in self.names]
        return self.words_where(lambda b, t, word: self.categories[b].get(t) in boxed[b])

    def boxes(self, rows, steps):
        """(n, m, 4): the boxes of the words' objects, as fractions of what the model sees of the
        image, padded with NaN.

        A box is x0, y0, x1, y1."""
        boxes = []
        for b, t in zip(rows.tolist(), steps.tolist(), strict=True):
            entry = self.study.boxes[self.names[b]]
            number = entry["categories"][self.categories[b][t]]
            w, h = entry["shape"]
            corners = torch.tensor(entry["bbox"][str(number)]) / torch.tensor([w, h, w, h])
            x0, y0, x1, y1 = self.study.model.window(w, h)      # of it the model sees a part
            low = torch.tensor([x0, y0] * 2)
            boxes.append((corners - low) / (torch.tensor([x1, y1] * 2) - low))
        return pad_sequence(boxes, batch_first=True, padding_value=torch.nan).to(self.images)

    def region_boxes(self, rows):
        """(n, K, 4): the boxes of the images' regions as fractions of the image."""
        sides = torch.tensor([self.study.boxes[self.names[b]]["shape"] * 2 for b in rows.tolist()])
        boxes = self.study.read_boxes(self.indices)[rows.cpu()] / sides[:, None]
        return boxes.to(self.images)

    # -- the model -----------------------------------------------------------------------------

    @cached_property
    def features(self):
        """(B, K, C)"""
        return encode_images(self.study.model, self.images)

    @cached_property
    def log_p(self):
        """(B, T): log-probabilities of the words."""
        return self.study.model.log_p(self.features, self.captions)

    @cached_property
    def beta(self):
        """(B, T): the sentinel's weight β (docs/method.md, section 2); None without a sentinel."""
        if not hasattr(self.study.model, "teacher_force"):
            return None
        beta = self.study.model.teacher_force(self.features, self.captions[:, None]).beta
        return None if beta is None else beta[:, 0, :, 0]

    # -- explanations --------------------------------------------------------------------------

    def maps(self, method, rows, steps):
        """(n, H, W): the maps of object words or frequent words, summed over channels.

        With region features (n, K)."""
        if self.on_regions:
            if method == RANDOM:
                is_region = (self.images != 0).any(-1).to(self.images.dtype)
                return (self._noise[1] * is_region[:, None])[rows, steps]
            return region_relevance(self.explanation(method), method)[rows, steps]

        # maps of pixels need much memory: only object words and frequent words have one
        has_map = self.object_words | self.frequent_words
        if method not in self._pixel_maps:
            count = max(1, int(has_map.sum(1).max()))
            with_map = has_map.int().argsort(dim=1, descending=True, stable=True)[:, :count]
            if method == RANDOM:
                maps = self._noise[1][torch.arange(len(with_map))[:, None], with_map]
            else:
                explanation = METHODS[method].explain(
                    self.study.model, self.images, self.captions, steps=with_map)
                maps = pixel_maps(explanation, method, tuple(self.images.shape[-2:]))
            self._pixel_maps[method] = maps                                        # (B, S, H, W)
        position = has_map.cumsum(1) - 1        # of each step among those with a map
        return self._pixel_maps[method][rows, position[rows, steps]]

    def relevance(self, method, rows, steps):
        """(n, T): the relevance of the word read at each step i ≤ t."""
        words = self._noise[0] if method == RANDOM else self.explanation(method).words
        return words[rows, steps]

    def explanation(self, method):
        """The Explanation of all T steps down to the encoder's output.

        Its `features` are summed over the channels, which would need much memory."""
        if method not in self._explanations:
            explanation = METHODS[method].explain(
                self.study.model, self.images, self.captions, pixels=False)
            if explanation.features is not None:
                sums = explanation.features.sum(-1, keepdim=True)
                explanation = replace(explanation, features=sums)
            self._explanations[method] = explanation
        return self._explanations[method]

    @cached_property
    def _noise(self):
        """Uniform noise: relevance of words (B, T, T), and maps (B, T, H, W) or (B, T, K).

        It depends on the random seed and the file name only, not on the other images of the batch.
        """
        T = self.captions.shape[1] - 1
        size = self.images.shape[1:2] if self.on_regions else self.images.shape[2:]
        words = torch.zeros(len(self.words), T, T)
        maps = torch.zeros(len(self.words), T, *size)
        for b, (name, caption) in enumerate(zip(self.names, self.words, strict=True)):
            seed = int(fingerprint([self.study.seed, name]), 16) % 2**63
            generator = torch.Generator().manual_seed(seed)
            n = len(caption) + 1
            words[b, :n, :n] = torch.rand(n, n, generator=generator)
            maps[b, :n] = torch.rand(n, *size, generator=generator)
        return words.to(self.images), maps.to(self.images)


def from_step(mask, first):
    """mask (B, T) without the steps before `first`."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= first)


def positive_shares(maps):
    """Maps (n, …) with their positive relevance divided by its maximum, and no other relevance."""
    maps = maps.clamp(min=0)
    highest = maps.flatten(1).amax(1).clamp(min=torch.finfo(maps.dtype).tiny)
    return maps / highest.view(-1, *[1] * (maps.dim() - 1))


def encode_images(model, images):
    """images (n, 3, H, W) -> features (n, K, C), in chunks that suit the memory or the caches."""
    chunk = 16 if images.device.type == "cpu" else 128
    return torch.cat([model.encode(attribution.fast_format(part)) for part in images.split(chunk)])


def word_log_p(model, features, captions, steps):
    """(n,): log-probability of the word captions[i, steps[i] + 1] after captions[i, :steps[i] + 1].

    features (n, K, C), captions (n, T+1)."""
    return model.log_p(features, captions[:, :int(steps.max()) + 2], steps)
