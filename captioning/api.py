"""Explanations in Python: `explain` for one image, as in notebooks, `explain_batch` for many."""
import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from captioning import checkpoint, decoding, grounding
from captioning.data.images import images_in, read_image
from captioning.data.vocabulary import tokenise
from captioning.device import pick_device
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, SPLIT, check_methods, region_relevance
from captioning.report.explained_image import ExplainedImage, Relevance, as_pil


def explain(image, weight=checkpoint.PHOTOGRAPHS, caption=None, methods=("lrp",), contrast=None,
            device="auto", prompt=None):
    """Captions an image and explains every word -> ExplainedImage; of a list of images, or of the
    images in a folder -> a list of them.

    image: a path, a PIL image, or an array (H, W, 3), uint8, uint16 or float in [0, 1]. weight:
    path of a checkpoint of a model that reads pixels, or folder of a model of transformers, to
    which `prompt` is given. caption: a text to explain instead of the model's own caption (beam
    search). methods: names of METHODS. contrast: a word; explains why the model prefers each word
    to it. InputError for files that cannot be read and for words outside the model's vocabulary."""
    if isinstance(image, str | os.PathLike) and os.path.isdir(image):
        folder, image = image, images_in(image)
        if not image:
            raise InputError(f"the folder {folder} contains no images: check the path")
    if isinstance(image, list | tuple):
        return [explain(each, weight, caption, methods, contrast, device, prompt)
                for each in image]
    for name, value in (("caption", caption), ("contrast", contrast), ("device", device)):
        if not isinstance(value, str | None):
            raise InputError(f"{name} must be text, but is of the type {type(value).__name__}")
    if not isinstance(weight, str | os.PathLike):
        raise InputError(f"weight must be the path of a checkpoint, but is of the type "
                         f"{type(weight).__name__}")
    methods = [methods] if isinstance(methods, str) else methods
    methods = list(methods) if isinstance(methods, list | tuple | set) else []
    unknown = [str(method) for method in methods if method not in METHODS]
    if unknown or not methods:
        raise InputError(f"unknown methods {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    path = Path(weight)
    files = [path] if weight and path.exists() else []
    if files and path.is_dir():
        files += sorted(path.iterdir())
    modified = tuple(file.stat().st_mtime_ns for file in files)
    weight = os.path.abspath(path) if files else str(weight)
    model, vocabulary = _load(weight, modified, pick_device(device), prompt)
    check_methods(model, methods, weight)
    if model.encoder is None:
        raise InputError(f"{weight} uses region features, not pixels: run explain.py --dataset")

    pixels = read_image(image, upright=True)
    is_file = isinstance(image, str | os.PathLike)
    name = Path(image).name if is_file else "image"
    source = os.path.abspath(image) if is_file else ""
    inputs = model.prepare(pixels)[None].to(model.device)
    captions = captions_of(model, vocabulary, inputs, None if caption is None else [caption])
    explained, = explain_batch(model, vocabulary, inputs, captions, methods, contrast,
                               calibration=grounding.load(weight, model))
    return replace(explained, name=name, image=as_pil(pixels), source=source,
                   window=model.window(*pixels.shape[:0:-1]))


@functools.lru_cache(maxsize=1)
def _load(path, modified, device, prompt):
    """The model and vocabulary of a checkpoint, kept for the next call until it is `modified`."""
    return checkpoint.load(path, device, prompt=prompt)


def encode_caption(text, vocabulary, flag="--caption", as_unknown=False):
    """Token ids (L,) from <start> to <end>; InputError if words are not in the vocabulary.

    flag: what `text` belongs to, for the message. as_unknown: these words become <unk>."""
    unknown = vocabulary.unknown(text)
    if not tokenise(text):
        raise InputError(f"{flag} {text!r} contains no words: give at least one")
    if unknown and not as_unknown:
        raise InputError(f"{flag} {text!r} has words outside the model's vocabulary, replace them: "
                         f"{', '.join(unknown)}")
    return torch.tensor(vocabulary.ids_of(text))


def captions_of(model, vocabulary, inputs, texts=None, decode=decoding.decode, as_unknown=False):
    """Token ids (B, T+1) from <start> on, zero-padded, of B texts or else the model's captions."""
    if texts is not None:
        ids = [encode_caption(text, vocabulary, as_unknown=as_unknown) for text in texts]
        return pad_sequence(ids, batch_first=True).to(inputs.device)
    with torch.no_grad():
        tokens = decode(model, model.encode(inputs), vocabulary)
    return decoding.with_start(tokens, vocabulary)


def explain_batch(model, vocabulary, inputs, captions, methods, contrast=None, eps=None, chunk=None,
                  calibration=None, boxes=None, progress=lambda images: None):
    """Explains captions (B, T+1), zero-padded -> B ExplainedImages, still without names and images.

    inputs: (B, 3, S, S) normalised, or region features (B, K, C) whose regions without padding have
    the `boxes`, B arrays (n, 4). contrast: a word. calibration: a captioning.grounding.Calibration,
    by which LRP without contrast estimates whether named objects are there. progress: called with B
    after each method."""
    options = {"chunk": chunk, "shared": {}}
    if contrast is not None:
        ids = encode_caption(contrast, vocabulary, "--contrast")
        if len(ids) != 3:
            raise InputError(f"--contrast {contrast!r} must be one word")
        options["contrast"] = vocabulary.within(contrast)
    lengths = (captions[:, 1:] != 0).sum(1).tolist()
    counts = [None if boxes is None else len(boxes[b]) for b in range(len(captions))]

    # in the order of METHODS, in which those are consecutive that have passes in common
    relevance = {}      # {method: a Relevance for each image}
    arrays = {}         # {field of ExplainedImage: (B, T, …)}
    split = {}
    for method in sorted(methods, key=list(METHODS).index):
        own = {"eps": eps} if METHODS[method].additive and eps is not None else {}
        explanation = METHODS[method].explain(model, inputs, captions, **options, **own)
        pixels = regions = None
        if explanation.pixels is not None:
            pixels = explanation.pixels.sum(2)                                     # (B, T, S, S)
        if explanation.features is not None:
            regions = explanation.features.sum(-1)                                     # (B, T, K)
        elif boxes is not None:
            regions = region_relevance(explanation, "attention")
        relevance[method] = [
            Relevance(_of_image(pixels, b, T), _of_image(regions, b, T, K),
                      _of_image(explanation.words, b, T, T))
            for b, (T, K) in enumerate(zip(lengths, counts, strict=True))]
        if method == "lrp":
            split = {part: getattr(explanation, part) for part in SPLIT}
            if calibration and contrast is None:
                with torch.no_grad():
                    features = model.encode(inputs)
                arrays["presence"] = grounding.presence(model, features, explanation, captions,
                                                        vocabulary, calibration)
                arrays["flags"] = arrays["presence"] < calibration.threshold
        progress(len(captions))

    # what every method's explanation contains
    probabilities = explanation.logits.softmax(-1)                                     # (B, T, V)
    best = probabilities.topk(min(5, probabilities.shape[-1]))
    following = captions[:, 1:, None]
    arrays["alternative_probabilities"] = best.values
    words = np.array(vocabulary.words)
    outputs = words
    if explanation.word_logits is not None:     # words of several pieces, with logits of the first
        outputs = np.array(vocabulary.outputs)
        other = vocabulary.pieces[options["contrast"]][0] if contrast is not None else None
        arrays["probabilities"] = explanation.word_log_p.exp()
        arrays["logits"] = explanation.word_logits
    else:
        other = options.get("contrast")
        arrays["probabilities"] = probabilities.gather(2, following)[..., 0]
        arrays["logits"] = explanation.logits.gather(2, following)[..., 0]
        if contrast is not None:
            arrays["logits"] = arrays["logits"] - explanation.logits[..., other]
    if contrast is not None:
        arrays["contrast_probabilities"] = probabilities[..., other]
    results = []
    for b, (T, K) in enumerate(zip(lengths, counts, strict=True)):
        results.append(ExplainedImage(
            words=words[_of_image(captions[:, 1:], b, T)].tolist(),
            alternatives=outputs[_of_image(best.indices, b, T)],
            attention=_of_image(explanation.attention, b, T, K),
            methods={method: relevance[method][b] for method in methods},
            split={part: _of_image(values, b, T) for part, values in split.items()},
            contrast=contrast or "", boxes=None if boxes is None else boxes[b],
            **{name: _of_image(values, b, T) for name, values in arrays.items()}))
    return results


def _of_image(values, b, T, last=None):
    """The values (T, …, last) of image b, as an array without padding, from (B, T, …) or None."""
    if values is None:
        return None
    values = values[b, :T][..., :last].cpu()
    return (values.float() if values.is_floating_point() else values).numpy()
