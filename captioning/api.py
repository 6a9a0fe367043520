"""Explanations in Python and in notebooks: from captioning import explain."""
import functools
import html
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from captioning import checkpoint, grounding
from captioning.cli import set_seed
from captioning.data.images import preprocess, read_image
from captioning.device import pick_device
from captioning.errors import InputError
from captioning.explanation.arrays import captions_to_explain, contrast_id, explain_batch
from captioning.explanation.methods import METHODS
from captioning.files import make_folder, write_text
from captioning.report.colours import colour_maps, is_signed
from captioning.report.console import describe
from captioning.report.explanations import write_files
from captioning.report.heatmaps import overlay
from captioning.report.page import maps_of, page_entry, page_of


def explain(image, weight=checkpoint.FLICKR8K, caption=None, methods=("lrp",), contrast=None, device="auto"):
    """Captions an image and explains every word -> ImageExplanation.

    image: a path, a PIL image, or an array uint8 (H, W, 3). weight: path of a checkpoint of a model that reads pixels,
    by default of models/flickr8k.pth.
    caption: a text to explain instead of the model's own caption (beam search). methods: names of METHODS. contrast: a
    word; explains why the model prefers each word to it. InputError for files that cannot be read and for words outside
    the model's vocabulary.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise InputError(f"unknown methods {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    device = pick_device(device)
    model, vocabulary = _load(os.path.abspath(weight), _modified(weight), device)
    if model.encoder is None:
        raise InputError(f"{weight} uses region features, not pixels: run explain.py --dataset NAME")
    set_seed(1)
    name, pixels = _read(image)
    inputs = preprocess(pixels, checkpoint.image_size(model))[None].to(device)
    if contrast is not None:
        contrast_id(contrast, vocabulary)
    captions = captions_to_explain(model, vocabulary, inputs, None if caption is None else [caption], {})
    arrays, = explain_batch(model, vocabulary, inputs, captions, list(methods), contrast,
                            calibration=grounding.load(weight, model))
    return ImageExplanation(name, Image.fromarray(pixels.permute(1, 2, 0).numpy()), arrays)


@functools.lru_cache(maxsize=1)
def _load(path, modified, device):
    """The model and vocabulary of the checkpoint, kept for the next call. modified: time, in the cache's key."""
    return checkpoint.load(path, device)


def _modified(path):
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def _read(image):
    """Name and pixels, uint8 (3, H, W), of an image."""
    if isinstance(image, str | os.PathLike):
        return Path(image).name, read_image(image, upright=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image))
    return "image", torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)


@dataclass(repr=False)
class ImageExplanation:
    """The explanation of one image's caption. Its repr is a table of the words; in a notebook it is the page.

    Words are given as text, or as their position among `words`; a text that occurs twice means its first occurrence.
    method: one of those that `explain` was called with; by default the first.
    """
    name: str
    image: Image.Image      # H×W pixels, upright
    arrays: dict            # the contents of explanation.npz (docs/data.md)

    @property
    def words(self):
        """The T words that are explained, up to <end>."""
        return self.arrays["words"].tolist()[1:]

    def heatmap(self, word, method=None):
        """float32 (H, W): the method's map for the word, stretched to the image."""
        method, t = self._method(method), self._step(word)
        values = Image.fromarray(maps_of(self.arrays, method)[t].astype(np.float32))
        return np.asarray(values.resize(self.image.size, Image.Resampling.BILINEAR))

    def overlay(self, word, method=None):
        """PIL image: the method's map for the word in colours over the grey image."""
        method, t = self._method(method), self._step(word)
        colours, _ = colour_maps(maps_of(self.arrays, method)[t:t + 1], is_signed(method))
        return overlay(self.image, colours[0])

    def show(self, word, method=None):
        """Shows the overlay: in the notebook, else in the system's viewer."""
        overlaid = self.overlay(word, method)
        try:
            get_ipython()       # defined within IPython only
        except NameError:
            overlaid.show()
        else:
            from IPython.display import display
            display(overlaid)

    def to_html(self, path):
        """Writes the interactive page of this image, one self-contained file."""
        write_text(path, self._page())

    def save(self, folder):
        """Writes what explain.py writes for an image: PNGs, explanation.npz, entry.html; and index.html."""
        folder = make_folder(folder)
        write_files(folder, self.name, self._pixels(), self.arrays)
        self.to_html(folder / "index.html")

    def __repr__(self):
        return describe(self.name, self.arrays)

    def _repr_html_(self):
        return f'<iframe srcdoc="{html.escape(self._page())}" style="width: 100%; height: 46rem; border: 0"></iframe>'

    def _page(self):
        return page_of(page_entry(self.name, np.asarray(self.image), self.arrays))

    def _pixels(self):
        return torch.from_numpy(np.array(self.image)).permute(2, 0, 1)

    def _step(self, word):
        """The position of a word among `words`."""
        if isinstance(word, str) and word in self.words:
            return self.words.index(word)
        if not isinstance(word, str) and 0 <= word < len(self.words):
            return word
        raise InputError(f"{word!r} is not a word of the caption: choose one of: {', '.join(self.words)}")

    def _method(self, method):
        methods = self.arrays["methods"].tolist()
        if method not in (None, *methods):
            raise InputError(f"{method!r} was not computed: choose one of {', '.join(methods)}, or give it to "
                             "explain(methods=…)")
        return method or methods[0]
