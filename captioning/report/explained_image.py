"""An explained image: the one form in which script, Python, PNGs, page and files have it."""
import builtins
import html
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.data.images import read_image
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, SPLIT
from captioning.files import (
    content_hash,
    make_folder,
    sync_to_disk,
    temporary_path,
    write_text,
)
from captioning.report import heatmaps
from captioning.report.colours import colour_maps
from captioning.report.explanations import (
    ARRAYS,
    caption_of,
    foreign_file,
    own_names,
    read_explanation,
)
from captioning.report.figure import draw_figure
from captioning.report.page import PAGE, as_json, page_entry, page_of, write_entry

# fields that explanation.npz contains under their own names, unless they are None
STORED = ("logits", "probabilities", "alternatives", "alternative_probabilities", "attention",
          "contrast", "references", "objects", "object_boxes", "upright", "shared_scale",
          "identity", "presence", "flags", "contrast_probabilities", "boxes", "window", "model")


@dataclass
class Relevance:
    """What one method assigns to the inputs of the T words; None where it assigns nothing."""
    pixels: np.ndarray | None = None        # (T, S, S) of the encoder's input, channels summed
    regions: np.ndarray | None = None       # (T, K) of the encoder's output, channels summed
    words: np.ndarray | None = None         # (T, T), row t for the word explained at step t


@dataclass(repr=False)
class ExplainedImage:
    """The explanation of every word of one image's caption.

    Its repr is a table of the words; in a notebook it is the interactive page. Methods take a word
    as text, of which the first occurrence counts, or as its position among `words`; and one of the
    explanation methods that were computed, by default the first."""
    words: list                             # the T words that are explained, up to <end>
    logits: np.ndarray                      # (T,); with a contrast, the difference to that word's
    probabilities: np.ndarray               # (T,)
    alternatives: np.ndarray                # (T, 5) the most probable words at each step
    alternative_probabilities: np.ndarray   # (T, 5)
    attention: np.ndarray                   # (T, K), or (T, M, K) with M heads
    methods: dict                           # {name of the method: Relevance}
    split: dict | None = None               # {"image", "start", "previous", "rest": (T,)}, by LRP
    presence: np.ndarray | None = None      # (T,) estimate that the named object is there, or NaN
    flags: np.ndarray | None = None         # (T,) bool, whether this estimate is low
    contrast: str = ""                      # explained is why the model prefers a word to this one
    contrast_probabilities: np.ndarray | None = None    # (T,) of that word
    boxes: np.ndarray | None = None         # (K, 4) in pixels, the regions of bottom-up features
    window: tuple = (0, 0, 1, 1)            # x0, y0, x1, y1 of what the model sees, as fractions
    # the image and what is known of it
    name: str = ""
    image: Image.Image | None = None        # of H×W pixels
    source: str = ""                        # path of its file
    upright: bool = True                    # whether it was rotated by its EXIF orientation
    references: list = ()                   # captions that people wrote
    objects: list = ()                      # names of n annotated objects
    object_boxes: np.ndarray | tuple = ()               # (n, 4) in pixels
    # how it was explained
    model: str = ""                         # its name, if several are compared
    shared_scale: bool = False              # whether all maps have one colour scale
    map_size: int = heatmaps.MAP_SIZE       # width of a map in the PNGs, in pixels
    settings: dict = field(default_factory=dict)        # shown on the page
    identity: str = ""                      # hash of all that the explanation depends on

    @property
    def caption(self):
        """The caption as a string."""
        return caption_of(self.words)

    # -- maps ------------------------------------------------------------------------------------

    def maps(self, method):
        """The method's maps: (T, S, S) of pixels, (T, h, w) of attention, or (T, K) of regions."""
        relevance = self.methods[method]
        if self.boxes is None and relevance.pixels is not None:
            return self._in_photograph(relevance.pixels)
        values = relevance.regions
        if values is None:
            values = self.attention.mean(1) if self.attention.ndim == 3 else self.attention
        return values if self.boxes is not None else self._in_photograph(_on_grid(values))

    def heads(self, method):
        """The maps (T, h, w) of each head, if the method's maps are the mean of the attention."""
        relevance = self.methods[method]
        of_attention = relevance.pixels is None and relevance.regions is None
        if self.attention.ndim == 2 or not of_attention:
            return []
        return [self._in_photograph(_on_grid(head)) for head in self.attention.swapaxes(0, 1)]

    def _in_photograph(self, maps):
        """Maps (T, h, w) of what the model sees -> of the whole image, 0 where it sees nothing."""
        x0, y0, x1, y1 = np.array(self.window, float)
        if np.abs(np.array(self.window) - (0, 0, 1, 1)).max() < 0.01:
            return maps
        indices = []
        for low, high, side in ((y0, y1, maps.shape[1]), (x0, x1, maps.shape[2])):
            count = max(100, round(side / (high - low)))        # so many that edges stay sharp
            places = (np.arange(count) + 0.5) / count
            indices.append(np.floor((places - low) / (high - low) * side).astype(int))
        whole = maps[:, indices[0].clip(0, maps.shape[1] - 1)]
        whole = whole[:, :, indices[1].clip(0, maps.shape[2] - 1)]
        is_seen = [(i >= 0) & (i < side) for i, side in zip(indices, maps.shape[1:], strict=True)]
        return whole * is_seen[0][:, None] * is_seen[1]

    def heatmap(self, word, method=None):
        """float32 (H, W): the method's map for the word, on the image's pixels.

        The value of each of the map's cells is spread evenly over the pixels that it covers, so
        that the sum is the map's: for LRP the image's part of the logit, less what the biases of
        the CNN absorb (docs/method.md, section 5)."""
        values = self.maps(self._method(method))[self._step(word)].astype(np.float64)
        vertical = _overlaps(self.image.height, values.shape[0])
        horizontal = _overlaps(self.image.width, values.shape[1])
        return (vertical @ values @ horizontal.T).astype(np.float32)

    def overlay(self, word, method=None):
        """PIL image: the method's map for the word in colours over the grey image.

        A view: the map is stretched smoothly, and its colours are clipped at the 99.5th percentile
        of its absolute values, so that they do not add up as those of `heatmap` do."""
        method = self._method(method)
        t = self._step(word)
        rgba, _ = colour_maps(self.maps(method)[t:t + 1], METHODS[method].signed)
        return heatmaps.overlay(self.image, rgba[0])

    def figure(self, method=None):
        """matplotlib Figure: the method's heatmaps of all words, with vector text and bars. Its
        `savefig("figure.pdf")`, or .svg, is for papers."""
        return draw_figure(self, self._method(method))

    def show(self, word, method=None):
        """Shows the overlay: in the notebook, else in the system's viewer."""
        overlaid = self.overlay(word, method)
        if hasattr(builtins, "get_ipython"):        # within IPython
            from IPython.display import display
            display(overlaid)
        else:
            overlaid.show()

    def _step(self, word):
        """The position of a word among `words`."""
        if isinstance(word, str) and word in self.words:
            return self.words.index(word)
        is_number = isinstance(word, int | np.integer) and not isinstance(word, bool)
        if is_number and 0 <= word < len(self.words):
            return word
        raise InputError(f"{word!r} is not a word of the caption: choose one of: "
                         f"{', '.join(self.words)}")

    def _method(self, method):
        """The given method, or the first one."""
        if method not in (None, *self.methods):
            raise InputError(f"{method!r} was not computed: choose one of "
                             f"{', '.join(self.methods)}, or give it to explain(methods=…)")
        return method or next(iter(self.methods))

    # -- text and page ---------------------------------------------------------------------------

    def table(self):
        """One line per word: its probability and, by LRP, the split of its logit and the estimated
        probability that the object that it names is in the image."""
        width = max(map(len, self.words)) + 2
        lines = [f"  {'word':{width}}probability"]
        if self.split:
            lines[0] += f"{'image':>10}{'previous':>10}{'<start>':>10}{'rest':>10}"
        for t, word in enumerate(self.words):
            line = f"  {word:{width}}{self.probabilities[t]:11.3f}"
            if self.split:
                for part in ("image", "previous", "start", "rest"):
                    line += f"{self.split[part][t]:+10.2f}"
            if self.presence is not None and np.isfinite(self.presence[t]):
                line += f"   in the image: {self.presence[t]:.0%}"
                line += " (doubtful)" if self.flags[t] else ""
            lines.append(line)
        return "\n".join(lines)

    def __repr__(self):
        return f"{self.name}: {self.caption}\n{self.table()}"

    def _repr_html_(self):
        page = html.escape(page_of(as_json(page_entry(self))))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 46rem; border: 0"></iframe>'

    def to_html(self, path):
        """Writes the interactive page of this image, one self-contained file."""
        write_text(path, page_of(as_json(page_entry(self))))

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder, with_page=True):
        """Writes a PNG per method, explanation.npz, and the image's share of a page.

        They replace those of an earlier explanation, once all are complete; other files in the
        folder are kept. with_page: also index.html, the page of this image alone. InputError if
        writing fails, or would replace files that are not of an explanation."""
        folder = Path(folder).absolute()
        if foreign := foreign_file(folder):
            raise InputError(f"{foreign} is not of an explanation, and would be replaced: choose "
                             "another folder")
        temporary = temporary_path(folder)
        try:
            make_folder(temporary)
            for method in self.methods:
                heatmaps.draw_heatmaps(temporary / f"{method}.png", self, method)
            entry = page_entry(self)
            write_entry(temporary, entry, self.image)
            if with_page:
                write_text(temporary / "index.html", page_of(as_json(entry)))
            # by these the explanation is known to be complete
            hashes = {path.name: content_hash(path) for path in sorted(temporary.iterdir())}
            np.savez_compressed(temporary / ARRAYS, files=json.dumps(hashes), **self._arrays())
            for path in (*temporary.iterdir(), temporary):
                sync_to_disk(path)

            if not folder.exists():
                os.replace(temporary, folder)
                return
            for name in own_names() - {*hashes, ARRAYS, PAGE}:
                (folder / name).unlink(missing_ok=True)
            for name in (*hashes, ARRAYS):
                os.replace(temporary / name, folder / name)
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror or error}): free some "
                             "space or choose another folder") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _arrays(self):
        """The arrays of explanation.npz (docs/data.md)."""
        arrays = {name: getattr(self, name) for name in STORED if getattr(self, name) is not None}
        arrays |= {"words": ["<start>", *self.words], "methods": [*self.methods],
                   "image": self.source, "settings": json.dumps(self.settings)}
        for method, relevance in self.methods.items():
            for kind, values in vars(relevance).items():
                if values is not None:
                    arrays[f"{method}_{kind}"] = compact(values) if kind == "pixels" else values
        if self.split:
            arrays |= {f"lrp_{part}": values for part, values in self.split.items()}
            rest = self.split["rest"]
            share = np.divide(rest, self.logits, out=np.ones_like(rest), where=self.logits != 0)
            arrays["conservation"] = 1 - share
        return arrays

    @classmethod
    def load(cls, folder):
        """The explanation that `save` wrote to the folder; the image is read from its own file."""
        arrays = read_explanation(folder)
        fields = {name: arrays[name] if arrays[name].ndim else arrays[name].item()
                  for name in STORED if name in arrays}
        methods = {method: Relevance(*map(arrays.get, (f"{method}_pixels", f"{method}_regions",
                                                       f"{method}_words")))
                   for method in arrays["methods"].tolist()}
        split = {part: arrays[f"lrp_{part}"] for part in SPLIT if f"lrp_{part}" in arrays}
        source = arrays["image"].item()
        image = as_pil(read_image(source, arrays["upright"].item()))
        return cls(arrays["words"].tolist()[1:], methods=methods, split=split, image=image,
                   name=Path(folder).absolute().name, source=source,
                   settings=json.loads(arrays["settings"].item()), **fields)


def as_pil(image):
    """uint8 tensor (3, H, W) -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _overlaps(pixels, cells):
    """(pixels, cells): the share of each of the cells of a line that lies on each of its pixels."""
    edges = np.arange(pixels + 1)[:, None] / pixels * cells - np.arange(cells)
    return np.diff(edges.clip(0, 1), axis=0)


def _on_grid(values):
    """(T, K) -> (T, h, w): encoders map square images to square grids."""
    side = round(values.shape[-1] ** 0.5)
    return values.reshape(-1, side, side)


def compact(maps):
    """Maps (T, h, w) rounded to 1/256 of each one's largest absolute value, which halves the file;
    float16 where it represents these numbers, else float32."""
    largest = np.abs(maps).max((1, 2), keepdims=True)
    step = np.exp2(np.ceil(np.log2(np.where(largest == 0, 1, largest))) - 8)
    rounded = (np.rint(maps / step) * step).astype(np.float32)
    with np.errstate(over="ignore"):
        half = rounded.astype(np.float16)
    return half if np.array_equal(half, rounded) else rounded
