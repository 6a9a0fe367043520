"""Pictures: reading, preprocessing as torchvision's encoders expect it, and augmentation."""
from multiprocessing.pool import ThreadPool

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as T
from tqdm import tqdm

from captioning.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's


def read_image(path, upright=False):
    """The image as uint8 (3, H, W), RGB. InputError if it is missing or broken.

    upright: rotates it as its EXIF orientation says, as image viewers do; by default pixels stay as stored, which is
    the orientation that the boxes and features of a data set refer to.
    """
    try:
        with Image.open(path) as image:
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":      # 16-bit grey: PIL would clip it
                image = image.point(lambda value: value / 256).convert("L")
            return T.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InputError(f"the image {path} cannot be read ({reason}): replace it, or leave broken ones out with "
                         "--skip_broken") from error


def resize(image, size):
    """uint8 (3, H, W) -> (3, size, size), both sides alike stretched."""
    return T.resize(image, [size, size], antialias=True)


def normalise(image):
    """uint8 (..., 3, H, W) -> float32, by ImageNet's mean and standard deviation."""
    return T.normalize(T.to_dtype(image, torch.float32, scale=True), MEAN, STD)


def preprocess(image, size):
    """uint8 (3, H, W) -> float32 (3, size, size), normalised."""
    return normalise(resize(image, size))


def augment(pictures, seeds):
    """Colour jitter and, half the time, a horizontal flip of uint8 (B, 3, H, W), each by its own seed.

    Brightness, contrast and saturation change by up to a fifth; hues stay, since captions name colours. Returns the
    pictures and which of them were flipped, (B,) bool.
    """
    draws = torch.stack([torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    flipped = draws[:, 0] < 0.5
    brightness, contrast, saturation = (0.8 + 0.4 * draws[:, 1:]).T[..., None, None, None]     # each (B, 1, 1, 1)
    x = pictures.float() * brightness
    grey = T.rgb_to_grayscale(x)                                                       # (B, 1, H, W)
    x = grey + (x - grey) * saturation
    mean = grey.mean((2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    return x.round_().clamp_(0, 255).to(torch.uint8), flipped


def are_sound(paths, workers):
    """Whether read_image can read each of the pictures, a list."""
    with ThreadPool(max(1, workers)) as pool:   # decoding runs outside Python's lock
        return list(tqdm(pool.imap(_is_sound, paths), desc="checking", total=len(paths), unit="picture"))


def _is_sound(path):
    try:
        read_image(path)
    except InputError:
        return False
    return True
