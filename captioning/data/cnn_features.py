"""Computes the CNN features of all images of a split once and stores them."""
from pathlib import Path

import torch

from captioning.data import images
from captioning.data.feature_store import Store, file_size, weights_fingerprint
from captioning.device import amp_dtype, autocast, supports_amp
from captioning.files import fingerprint


class ImageBatches:
    """Images of a folder by the batch: float32 (B, 3, S, S), normalised."""

    def __init__(self, folder, paths, size):
        self.folder, self.paths, self.size = folder, paths, size

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, indices):
        batch = [images.resize(images.read_image(Path(self.folder, self.paths[i])), self.size) for i in indices]
        return images.normalise(torch.stack(batch))


def store_cnn(path, records, image_folder, encoder, name, size, batch_size, workers, device, amp=False,
              dtype="float16"):
    """Stores the features (N, K, C) of the records' images in the HDF5 file `path`; resumes an interrupted run.

    Args:
        encoder: module from images (B, 3, size, size) to features (B, C, h, w); K = h·w, row by row.
        name: the encoder's name, stored with the features.
        amp: compute in mixed precision, where the device supports it.
        dtype: "float16", or "uint8" for `quantised` features.
    """
    attributes = {"encoder": name, "weights": weights_fingerprint(encoder), "size": size,
                  "names": fingerprint([record.name for record in records]),
                  "precision": str(amp_dtype(device) if amp and supports_amp(device) else torch.float32)}
    marks = [1 + file_size(Path(image_folder, record.path)) for record in records]
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    data = ImageBatches(image_folder, [record.path for record in records], size)
    with torch.inference_mode():
        C, h, w = encoder(torch.zeros(1, 3, size, size, device=device)).shape[1:]

    def encode(pixels):
        with torch.inference_mode(), autocast(device, amp):
            features = encoder(pixels.to(device)).flatten(2).transpose(1, 2)           # (B, K, C)
            arrays = quantised(features) if dtype == "uint8" else {"features": features.half()}
        return {name: values.cpu().numpy() for name, values in arrays.items()}
    with Store(path, marks, (h * w, C), attributes, dtype=dtype) as store:
        store.fill(encode, data, batch_size, workers, device)


def quantised(features):
    """Non-negative features (B, K, C) -> {"features": uint8 (B, K, C), "scales": (B,)}: rounded to multiples of a scale
    per image, 1/255 of its largest feature."""
    scales = features.float().amax((1, 2)).clamp(min=torch.finfo(torch.float).tiny) / 255
    return {"features": (features / scales[:, None, None]).round().byte(), "scales": scales}
