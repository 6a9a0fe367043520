"""Explained images of random numbers."""
from dataclasses import replace

import numpy as np
from PIL import Image

from captioning.explanation.methods import METHODS, SPLIT
from captioning.report.explained_image import ExplainedImage, Relevance


def random_image(size=(90, 60), seed=0):
    """A PIL image; size: width and height."""
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def random_explanation(words, methods=("lrp",), seed=0, **fields):
    """The ExplainedImage of a caption's words, up to <end>; fields: other than random ones."""
    rng = np.random.default_rng(seed)
    T = len(words)
    relevance = {}
    for method in methods:
        pixels = regions = None
        if method != "attention":
            pixels = rng.normal(size=(T, 40, 40)).astype(np.float32)
            regions = rng.normal(size=(T, 16)).astype(np.float32)
        of_words = np.tril(rng.normal(size=(T, T))) if METHODS[method].has_words else None
        relevance[method] = Relevance(pixels, regions, of_words)
    explained = ExplainedImage(
        words=list(words), logits=np.full(T, 6.5), probabilities=np.full(T, 0.25),
        alternatives=np.array([["a", "cat", "dog", "on", "<end>"]] * T),
        alternative_probabilities=np.sort(rng.uniform(0, 0.3, (T, 5)))[:, ::-1],
        attention=rng.uniform(size=(T, 3, 16)).astype(np.float32), methods=relevance,
        name="x.png", image=random_image((80, 60), seed))
    if "lrp" in methods:
        explained.split = {part: rng.normal(size=T) for part in SPLIT}
    return replace(explained, **fields)
