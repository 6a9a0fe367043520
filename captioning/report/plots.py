"""Plots of the results of experiments."""
from captioning.files import atomic_path

COLOURS = {
    # methods
    "lrp": "C3", "lrp_specific": "C6", "gradient": "C0", "grad_cam": "C2", "guided_backprop": "C4",
    "guided_grad_cam": "C1", "attention": "C5", "sentinel": "C8",
    # scores of the experiment grounding
    "image": "C3", "share": "C1", "absolute_share": "C6", "log_p": "C0", "log_p_gain": "C2",
    "1-beta": "C8"}


def draw_bars(path, panels):
    """Draws means with standard errors as horizontal bars.

    panels: {title: table with one row per method, and the columns mean and standard_error}."""
    panels = {title: table for title, table in panels.items() if len(table)}
    figure, axes = new_figure(3.4 * len(panels) + 0.6, 3.4, len(panels), share_y=False)
    for axis, (title, table) in zip(axes, panels.items(), strict=True):
        colours = [colour(method) for method in table.index]
        axis.barh(table.index, table["mean"], xerr=table["standard_error"], color=colours,
                  capsize=3)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    save(figure, path)


def draw_curves(path, panels, x, xlabel, ylabel, lines=None):
    """Draws means with bands of one standard error.

    panels: {title: {method: table with one row per x, and the columns mean and standard_error}};
    x: numbers or names. lines: {label: y} of horizontal lines."""
    are_names = isinstance(x[0], str)
    width = 7 if are_names else 4.4
    figure, axes = new_figure(width * len(panels) + 1.4, 3.8, len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for method, table in curves.items():
            mean = table["mean"].to_numpy()
            error = table["standard_error"].to_numpy()
            axis.plot(x, mean, marker="o", markersize=3, label=method, color=colour(method))
            axis.fill_between(x, mean - error, mean + error, alpha=0.2, color=colour(method),
                              linewidth=0)
        for label, y in (lines or {}).items():
            axis.axhline(y, color="0.5", linestyle="--", label=label)
        axis.set(title=title, xlabel=xlabel)
        if are_names:
            axis.set_xticks(range(len(x)), x, rotation=45, ha="right")
    axes[0].set_ylabel(ylabel)
    add_legend(figure)
    save(figure, path)


def draw_roc(path, panels):
    """Draws ROC curves: how well scores tell correct words from others.

    panels: {title: {name of a score: (is each word correct?, scores)}}."""
    from sklearn.metrics import roc_curve  # slow to import
    figure, axes = new_figure(3 * len(panels) + 1.6, 3.4, len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, (is_correct, scores) in curves.items():
            false_rates, true_rates, _ = roc_curve(is_correct, scores, drop_intermediate=False)
            axis.plot(false_rates, true_rates, label=name, color=colour(name), linewidth=1.3)
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="false positive rate", aspect="equal")
    axes[0].set_ylabel("true positive rate")
    add_legend(figure)
    save(figure, path)


def colour(method):
    """The method's colour, the same in every plot; grey for baselines."""
    return COLOURS.get(method, "0.6")


def new_figure(width, height, panels, share_y=True):
    """A figure of this size in inches, and its axes side by side."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def save(figure, path):
    """Writes the figure as a PNG."""
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        text.set_parse_math(False)      # words may contain dollar signs
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def add_legend(figure):
    """A legend beside the panels, of what the first one shows."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
