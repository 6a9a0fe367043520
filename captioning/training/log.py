"""The log of a training run: log.csv and curves.png."""
import csv
import io
from pathlib import Path

from captioning.files import atomic_path, write_text


def columns(measure="accuracy"):
    """The columns of log.csv; measure: "accuracy", or "reward" for self-critical training."""
    return ("epoch", "step", "train_loss", f"train_{measure}", "cider", "bleu_4", "decoder_lr", "seconds")


def write_log(folder, rows, measure="accuracy", region_epochs=0):
    """Writes log.csv and curves.png; rows: one list per epoch, the values of `columns`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns(measure), *rows])
    write_text(Path(folder) / "log.csv", text.getvalue())
    draw_training_curves(Path(folder) / "curves.png", rows, region_epochs)


def draw_training_curves(path, rows, region_epochs=0):
    """Plots the training loss (left) and CIDEr and BLEU-4 of the validation captions (right) against the epoch.

    The loss of the first `region_epochs` epochs, which train on the region loss alone, is a line of its own."""
    from matplotlib.figure import Figure
    epochs, _, loss, _, cider, bleu, *_ = zip(*rows, strict=True)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    with_regions = sum(epoch <= region_epochs for epoch in epochs)
    if with_regions:
        left.plot(epochs[:with_regions], loss[:with_regions], marker="o", markersize=3, color="C2", label="region loss")
    if with_regions < len(epochs):
        left.plot(epochs[with_regions:], loss[with_regions:], marker="o", markersize=3, color="C0",
                  label="caption loss")
    if with_regions:
        left.legend()
    left.set(title="training loss", xlabel="epoch")
    right.plot(epochs, cider, marker="o", markersize=3, label="CIDEr")
    right.plot(epochs, bleu, marker="o", markersize=3, label="BLEU-4")
    right.set(title="validation captions", xlabel="epoch", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
