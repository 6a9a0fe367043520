"""The log of a training run: log.csv and curves.png."""
import math
from pathlib import Path

import pandas as pd

from captioning.files import atomic_path, write_text


def columns(measure="accuracy"):
    """The columns of log.csv; measure: "accuracy", or "reward" for self-critical training."""
    return ["epoch", "step", "train_loss", f"train_{measure}", "cider", "bleu_4", "decoder_lr",
            "seconds", "val_loss"]


def write_log(folder, rows, measure="accuracy", region_epochs=0):
    """Writes curves.png and log.csv, unless they contain these rows already.

    rows: one list per epoch, the values of `columns`, of earlier versions without the last."""
    names = columns(measure)
    rows = [[*row, *[math.nan] * (len(names) - len(row))] for row in rows]
    table = pd.DataFrame(rows, columns=names)
    text = table.to_csv(index=False, na_rep="nan", lineterminator="\n")
    path = Path(folder) / "log.csv"
    curves = Path(folder) / "curves.png"
    is_written = path.is_file() and path.read_bytes() == text.encode()
    if not (is_written and curves.is_file()):
        draw_training_curves(curves, table.set_index("epoch"), measure, region_epochs)
        write_text(path, text)      # last, as it tells that the curves are those of rows


def draw_training_curves(path, table, measure, region_epochs):
    """Plots the losses (left), and CIDEr and BLEU-4 of the validation captions (right).

    The first `region_epochs` epochs, on the region loss alone, are a shaded phase with a line of
    their own. The epoch of checkpoint_best.pth is marked."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    style = {"marker": "o", "markersize": 3}

    # the loss of self-critical training is another quantity than the validation loss
    is_reward = measure == "reward"
    label = "self-critical loss, training" if is_reward else "training"
    phases = ((left, "C2", "region loss, training", table.loc[:region_epochs]),
              (left.twinx() if is_reward else left, "C0", label, table.loc[region_epochs + 1:]))
    for axes, colour, name, epochs in phases:
        if len(epochs):
            axes.plot(epochs["train_loss"], color=colour, label=name, **style)
    left.plot(table["val_loss"], color="C1", label="validation", **style)
    left.set(title="loss per word", xlabel="epoch")

    right.plot(table["cider"], label="CIDEr", **style)
    right.plot(table["bleu_4"], label="BLEU-4", **style)
    best = table["cider"].idxmax()
    right.axvline(best, color="0.5", linestyle=":", label=f"best: epoch {best}")
    right.set(title="validation captions", xlabel="epoch", ylim=(0, None))

    for axes in (left, right):
        if len(table.loc[:region_epochs]):
            axes.axvspan(table.index[0] - 0.5, region_epochs + 0.5, color="0.9", zorder=0,
                         label="phase of the region loss")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        # one legend for the axes and its twin
        same_place = [other for other in figure.axes if other.bbox.bounds == axes.bbox.bounds]
        lines = [other.get_legend_handles_labels()[0] for other in same_place]
        axes.legend(handles=sum(lines, []), fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
