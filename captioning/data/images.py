"""Images: reading, the preprocessing of torchvision's ImageNet encoders, and augmentation."""
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from captioning.errors import InputError
from captioning.files import check_file, shortened

# those whose decoders are Pillow's own: some others run external programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet


def read_image(path, upright=False):
    """Reads an image file as uint8 (3, H, W), RGB; raises InputError if it is missing or damaged.

    upright: rotate the image as its EXIF orientation demands. By default pixels stay in the stored orientation, to
    which the boxes and region features of a data set refer.
    """
    try:
        check_file(path)
        with Image.open(path, formats=FORMATS) as image:
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":      # 16-bit grey scale, which PIL would clip
                image = image.point(lambda value: value / 256).convert("L")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise many exception types for damaged files
        raise InputError(f"the image {path} cannot be read ({shortened(error)}): replace it, or omit unreadable images "
                         "with --skip_broken") from error


def _functional():
    """torchvision's functions, imported once they are needed, as that takes as long as importing PyTorch."""
    from torchvision.transforms.v2 import functional
    return functional


def resize(image, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), without keeping the aspect ratio."""
    return _functional().resize(image, [size, size], antialias=True)


def normalise(image):
    """uint8 (..., 3, H, W) -> float32, normalised with ImageNet's mean and standard deviation."""
    T = _functional()
    return T.normalize(T.to_dtype(image, torch.float32, scale=True), MEAN, STD)


def preprocess(image, size):
    """uint8 (3, H, W) -> float32 (3, size, size), resized and normalised."""
    return normalise(resize(image, size))


def augment(images, seeds):
    """Applies colour jitter and, with probability 0.5, a horizontal flip to images, uint8 (B, 3, H, W).

    Brightness, contrast and saturation are scaled by factors from [0.8, 1.2]; hue is kept, since captions name colours.
    seeds: one random seed per image. Returns the images and a bool mask (B,) of those that were flipped.
    """
    draws = torch.stack([torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    flipped = draws[:, 0] < 0.5
    brightness, contrast, saturation = (0.8 + 0.4 * draws[:, 1:]).T[..., None, None, None]     # each (B, 1, 1, 1)
    x = images.float() * brightness
    grey = _functional().rgb_to_grayscale(x)                                           # (B, 1, H, W)
    x = grey + (x - grey) * saturation
    mean = grey.mean((2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    return x.round_().clamp_(0, 255).to(torch.uint8), flipped


def are_readable(paths, workers):
    """Returns for each path of a list whether `read_image` can read it; workers: number of threads."""
    with ThreadPool(max(1, workers)) as pool:   # threads suffice, since decoding releases Python's global lock
        return list(tqdm(pool.imap(_is_readable, paths), desc="checking images", total=len(paths), unit="image"))


def _is_readable(path):
    try:
        read_image(path)
    except InputError:
        return False
    return True
