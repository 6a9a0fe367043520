"""Captions to explain, and their explanations as the arrays of explanation.npz (docs/data.md)."""
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from captioning import decoding, grounding
from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, SPLIT, pixel_maps, region_relevance


def encode_caption(text, vocabulary, flag="--caption"):
    """Token ids (L,) from <start> to <end>; InputError if words are not in the vocabulary.

    flag: what `text` belongs to, for the message."""
    words = tokenise(text)
    if not words:
        raise InputError(f"{flag} {text!r} contains no words: give at least one")
    unknown = [word for word in words if word not in vocabulary.wordmap]
    if unknown:
        raise InputError(f"{flag} {text!r} has words outside the model's vocabulary, replace them: "
                         f"{', '.join(unknown)}")
    return torch.tensor(vocabulary.encode(words, len(words)))


def contrast_id(text, vocabulary):
    """Token id of --contrast; InputError if it is not exactly one word of the vocabulary."""
    ids = encode_caption(text, vocabulary, "--contrast")
    if len(ids) != 3:
        raise InputError(f"--contrast {text!r} must be one word")
    return int(ids[1])


def captions_to_explain(model, vocabulary, images, texts, decoding_settings, decode=decoding.decode):
    """Token ids (B, T+1) from <start> on, zero-padded: of the B `texts`, or if they are None the model's own captions.

    decode: captioning.decoding.decode, or a function like it.
    """
    if texts is not None:
        ids = [encode_caption(text, vocabulary) for text in texts]
        return pad_sequence(ids, batch_first=True).to(images.device)
    with torch.no_grad():
        tokens = decode(model, model.encode(images), vocabulary, **decoding_settings)
    return decoding.with_start(tokens, vocabulary)


def explain_batch(model, vocabulary, images, captions, methods, contrast=None, eps=0.01, chunk=None, bar=None,
                  calibration=None):
    """The arrays of explanation.npz for each image, a list of B dicts.

    images: (B, 3, S, S) normalised, or region features (B, K, C). captions: token ids (B, T+1), zero-padded. contrast:
    a word. bar: a tqdm progress bar, advanced by B for each method. calibration: a captioning.grounding.Calibration,
    which adds the array `flags` to LRP without contrast.
    """
    lengths = (captions[:, 1:] != 0).sum(1).tolist()
    words = np.array(vocabulary.words)
    common = {"methods": np.array(methods), "contrast": np.array(contrast or "")}
    results = [common | {"words": words[row[:T + 1]]} for row, T in zip(captions.cpu().numpy(), lengths, strict=True)]
    options = {"chunk": chunk, "contrast": None if contrast is None else contrast_id(contrast, vocabulary)}
    explanation, shared = None, {}
    for method in sorted(methods, key=list(METHODS).index):       # those that have passes in common are consecutive
        if method != "attention" or explanation is None:    # every method's explanation has the attention weights
            method_options = options | {"shared": shared} | ({"eps": eps} if METHODS[method].additive else {})
            explanation = METHODS[method].explain(model, images, captions, **method_options)
        arrays = _arrays(explanation, method, images, captions, options["contrast"])
        if method == "lrp" and calibration and contrast is None:
            arrays["flags"] = grounding.flags(explanation, captions, vocabulary, calibration)
        for name, values in arrays.items():
            values = words[values.cpu().numpy()] if values.dtype == torch.long else values.cpu().numpy()
            for b, T in enumerate(lengths):
                results[b][name] = values[b, :T, :T] if name.endswith("_words") else values[b, :T]
        if bar is not None:
            bar.update(len(images))
    return results


def _arrays(explanation, method, images, captions, contrast):
    """{name in explanation.npz: float32 values or token ids (B, T, …)} of one method."""
    arrays = {}
    if images.dim() == 4 and method != "attention":
        arrays[f"{method}_pixels"] = pixel_maps(explanation, method, tuple(images.shape[-2:]))
    if method != "attention" or images.dim() == 3:
        arrays[f"{method}_regions"] = region_relevance(explanation, method)
    if METHODS[method].has_words:
        arrays[f"{method}_words"] = explanation.words
    if method == "lrp":
        arrays["conservation"] = explanation.conservation
        arrays |= {f"lrp_{part}": getattr(explanation, part) for part in SPLIT}
    probabilities = explanation.logits.softmax(-1)                                     # (B, T, V)
    logits = explanation.logits.gather(2, captions[:, 1:, None]).squeeze(2)
    if contrast is not None:
        logits = logits - explanation.logits[..., contrast]
        arrays["contrast_probabilities"] = probabilities[..., contrast]
    best = probabilities.topk(min(5, probabilities.shape[-1]))
    arrays |= {"logits": logits, "attention": explanation.attention, "alternatives": best.indices,
               "probabilities": probabilities.gather(2, captions[:, 1:, None]).squeeze(2),
               "alternative_probabilities": best.values}
    return {name: values.float() if values.is_floating_point() else values for name, values in arrays.items()}


def without_padded_regions(arrays, boxes, count):
    """The arrays of the first `count` regions, and their `boxes` from (K, 4)."""
    return {name: values[..., :count] if name == "attention" or name.endswith("_regions") else values
            for name, values in arrays.items()} | {"boxes": boxes[:count].numpy()}
