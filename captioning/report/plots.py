"""Pictures of explanations: heatmaps over the photograph, the matrix of word relevances, correctness curves."""
import numpy as np
from PIL import Image

from captioning.files import atomic_path

METHOD_COLOURS = {"lrp": "C3", "gradient": "C0", "grad_cam": "C2", "guided_backprop": "C4", "guided_grad_cam": "C1",
                  "attention": "C5", "sentinel": "C8"}


def draw_heatmaps(path, image, words, maps, title, signed=True, boxes=None):
    """The photograph and, for each word, its map over it, each to a scale of its own that stands below it.

    image: uint8 (H, W, 3); maps (T, h, w), stretched to the photograph, or (T, K) of its regions, boxes (K, 4), x0, y0,
    x1, y1 in pixels. Signed maps: red spoke for the word, blue against it, nothing at zero; others: from nothing to
    yellow.
    """
    from matplotlib.figure import Figure
    full, image = image.shape[1], thumbnail(image)
    columns = min(6, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    H, W = image.shape[:2]
    width = 2.1
    height = width * min(max(H / W, 0.3), 3)        # of a cell; beyond that the photograph gets a margin
    figure = Figure(figsize=(max(columns * width, 6), rows * (height + 0.3) + 1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06, hspace=0.02)
    figure.suptitle(title, fontsize=13, wrap=True)
    meaning = "red spoke for the word, blue against it" if signed else "yellow marks the highest values"
    figure.supxlabel(f"{meaning}; the strongest colour stands for the number below", fontsize=10, color="0.4")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(image)
    axes[0].set_title("picture", fontsize=11, color="0.4")
    grey = np.repeat(np.asarray(image, float).mean(2, keepdims=True), 3, axis=2) / 255 * 0.6 + 0.35
    for axis, word, heat in zip(axes[1:], words, maps, strict=False):
        axis.imshow(np.clip(grey, 0, 1), extent=(0, W, H, 0))
        if boxes is None:
            axis.imshow(colours(heat, signed), extent=(0, W, H, 0), interpolation="bilinear")
        else:
            _draw_boxes(axis, boxes * (W / full), heat, signed)
        axis.set_title(word, fontsize=12, fontweight="bold")
        top = scale(heat, signed) if boxes is None else np.abs(heat).max()
        axis.text(1, -0.02, f"{'±' if signed else ''}{top:.2g}", transform=axis.transAxes, ha="right",
                  va="top", fontsize=8, color="0.4")
    _save(figure, path)


def _draw_boxes(axis, boxes, values, signed):
    """boxes (K, 4), thicker and more opaque the further values (K,) are from zero; the strongest on top."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle
    scaled = np.asarray(values, float) / (np.abs(values).max() or 1.0)
    for k in np.argsort(np.abs(scaled)):
        (x0, y0, x1, y1), strength = boxes[k], float(abs(scaled[k]))
        colour = ("#d62728" if scaled[k] > 0 else "#1f58dc") if signed else "#f0b400"
        # powers, or 36 middling regions over each other hide the photograph and the strongest
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, linewidth=0.3 + 2.2 * strength,
                                 edgecolor=to_rgba(colour, strength ** 1.5),
                                 facecolor=to_rgba(colour, 0.12 * strength ** 4)))


def colours(heat, signed):
    """heat (h, w) -> RGBA (h, w, 4), more opaque the further from zero."""
    from matplotlib import colormaps
    top = scale(heat, signed)
    heat = smooth(np.asarray(heat, float)) if signed else np.asarray(heat, float)
    scaled = np.clip(heat / (top or 1.0), -1, 1)
    rgba = colormaps["bwr" if signed else "plasma"]((scaled + 1) / 2 if signed else scaled)
    rgba[..., 3] = np.abs(scaled) ** 0.6 * (0.95 if signed else 0.75)
    return rgba


def scale(heat, signed):
    """The absolute value that gets the strongest colour: the 99.5th percentile, as single pixels may stand out."""
    heat = np.abs(smooth(np.asarray(heat, float)) if signed else np.asarray(heat, float))
    return np.percentile(heat, 99.5) or heat.max()      # the maximum where nearly all is zero


def thumbnail(image, side=480):
    """uint8 (H, W, 3), no side longer than `side`: every word's cell holds a copy of it."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side))
    return np.asarray(picture)


def smooth(heat):
    """A Gaussian over about 1/100 of the map's side, so that single pixels' relevance can be seen."""
    radius = max(1, round(heat.shape[-1] / 50))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / (radius / 2)) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(heat, radius)
    rows = sum(k * padded[:, radius + o:padded.shape[1] - radius + o] for k, o in zip(kernel, offsets, strict=True))
    return sum(k * rows[radius + o:rows.shape[0] - radius + o] for k, o in zip(kernel, offsets, strict=True))


def draw_words(path, read, explained, matrix, title):
    """The words' relevance (T, T): rows are explained words, columns the words read before; each row has its scale."""
    from matplotlib.figure import Figure
    matrix = np.asarray(matrix, float)
    T = len(explained)
    figure = Figure(figsize=(2.8 + 0.5 * max(T, 3), 1.8 + 0.5 * max(T, 3)), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    axis = figure.subplots()
    scale = np.abs(matrix).max(1, keepdims=True)
    shown = np.where(np.tri(T, dtype=bool), matrix / np.where(scale == 0, 1, scale), np.nan)
    picture = axis.imshow(shown, cmap="bwr", vmin=-1, vmax=1)
    axis.set_xticks(range(T), read, rotation=45, ha="right")
    axis.set_yticks(range(T), explained)
    axis.set(xlabel="word read", ylabel="word explained")
    if T <= 14:
        for row, column in zip(*np.tril_indices(T), strict=True):
            strong = abs(shown[row, column]) > 0.55
            axis.text(column, row, f"{matrix[row, column]:.2g}", ha="center", va="center", fontsize=7,
                      color="white" if strong else "black")
    bar = figure.colorbar(picture, ax=axis, shrink=0.7, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["against", "0", "for"])
    _save(figure, path)


def draw_correctness(path, thresholds, shares, box_share):
    """shares: {method: share inside the box at every threshold}; the dashed line is the box's share of the picture."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    for method, values in shares.items():
        axis.plot(thresholds, values, marker="o", markersize=4, label=method, color=_colour(method))
    axis.axhline(box_share, color="0.5", linestyle="--", label="the box's share\nof the picture")
    axis.set(xlabel="threshold τ", ylabel="share of relevance inside the box", ylim=(0, 1),
             title="correct object words")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    _save(figure, path)


def draw_comparison(path, runs):
    """runs: {name: {metric: number}}; a panel for each metric, as their scales differ, with a bar for each run."""
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
    """panels: {title: {method: Score}}, means with their standard errors."""
    from matplotlib.figure import Figure
    panels = {title: scores for title, scores in panels.items() if scores}
    figure = Figure(figsize=(3.4 * len(panels) + 0.6, 3.4), layout="constrained")
    for axis, (title, scores) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for place, (method, score) in enumerate(scores.items()):
            axis.barh(place, score.mean, xerr=score.error, color=_colour(method), capsize=3)
        axis.set_yticks(range(len(scores)), scores)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_curves(path, panels, x, xlabel, ylabel):
    """panels: {title: {method: a Score for every x}}; x: numbers, or names."""
    from matplotlib.figure import Figure
    names = isinstance(x[0], str)
    figure = Figure(figsize=((7 if names else 4.4) * len(panels) + 1.4, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for method, scores in curves.items():
            mean, error = (np.array([score[i] for score in scores]) for i in (0, 1))
            axis.plot(x, mean, marker="o", markersize=3, label=method, color=_colour(method))
            axis.fill_between(x, mean - error, mean + error, alpha=0.2, color=_colour(method), linewidth=0)
        axis.set(title=title, xlabel=xlabel)
        if names:
            axis.set_xticks(range(len(x)), x, rotation=45, ha="right")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    _save(figure, path)


def draw_roc(path, panels):
    """panels: {statistic: {method: (false positive rates, true positive rates)}}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3 * len(panels) + 1.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for method, (false, true) in curves.items():
            axis.plot(false, true, label=method, color=_colour(method), linewidth=1.3)
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="wrong words above the threshold", aspect="equal")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right words above it")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    _save(figure, path)


def _colour(method):
    """The same for a method in every plot; grey for baselines."""
    return METHOD_COLOURS.get(method, "0.6")


def _save(figure, path):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
