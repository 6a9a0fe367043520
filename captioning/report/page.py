"""index.html, the page that shows explanations interactively, from the parts page.html, page.css and page.js.

Each image's folder contains its part of the page's data: entry.html, and a thumbnail. Up to EMBEDDED images the page
contains all of them and is one file. Above that it loads an image's entry.html when the image is chosen, in a frame,
which browsers allow for local files too; neither Python nor the browser holds more than a few images at a time.
(Chromium keeps the source of every script that it has loaded, so the data must not be one.)
"""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.explanation.methods import METHODS, SPLIT
from captioning.files import atomic_path
from captioning.metrics.object_words import stop_words
from captioning.report.colours import (
    colour_maps,
    is_signed,
    legend,
    normalised_words,
    scale_labels,
    word_labels,
)
from captioning.report.heatmaps import grey_background, thumbnail

ENTRY, THUMBNAIL = "entry.html", "thumbnail.webp"   # in each image's folder
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>Part of index.html</title><script type="application/json">
%s
</script><script>parent.postMessage(document.scripts[0].textContent, "*")</script>
"""
EMBEDDED = 30
IMAGE_SIDE, PRINTED_SIDE, HEATMAP_SIDE, THUMBNAIL_SIDE = 720, 280, 128, 96     # pixels; heatmaps are stretched


def maps_of(arrays, method):
    """The method's maps in explanation.npz: (T, S, S) of pixels; attention on its grid (T, h, w), the mean over heads;
    with `boxes` values of regions (T, K)."""
    if "boxes" in arrays:
        return arrays[f"{method}_regions"]
    return _on_grid(_head_mean(arrays["attention"])) if method == "attention" else arrays[f"{method}_pixels"]


def _head_mean(attention):
    return attention.mean(1) if attention.ndim == 3 else attention


def _on_grid(attention):
    """(T, K) -> (T, h, w): encoders map square images to square grids."""
    side = round(attention.shape[-1] ** 0.5)
    return attention.reshape(-1, side, side)


def is_shared(arrays):
    """Whether all words of the caption are drawn on one colour scale."""
    return bool(arrays.get("shared_scale", False))


def page_entry(name, image, arrays):
    """What the page shows of one explanation, as JSON types.

    image: uint8 (H, W, 3). arrays: the contents of explanation.npz.
    """
    words = arrays["words"].tolist()
    steps = [{"p": round(float(p), 5), "best": list(zip(best, np.round(ps, 5).tolist(), strict=True))}
             for p, best, ps in zip(arrays["probabilities"], arrays["alternatives"].tolist(),
                                    arrays["alternative_probabilities"], strict=True)]
    split = {part: _rounded(arrays[f"lrp_{part}"]) for part in SPLIT} if "lrp_rest" in arrays else None
    sides = np.array(image.shape[1::-1] * 2)
    contrast = {"word": str(arrays["contrast"]), "p": _rounded(arrays.get("contrast_probabilities", []))}
    objects = [{"name": label, "box": np.round(box / sides, 4).tolist()} for label, box in zip(
        arrays["objects"].tolist(), arrays["object_boxes"], strict=True)] if "objects" in arrays else []
    return {"name": name, "caption": caption_text(words), "words": words, "first": first_step(words, split),
            "steps": steps, "split": split,
            "flags": [bool(flag) for flag in arrays.get("flags", [])], "logits": _rounded(arrays["logits"]),
            "contrast": contrast if contrast["word"] else None,
            "boxes": np.round(arrays["boxes"] / sides, 4).tolist() if "boxes" in arrays else None,
            "references": arrays["references"].tolist() if "references" in arrays else [], "objects": objects,
            "settings": json.loads(str(arrays["settings"])) if "settings" in arrays else {},
            "methods": {method: _method_entry(arrays, method) for method in arrays["methods"].tolist()},
            # JPEG, which browsers print as it is
            "image": _data_uri(Image.fromarray(thumbnail(image, IMAGE_SIDE)), "jpeg"),
            "grey": _data_uri(grey_background(Image.fromarray(thumbnail(image, PRINTED_SIDE))).convert("L"), "jpeg")}


def first_step(words, split):
    """The step of the word that the page shows first: of the words that are no stop words, the one to which the image
    contributes most; the longest if there is no `split`. words: from <start> to <end>."""
    scores = split["image"] if split else [len(word) for word in words[1:]]
    without = stop_words() | {"<end>"}
    return max(range(len(words) - 1), key=lambda t: (words[t + 1] not in without, scores[t]))


def _rounded(values):
    return [float(f"{value:.4g}") for value in np.asarray(values).tolist()]


def caption_text(words):
    """The words between <start> and <end> as a string."""
    return " ".join(word for word in words if word not in ("<start>", "<end>"))


def _method_entry(arrays, method):
    maps, signed, shared_scale = maps_of(arrays, method), is_signed(method), is_shared(arrays)
    entry = {"maps": None, "regions": None, "words": None, "heads": None}
    if "boxes" in arrays:
        tops = np.abs(maps).max(1, keepdims=True)
        tops = np.full_like(tops, tops.max(initial=0)) if shared_scale else tops
        entry["regions"] = np.round(maps / np.where(tops == 0, 1, tops), 3).tolist()
        tops = tops[:, 0]
    else:
        rgba, tops = colour_maps(maps, signed, shared_scale)
        entry["maps"] = [_heatmap(colours) for colours in rgba]
        if method == "attention" and arrays["attention"].ndim == 3:
            entry["heads"] = [[_heatmap(colours) for colours in colour_maps(_on_grid(head), signed, shared_scale)[0]]
                              for head in arrays["attention"].swapaxes(0, 1)]
    if f"{method}_words" in arrays:
        entry["words"] = np.round(normalised_words(arrays[f"{method}_words"]), 3).tolist()
    return entry | {"scales": [f"{top:.2g}" for top in tops]}


def _heatmap(rgba):
    heatmap = Image.fromarray(rgba)
    heatmap.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE), Image.Resampling.BOX)
    return _data_uri(heatmap, "webp")


def _data_uri(image, kind):
    file = io.BytesIO()
    image.save(file, kind, quality=70)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def _json(value):
    """JSON that may stand within an HTML script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def write_entry(folder, entry, image):
    """Writes an image's part of the page, `page_entry`, and its thumbnail. image: uint8 (H, W, 3)."""
    Path(folder, ENTRY).write_text(FRAME % _json(entry), encoding="utf-8")
    Image.fromarray(thumbnail(image, THUMBNAIL_SIDE)).save(Path(folder, THUMBNAIL), quality=70)


def read_entry(folder):
    """The JSON text of the entry in the folder's entry.html."""
    return Path(folder, ENTRY).read_text(encoding="utf-8").split("\n")[1]


def has_entry(folder):
    """Whether the folder has a valid entry and a thumbnail."""
    try:
        return (all(Path(folder, name).is_file() for name in (ENTRY, THUMBNAIL))       # a pipe could block its reader
                and isinstance(json.loads(read_entry(folder)), dict))
    except (OSError, ValueError, IndexError, RecursionError):
        return False


def write_page(path, folders):
    """Writes the page of the explanations in `folders`, at least one, which lie beside it."""
    before, after = page_template().split("@DATA@")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(before)
        for i, folder in enumerate(folders):
            file.write(("," if i else "[") + (read_entry(folder) if len(folders) <= EMBEDDED else _summary(folder)))
        file.write("]" + after)


def page_of(entry):
    """The page of one `page_entry`, as a string."""
    return page_template().replace("@DATA@", f"[{_json(entry)}]")


def _summary(folder):
    """What the list of images shows of an image that is not embedded: JSON text."""
    with np.load(folder / "explanation.npz") as arrays:
        words = arrays["words"].tolist()
    return _json({"name": folder.name, "caption": caption_text(words)})


def page_template():
    """The page with its style, its script and the methods' descriptions, in which @DATA@ stands for the entries."""
    html, css, script = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                         for name in ("page.html", "page.css", "page.js"))
    methods = {method: {"help": METHODS[method].description, "signed": is_signed(method),
                        "labels": scale_labels(method), "word_labels": word_labels(method),
                        "legend": _gradient(method)} for method in METHODS}
    return html.replace("@CSS@", css).replace("@SCRIPT@", script).replace("@METHODS@", _json(methods))


def _gradient(method):
    """The colours of the method's maps as a gradient in CSS."""
    colours = ", ".join(f"rgb({r} {g} {b} / {a / 255:.3f})" for r, g, b, a in legend(method).tolist())
    return f"linear-gradient(90deg, {colours})"
