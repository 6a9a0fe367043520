"""The log of a training run: log.csv and curves.png."""
import csv
import io
from pathlib import Path

from captioning.files import atomic_path, write_text


def columns(measure="accuracy"):
    return ("epoch", "step", "train_loss", f"train_{measure}", "cider", "bleu_4", "decoder_lr", "seconds")


def write_log(folder, rows, measure="accuracy"):
    """Writes log.csv and curves.png; rows: a list of values, those of `columns`, for every epoch so far."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns(measure), *rows])
    write_text(Path(folder) / "log.csv", text.getvalue())
    draw_curves(Path(folder) / "curves.png", rows)


def draw_curves(path, rows):
    """Training loss on the left, the validation captions' CIDEr and BLEU-4 on the right, against the epochs."""
    from matplotlib.figure import Figure
    epochs, _, loss, _, cider, bleu, *_ = zip(*rows, strict=True)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, loss, marker="o", markersize=3)
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
