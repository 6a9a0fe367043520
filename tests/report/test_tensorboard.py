"""--tensorboard: what a run logs, and the message if the package is missing."""
import builtins
import csv

import pytest
from helpers import train_run

from captioning.errors import InputError
from captioning.report import tensorboard


class Writer:
    """Keeps what is logged."""

    def __init__(self):
        self.scalars, self.images = {}, {}

    def add_scalar(self, name, value, epoch):
        self.scalars[name, epoch] = value

    def add_image(self, name, image, epoch, dataformats):
        assert dataformats == "HWC"
        self.images[name, epoch] = image

    def flush(self):
        pass


def test_losses_scores_and_explained_images_of_every_epoch(demo_data, tmp_path, monkeypatch):
    writer = Writer()
    monkeypatch.setattr(tensorboard, "open_writer", lambda folder: writer)
    train_run(demo_data, tmp_path, "--epochs", "2", "--tensorboard")
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    for epoch, row in enumerate(rows, 1):
        for name in ("train_loss", "val_loss", "cider", "bleu_4", "decoder_lr"):
            assert writer.scalars[name, epoch] == pytest.approx(float(row[name]))
    assert {epoch for _, epoch in writer.images} == {1, 2} and len(writer.images) == 2 * tensorboard.EXPLAINED
    assert all(image.ndim == 3 and image.shape[2] == 3 and image.std() > 10 for image in writer.images.values())


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return imported(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install tensorboard"):
        tensorboard.open_writer(tmp_path)
