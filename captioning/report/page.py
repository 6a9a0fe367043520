"""index.html, the page that shows explanations, from the parts page.html, page.css and page.js.

Each image's folder contains what the page shows of it, entry.html, and a thumbnail. Up to EMBEDDED
images the page contains all of them and is one file. Above that it loads an image's entry.html when
the image is chosen, in a frame, which browsers allow for local files too (Chromium keeps the source
of every script that it has loaded, so the data must not be one)."""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.errors import InputError
from captioning.explanation.methods import METHODS
from captioning.files import write_text
from captioning.metrics.object_words import stop_words
from captioning.report.colours import colour_maps, legend, normalise_words, scale_regions
from captioning.report.heatmaps import labels, thumbnail

PAGE = "index.html"
ENTRY = "entry.html"            # in each image's folder
THUMBNAIL = "thumbnail.webp"
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>Part of index.html</title>
<script type="application/json">
%s
</script><script>parent.postMessage(document.scripts[0].textContent, "*")</script>
"""
FORMAT = 3          # of entries; the page shows no others
EMBEDDED = 30
# sides in pixels; heatmaps are stretched
IMAGE_SIDE = 720
HEATMAP_SIDE = 128
THUMBNAIL_SIDE = 96


def page_entry(explained):
    """What the page shows of an ExplainedImage, as JSON types."""
    words = explained.words
    sides = np.array(explained.image.size * 2)
    split = {part: _rounded(values) for part, values in (explained.split or {}).items()}
    contrast = None
    if explained.contrast:
        contrast = {"word": explained.contrast, "p": _rounded(explained.contrast_probabilities)}
    steps = []
    for t, p in enumerate(explained.probabilities):
        best = explained.alternative_probabilities[t].round(5).tolist()
        steps.append({"p": round(float(p), 5),
                      "best": list(zip(explained.alternatives[t].tolist(), best, strict=True))})
    objects = [{"name": str(name), "box": np.round(box / sides, 4).tolist()}
               for name, box in zip(explained.objects, explained.object_boxes, strict=True)]
    boxes = explained.boxes
    settings = dict(explained.settings)
    if tuple(explained.window) != (0, 0, 1, 1):
        left, top, right, bottom = (round(100 * edge) for edge in explained.window)
        settings["the model sees"] = (f"{left} to {right} % of the width, {top} to {bottom} % of "
                                      "the height")

    # shown first is, without stop words, the word to which the image contributes most
    scores = split["image"] if split else [len(word) for word in words]
    without = stop_words() | {"<end>"}
    first = max(range(len(words)), key=lambda t: (words[t] not in without, scores[t]))
    presence = [float(f"{value:.3g}") if np.isfinite(value) else None       # None: no object word
                for value in (() if explained.presence is None else explained.presence)]
    return {"format": FORMAT, "name": explained.name, "caption": explained.caption,
            "words": ["<start>", *words], "first": first, "steps": steps,
            "split": split or None, "logits": _rounded(explained.logits), "contrast": contrast,
            "flags": [] if explained.flags is None else np.array(explained.flags).tolist(),
            "presence": presence,
            "boxes": None if boxes is None else np.round(boxes / sides, 4).tolist(),
            "references": list(explained.references), "objects": objects, "settings": settings,
            "image": _data_uri(thumbnail(explained.image, IMAGE_SIDE), "jpeg"),
            "methods": {method: _method_entry(explained, method) for method in explained.methods}}


def _rounded(values):
    return [] if values is None else [float(f"{value:.4g}") for value in values]


def _method_entry(explained, method):
    """What the page shows of one method: its maps of pixels or values of regions, and of words."""
    kind = METHODS[method]
    maps = explained.maps(method)
    # what methods without signed maps assign to words are gradients
    of_words = kind if kind.signed else METHODS["gradient"]
    colours = [f"rgb({r} {g} {b} / {a / 255:.3f})" for r, g, b, a in legend(kind.signed).tolist()]
    description = kind.description
    if explained.boxes is not None:
        description = description.replace("pixel", "region")
    entry = {"help": description, "signed": kind.signed, "labels": labels(kind, explained.contrast),
             "word_labels": labels(of_words, explained.contrast), "maps": None, "regions": None,
             "heads": [], "words": None, "legend": f"linear-gradient(90deg, {', '.join(colours)})"}
    if explained.boxes is None:
        entry["maps"], tops = _heatmaps(maps, kind.signed, explained.shared_scale)
        entry["heads"] = [_heatmaps(head, kind.signed, explained.shared_scale)[0]
                          for head in explained.heads(method)]
    else:
        scaled, tops = scale_regions(maps, explained.shared_scale)
        entry["regions"] = np.round(scaled, 3).tolist()
    words = explained.methods[method].words
    if words is not None:
        entry["words"] = np.round(normalise_words(words), 3).tolist()
    return entry | {"scales": [f"{top:.2g}" for top in tops]}


def _heatmaps(maps, signed, shared_scale):
    """Maps (T, h, w) -> (T images as addresses, the values of their strongest colours)."""
    addresses = []
    colours, tops = colour_maps(maps, signed, shared_scale)
    for rgba in colours:
        heatmap = Image.fromarray(rgba)
        heatmap.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE), Image.Resampling.BOX)
        addresses.append(_data_uri(heatmap, "webp"))
    return addresses, tops


def _data_uri(image, kind):
    file = io.BytesIO()
    image.save(file, kind, quality=70)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def as_json(value):
    """JSON that may stand within an HTML script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def write_entry(folder, entry, image):
    """Writes the `page_entry` of an image and a thumbnail of it (PIL)."""
    Path(folder, ENTRY).write_text(FRAME % as_json(entry), encoding="utf-8")
    thumbnail(image, THUMBNAIL_SIDE).save(Path(folder, THUMBNAIL), quality=70)


def read_entry(folder):
    """The JSON text of the entry in the folder's entry.html, encoded again: whoever changed that
    file must not reach the page."""
    return as_json(json.loads(Path(folder, ENTRY).read_text(encoding="utf-8").split("\n")[2]))


def has_entry(folder):
    """Whether the folder has an entry that the page can show, and a thumbnail."""
    try:
        # a pipe in place of a file could block its reader
        are_files = all(Path(folder, name).is_file() for name in (ENTRY, THUMBNAIL))
        return are_files and json.loads(read_entry(folder))["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def check_page(folder):
    """InputError if the folder has an index.html that is not a page of explanations."""
    path = Path(folder, PAGE)
    start = "<title>Explanations</title>"
    if path.exists() and not (path.is_file() and start.encode() in path.read_bytes()[:1000]):
        raise InputError(f"{path} is not a page of explanations, and would be replaced: choose "
                         "another --save_path")


def write_page(path, captions):
    """Writes the page of explanations: {their folders beside the page: captions}, at least one."""
    entries = []
    for folder, caption in captions.items():
        if len(captions) <= EMBEDDED:
            entries.append(read_entry(folder))
        else:       # what the list of images shows
            entries.append(as_json({"name": folder.name, "caption": caption}))
    write_text(path, page_of(*entries))


def page_of(*entries):
    """The page of entries in JSON, with its style and its script, as a string."""
    html, css, script = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                         for name in ("page.html", "page.css", "page.js"))
    html = html.replace("@CSS@", css).replace("@SCRIPT@", script)
    return html.replace("@DATA@", f"[{','.join(entries)}]")
