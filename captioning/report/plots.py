"""Plots: heatmaps over the image, matrices of word relevance, and results of the experiments."""
import numpy as np
from PIL import Image

from captioning.explanation.methods import NON_NEGATIVE
from captioning.files import atomic_path

METHOD_COLOURS = {"lrp": "C3", "gradient": "C0", "grad_cam": "C2", "guided_backprop": "C4", "guided_grad_cam": "C1",
                  "attention": "C5", "sentinel": "C8", "image": "C3", "share": "C1", "absolute_share": "C6",
                  "log_p": "C0", "log_p_gain": "C2", "1-beta": "C8"}


def scale_labels(method):
    """What the lowest and the highest values of a method's maps mean, as two short labels."""
    if method in NON_NEGATIVE:
        return ["low", "high"]
    return ["opposes the word", "supports the word"] if method == "lrp" else ["negative gradient", "positive gradient"]


def _colour_key(method):
    if method in NON_NEGATIVE:
        return "low: transparent, high: yellow"
    if method == "lrp":
        return "red supports the word, blue opposes it"
    return "red: positive gradient, blue: negative gradient"


def draw_heatmaps(path, image, words, maps, title, method, boxes=None):
    """Draws the image, and beside it one heatmap per word over the image.

    Each heatmap has its own colour scale; the number below it is the value of the strongest colour. Signed maps are red
    where positive, blue where negative and transparent at zero; maps of the methods NON_NEGATIVE get more opaque, and
    change from blue to yellow, as values grow.

    image: uint8 (H, W, 3). words: T strings. maps: (T, h, w), stretched to the image; or (T, K), values of regions with
    `boxes` (K, 4), which are x0, y0, x1, y1 in pixels of the image.
    """
    from matplotlib.figure import Figure
    signed = method not in NON_NEGATIVE
    full_width, image = image.shape[1], thumbnail(image)
    columns = min(6, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    H, W = image.shape[:2]
    width = 2.1
    height = width * min(max(H / W, 0.3), 3)        # of a cell; an image beyond these limits gets a margin
    figure = Figure(figsize=(max(columns * width, 6), rows * (height + 0.3) + 1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06, hspace=0.02)
    figure.suptitle(title, fontsize=13, wrap=True)
    figure.supxlabel(f"{_colour_key(method)}; below each map: the value of the strongest colour", fontsize=10,
                     color="0.4")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(image)
    axes[0].set_title("image", fontsize=11, color="0.4")
    grey = np.repeat(np.asarray(image, float).mean(2, keepdims=True), 3, axis=2) / 255 * 0.6 + 0.35
    for axis, word, heat in zip(axes[1:], words, maps, strict=False):
        axis.imshow(np.clip(grey, 0, 1), extent=(0, W, H, 0))
        if boxes is None:
            axis.imshow(colours(heat, signed), extent=(0, W, H, 0), interpolation="bilinear")
        else:
            _draw_boxes(axis, boxes * (W / full_width), heat, signed)
        axis.set_title(word, fontsize=12, fontweight="bold")
        top = scale(heat, signed) if boxes is None else np.abs(heat).max()
        axis.text(1, -0.02, f"{'±' if signed else ''}{top:.2g}", transform=axis.transAxes, ha="right",
                  va="top", fontsize=8, color="0.4")
    _save(figure, path)


def _draw_boxes(axis, boxes, values, signed):
    """Draws boxes (K, 4), thicker and more opaque for larger absolute values (K,), the strongest on top."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle
    scaled = np.asarray(values, float) / (np.abs(values).max() or 1.0)
    for k in np.argsort(np.abs(scaled)):
        (x0, y0, x1, y1), strength = boxes[k], float(abs(scaled[k]))
        colour = ("#d62728" if scaled[k] > 0 else "#1f58dc") if signed else "#f0b400"
        # powers of the strength: otherwise overlapping regions of medium strength hide the image
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, linewidth=0.3 + 2.2 * strength,
                                 edgecolor=to_rgba(colour, strength ** 1.5),
                                 facecolor=to_rgba(colour, 0.12 * strength ** 4)))


def colours(heat, signed):
    """heat (h, w) -> RGBA (h, w, 4) in [0, 1], more opaque for larger absolute values."""
    from matplotlib import colormaps
    top = scale(heat, signed)
    heat = smooth(np.asarray(heat, float)) if signed else np.asarray(heat, float)
    scaled = np.clip(heat / (top or 1.0), -1, 1)
    rgba = colormaps["bwr" if signed else "plasma"]((scaled + 1) / 2 if signed else scaled)
    rgba[..., 3] = np.abs(scaled) ** 0.6 * (0.95 if signed else 0.75)
    return rgba


def scale(heat, signed):
    """The value of the strongest colour: the 99.5th percentile of absolute values, robust against outliers."""
    heat = np.abs(smooth(np.asarray(heat, float)) if signed else np.asarray(heat, float))
    return np.percentile(heat, 99.5) or heat.max()      # the maximum if nearly all values are zero


def thumbnail(image, side=480):
    """uint8 (H, W, 3), reduced so that no side is longer than `side` pixels."""
    reduced = Image.fromarray(np.ascontiguousarray(image))
    reduced.thumbnail((side, side))
    return np.asarray(reduced)


def smooth(heat):
    """Gaussian smoothing by about 1/100 of the map's side (standard deviation), which makes single pixels visible."""
    radius = max(1, round(heat.shape[-1] / 50))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / (radius / 2)) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(heat, radius)
    rows = sum(k * padded[:, radius + o:padded.shape[1] - radius + o] for k, o in zip(kernel, offsets, strict=True))
    return sum(k * rows[radius + o:rows.shape[0] - radius + o] for k, o in zip(kernel, offsets, strict=True))


def draw_words(path, read, explained, matrix, title, method):
    """Draws the relevance of the words read, a matrix (T, T): row t belongs to the word explained at step t.

    Each row has its own colour scale. read, explained: T strings each. method: name, for the labels of the colours.
    """
    from matplotlib.figure import Figure
    matrix = np.asarray(matrix, float)
    T = len(explained)
    figure = Figure(figsize=(2.8 + 0.5 * max(T, 3), 1.8 + 0.5 * max(T, 3)), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    axis = figure.subplots()
    largest = np.abs(matrix).max(1, keepdims=True)
    scaled = np.where(np.tri(T, dtype=bool), matrix / np.where(largest == 0, 1, largest), np.nan)
    drawn = axis.imshow(scaled, cmap="bwr", vmin=-1, vmax=1)
    axis.set_xticks(range(T), read, rotation=45, ha="right")
    axis.set_yticks(range(T), explained)
    axis.set(xlabel="word read", ylabel="word explained")
    if T <= 14:
        for row, column in zip(*np.tril_indices(T), strict=True):
            strong = abs(scaled[row, column]) > 0.55
            axis.text(column, row, f"{matrix[row, column]:.2g}", ha="center", va="center", fontsize=7,
                      color="white" if strong else "black")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.7, ticks=[-1, 0, 1])
    low, high = ("opposes", "supports") if method == "lrp" else ("negative\ngradient", "positive\ngradient")
    bar.ax.set_yticklabels([low, "0", high])
    _save(figure, path)


def draw_correctness(path, thresholds, shares, box_share):
    """Draws the share of relevance inside the object's box over thresholds τ (docs/method.md, section 9).

    shares: {method: its share at each threshold}. box_share: the box's share of the image area, the dashed line.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    for method, values in shares.items():
        axis.plot(thresholds, values, marker="o", markersize=4, label=method, color=_colour(method))
    axis.axhline(box_share, color="0.5", linestyle="--", label="the box's share\nof the image")
    axis.set(xlabel="threshold τ", ylabel="share of relevance inside the box", ylim=(0, 1),
             title="correct object words")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    _save(figure, path)


def draw_comparison(path, runs):
    """Draws one panel per metric, with its own scale and one bar per run. runs: {name: {metric: number}}."""
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(name for metrics in runs.values() for name in metrics))
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.4 * columns + 1, 2.1 * rows + 0.3 * len(runs) + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(names):]:
        axis.axis("off")
    for axis, name in zip(axes, names, strict=False):
        for k, (run, metrics) in enumerate(runs.items()):
            value = metrics.get(name, float("nan"))
            bar = axis.bar(k, value, color=f"C{k}", label=run)
            axis.bar_label(bar, [f"{value:.3g}" if name in metrics else "none"], fontsize=7)
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_xlim(-0.6, len(runs) - 0.4)
        axis.margins(y=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    _save(figure, path)


def draw_bars(path, panels):
    """Draws means with standard errors as horizontal bars. panels: {title: {method: Score}}."""
    from matplotlib.figure import Figure
    panels = {title: scores for title, scores in panels.items() if scores}
    figure = Figure(figsize=(3.4 * len(panels) + 0.6, 3.4), layout="constrained")
    for axis, (title, scores) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for position, (method, score) in enumerate(scores.items()):
            axis.barh(position, score.mean, xerr=score.error, color=_colour(method), capsize=3)
        axis.set_yticks(range(len(scores)), scores)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_curves(path, panels, x, xlabel, ylabel):
    """Draws means with bands of one standard error. panels: {title: {method: one Score per x}}, x: numbers or names."""
    from matplotlib.figure import Figure
    categorical = isinstance(x[0], str)
    figure = Figure(figsize=((7 if categorical else 4.4) * len(panels) + 1.4, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for method, scores in curves.items():
            mean, error = (np.array([score[i] for score in scores]) for i in (0, 1))
            axis.plot(x, mean, marker="o", markersize=3, label=method, color=_colour(method))
            axis.fill_between(x, mean - error, mean + error, alpha=0.2, color=_colour(method), linewidth=0)
        axis.set(title=title, xlabel=xlabel)
        if categorical:
            axis.set_xticks(range(len(x)), x, rotation=45, ha="right")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    _save(figure, path)


def draw_roc(path, panels):
    """Draws ROC curves for the detection of correct words.

    panels: {statistic: {method: (false positive rates, true positive rates)}}.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3 * len(panels) + 1.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for method, (false_rates, true_rates) in curves.items():
            axis.plot(false_rates, true_rates, label=method, color=_colour(method), linewidth=1.3)
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="false positive rate", aspect="equal")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("true positive rate")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    _save(figure, path)


def _colour(method):
    """The method's colour, the same in every plot; grey for baselines."""
    return METHOD_COLOURS.get(method, "0.6")


def _save(figure, path):
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        text.set_parse_math(False)      # words may contain dollar signs
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
