"""Images: reading, the preprocessing of torchvision's ImageNet encoders, and augmentation."""
import contextlib
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from tqdm import tqdm

from captioning.errors import InputError
from captioning.files import expect, reading, shortened

with contextlib.suppress(ImportError):      # HEIC, where the package is installed
    import pillow_heif
    pillow_heif.register_heif_opener()
Image.init()
# those whose decoders are Pillow's own: some others run external programs
FORMATS = [name for name in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "HEIF")
           if name in Image.OPEN]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".heic",
            ".heif")
REPLACE = "replace or remove the image"
CONVERT = "pip install pillow-heif, or convert the image"
MEAN = (0.485, 0.456, 0.406)        # of ImageNet
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)         # brightness of red, green and blue


def images_in(folder):
    """The paths of the images in a folder, sorted by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)


def read_image(path, upright=False):
    """Reads an image as uint8 (3, H, W), RGB.

    path: of a file; or a PIL image, or an array of `as_image`. upright: rotate the image as its
    EXIF orientation demands. By default pixels stay in the stored orientation, to which the boxes
    and region features of a data set refer."""
    if isinstance(path, str | os.PathLike):
        is_heic = Path(path).suffix.lower() in (".heic", ".heif")
        remedy = CONVERT if is_heic and "HEIF" not in FORMATS else REPLACE
        with reading(path, remedy), Image.open(path, formats=FORMATS) as image:
            return _as_rgb(image, upright)
    try:
        return _as_rgb(path if isinstance(path, Image.Image) else as_image(path), upright)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the image is no path, PIL image, or array (H, W, 3) of uint8, uint16 or "
                         f"floating-point numbers in [0, 1] ({shortened(error)})") from error


def _as_rgb(image, upright):
    """A PIL image of any mode -> uint8 (3, H, W), as a viewer with a white background shows it."""
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = as_image(np.asarray(image))     # of more than 8 bits, which Pillow would clip
    if image.has_transparency_data:
        # the colours of transparent pixels are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def as_image(array):
    """An array (H, W), or (H, W, C) of 1 to 4 channels, -> PIL image of 8 bits.

    Integers of 8 and 16 bits are scaled by their range, 32 bits as 16 (as Pillow reads 16-bit
    PNGs), floating-point numbers from [0, 1]; ValueError for other arrays."""
    array = np.asarray(array)
    kind = array.dtype.kind
    expect(array.size and (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 2, 3, 4)),
           f"its shape is {array.shape}")
    expect(kind in "uifb", f"its values are of the type {array.dtype}")
    top = 1 if kind in "fb" else 255 if array.dtype.itemsize == 1 else 65535
    expect(np.isfinite(array).all() and array.min() >= 0 and array.max() <= top,
           f"its values are not in [0, {top}]")
    if array.dtype != np.uint8:
        array = np.rint(array.astype(np.float64) * (255 / top)).astype(np.uint8)
    array = array[..., 0] if array.shape[2:] == (1,) else array
    return Image.fromarray(np.ascontiguousarray(array))


def resize(image, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), without keeping the aspect ratio."""
    return interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def normalise(image):
    """uint8 (..., 3, H, W) -> float32, normalised with ImageNet's mean and standard deviation."""
    mean, std = torch.tensor([MEAN, STD], device=image.device)[..., None, None]       # (3, 1, 1)
    return (image / 255 - mean) / std


def preprocess(image, size):
    """uint8 (3, H, W) -> float32 (3, size, size), resized and normalised."""
    return normalise(resize(image, size))


def augment(images, seeds):
    """Applies colour jitter and, with probability 0.5, a flip to images, uint8 (B, 3, H, W).

    Brightness, contrast and saturation are scaled by factors from [0.8, 1.2]; hue is kept, since
    captions name colours. seeds: one random seed per image. Returns the images and a bool mask
    (B,) of those that were flipped."""
    draws = torch.stack([torch.rand(4, generator=torch.Generator().manual_seed(seed))
                         for seed in seeds])
    flipped = draws[:, 0] < 0.5
    factors = 0.8 + 0.4 * draws[:, 1:]
    brightness, contrast, saturation = factors.T[..., None, None, None]         # (B, 1, 1, 1)
    x = images.float() * brightness
    grey = (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)         # (B, 1, H, W)
    x = grey + (x - grey) * saturation
    mean = grey.mean((2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    return x.round_().clamp_(0, 255).to(torch.uint8), flipped


def are_readable(paths, workers):
    """Whether `read_image` can read each path of a list; workers: number of threads."""
    def is_readable(path):
        try:
            read_image(path)
        except InputError:
            return False
        return True
    with ThreadPool(max(1, workers)) as pool:       # decoding releases Python's global lock
        results = pool.imap(is_readable, paths)
        return list(tqdm(results, desc="checking images", total=len(paths), unit="image"))
