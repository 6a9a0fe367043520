"""Computes the CNN features of all images of a split once and stores them."""
from functools import partial

import torch

from captioning.data import images
from captioning.data.feature_store import store_of_images, weights_fingerprint
from captioning.device import amp_dtype, autocast, supports_amp


def store(path, records, image_folder, encoder, name, size, batch_size, workers, device, amp=False):
    """Stores the features (N, K, C) of the records' images in the HDF5 file `path`, row by row.

    encoder: module from images (B, 3, size, size) to features (B, C, h, w), K = h·w. amp: compute
    in mixed precision, where the device supports it."""
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    precision = amp_dtype(device) if amp and supports_amp(device) else torch.float32
    attributes = {"encoder": name, "weights": weights_fingerprint(encoder), "size": size,
                  "precision": str(precision)}

    @torch.inference_mode()
    def encode(pixels):
        with autocast(device, amp):
            features = encoder(pixels.to(device)).flatten(2).transpose(1, 2)           # (B, K, C)
        return {"features": features.half().cpu().numpy()}

    shape = encode(torch.zeros(1, 3, size, size))["features"].shape[1:]
    store_of_images(path, records, image_folder, shape, attributes, encode,
                    partial(prepare, size=size), batch_size, workers, device)


def prepare(batch, size):
    return images.normalise(torch.stack([images.resize(image, size) for image in batch]))
