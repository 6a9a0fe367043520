"""index.html: one page to look through explanations, with all its pictures inside (page.html is its template)."""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.explanation.methods import NON_NEGATIVE
from captioning.files import write_text
from captioning.report.plots import colours, scale, thumbnail

SIDE = 160          # of a heatmap, in pixels; the page stretches it over the photograph


def page_entry(name, photograph, arrays):
    """What the page shows of one picture, of JSON types; photograph: uint8 (H, W, 3), arrays: its explanation.npz."""
    words = arrays["words"].tolist()
    steps = [{"p": round(float(p), 5), "best": list(zip(best, np.round(ps, 5).tolist(), strict=True))}
             for p, best, ps in zip(arrays["probabilities"], arrays["alternatives"].tolist(),
                                    arrays["alternative_probabilities"], strict=True)]
    methods = {method: _method(arrays, method) for method in arrays["methods"].tolist()}
    sides = np.array(photograph.shape[1::-1] * 2)
    boxes = np.round(arrays["boxes"] / sides, 4).tolist() if "boxes" in arrays else None
    photo = _data_uri(Image.fromarray(thumbnail(photograph, 640)), quality=80)
    return {"name": name, "sentence": sentence(words), "photo": photo, "words": words, "steps": steps,
            "contrast": str(arrays["contrast"]), "boxes": boxes, "methods": methods}


def sentence(words):
    """The words from <start> to <end> as a text."""
    return " ".join(word for word in words if word not in ("<start>", "<end>"))


def _method(arrays, method):
    entry = {"signed": method not in NON_NEGATIVE, "maps": None, "regions": None, "words": None}
    if "boxes" in arrays:
        maps = arrays[f"{method}_regions"]
        entry |= {"scales": [f"{np.abs(row).max():.2g}" for row in maps], "regions": _shares(maps)}
    else:
        maps = arrays[f"{method}_pixels"]
        entry |= {"scales": [f"{scale(heat, entry['signed']):.2g}" for heat in maps],
                  "maps": [_data_uri(_picture(colours(heat, entry["signed"])), quality=70) for heat in maps]}
    if f"{method}_words" in arrays:
        entry["words"] = _shares(arrays[f"{method}_words"])
    return entry


def _shares(rows):
    """Rows over their largest absolute value, as lists."""
    largest = np.abs(rows).max(1, keepdims=True)
    return np.round(rows / np.where(largest == 0, 1, largest), 3).tolist()


def _picture(rgba):
    picture = Image.fromarray((rgba * 255).round().astype(np.uint8))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return picture


def _data_uri(picture, quality):
    file = io.BytesIO()
    picture.save(file, "webp", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def write_page(path, entries):
    """entries: page_entry's, at least one."""
    data = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_text(path, template.replace("@DATA@", data))
