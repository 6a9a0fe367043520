"""index.html: one self-contained page that shows explanations interactively; its template is page.html."""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.explanation.methods import NON_NEGATIVE
from captioning.files import write_text
from captioning.report.plots import colours, scale, scale_labels, thumbnail

HEATMAP_SIDE = 160      # pixels; the page stretches heatmaps over the image


def page_entry(name, image, arrays):
    """What the page shows of one explanation, as JSON types.

    image: uint8 (H, W, 3). arrays: the contents of explanation.npz.
    """
    words = arrays["words"].tolist()
    steps = [{"p": round(float(p), 5), "best": list(zip(best, np.round(ps, 5).tolist(), strict=True))}
             for p, best, ps in zip(arrays["probabilities"], arrays["alternatives"].tolist(),
                                    arrays["alternative_probabilities"], strict=True)]
    methods = {method: _method_entry(arrays, method) for method in arrays["methods"].tolist()}
    sides = np.array(image.shape[1::-1] * 2)
    boxes = np.round(arrays["boxes"] / sides, 4).tolist() if "boxes" in arrays else None
    encoded = _data_uri(Image.fromarray(thumbnail(image, 640)), quality=80)
    return {"name": name, "caption": caption_text(words), "image": encoded, "words": words, "steps": steps,
            "contrast": str(arrays["contrast"]), "boxes": boxes, "methods": methods}


def caption_text(words):
    """The words between <start> and <end> as a string."""
    return " ".join(word for word in words if word not in ("<start>", "<end>"))


def _method_entry(arrays, method):
    entry = {"signed": method not in NON_NEGATIVE, "labels": scale_labels(method), "maps": None, "regions": None,
             "words": None}
    if "boxes" in arrays:
        maps = arrays[f"{method}_regions"]
        entry |= {"scales": [f"{np.abs(row).max():.2g}" for row in maps], "regions": _normalised_rows(maps)}
    else:
        maps = arrays[f"{method}_pixels"]
        entry |= {"scales": [f"{scale(heat, entry['signed']):.2g}" for heat in maps],
                  "maps": [_data_uri(_heatmap(colours(heat, entry["signed"])), quality=70) for heat in maps]}
    if f"{method}_words" in arrays:
        entry["words"] = _normalised_rows(arrays[f"{method}_words"])
    return entry


def _normalised_rows(rows):
    """Each row divided by its largest absolute value, as lists."""
    largest = np.abs(rows).max(1, keepdims=True)
    return np.round(rows / np.where(largest == 0, 1, largest), 3).tolist()


def _heatmap(rgba):
    heatmap = Image.fromarray((rgba * 255).round().astype(np.uint8))
    heatmap.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE), Image.Resampling.BOX)
    return heatmap


def _data_uri(image, quality):
    file = io.BytesIO()
    image.save(file, "webp", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def write_page(path, entries):
    """Writes the page of `entries`, a list of at least one result of `page_entry`."""
    data = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_text(path, template.replace("@DATA@", data))
