"""Plots of the results of experiments."""
import numpy as np

from captioning.files import atomic_path

METHOD_COLOURS = {"lrp": "C3", "lrp_specific": "C6", "gradient": "C0", "grad_cam": "C2", "guided_backprop": "C4",
                  "guided_grad_cam": "C1", "attention": "C5", "sentinel": "C8", "image": "C3", "share": "C1",
                  "absolute_share": "C6", "log_p": "C0", "log_p_gain": "C2", "1-beta": "C8"}


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
