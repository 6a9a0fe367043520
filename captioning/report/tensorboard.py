"""A training run in TensorBoard: --tensorboard of train.py and finetune.py."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioning import checkpoint
from captioning.data.images import preprocess, read_image
from captioning.errors import InputError
from captioning.explanation.arrays import captions_to_explain, explain_batch
from captioning.explanation.methods import SPLIT
from captioning.report.heatmaps import draw_heatmaps

EXPLAINED = 4       # validation images


def open_writer(folder):
    """A SummaryWriter of TensorBoard; InputError if the package tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard, or omit the flag"
                         ) from error
    return SummaryWriter(folder)


def epoch_logger(folder, model, vocabulary, data, device):
    """The function `on_epoch` of captioning.training.loop.fit that logs to `folder`/tensorboard: the columns of
    log.csv, and the LRP explanations of the first validation images of `data` if the model has an encoder and the data
    set an image folder."""
    writer = open_writer(Path(folder, "tensorboard"))
    paths = data.paths[:EXPLAINED] if model.encoder is not None and data.image_folder else []

    def log(row):
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        images = [read_image(Path(data.image_folder, path)) for path in paths]
        for path, sheet in zip(paths, _explained(model, vocabulary, images, device), strict=True):
            writer.add_image(path, sheet, row["epoch"], dataformats="HWC")
        writer.flush()
    return log


def _explained(model, vocabulary, images, device):
    """The drawn LRP explanation (H, W, 3), uint8, of each image (3, h, w)."""
    if not images:
        return []
    inputs = torch.stack([preprocess(image, checkpoint.image_size(model)) for image in images]).to(device)
    captions = captions_to_explain(model, vocabulary, inputs, None, {"method": "greedy"})
    sheets = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lrp.png")
        for image, arrays in zip(images, explain_batch(model, vocabulary, inputs, captions, ["lrp"]), strict=True):
            words = arrays["words"].tolist()[1:]
            split = {part: arrays[f"lrp_{part}"] for part in SPLIT}
            draw_heatmaps(path, image.permute(1, 2, 0).numpy(), words, arrays["lrp_pixels"], " ".join(words), "lrp",
                          split=split)
            with Image.open(path) as sheet:
                sheets.append(np.array(sheet.convert("RGB")))
    return sheets
