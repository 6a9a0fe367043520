"""Pictures: reading, preprocessing as torchvision's encoders expect it, and augmentation."""
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as T

from captioning.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's


def read_image(path):
    """The picture as uint8 (3, H, W), RGB, in the frame it is stored in. InputError if it is missing or broken."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or image.mode == "I":      # 16-bit grey: PIL would clip it
                image = image.point(lambda value: value / 256).convert("L")
            return T.pil_to_tensor(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InputError(f"the picture {path} cannot be read ({reason}): replace it, or leave broken ones out with "
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


def augment(image, generator):
    """Colour jitter and, half the time, a horizontal flip of uint8 (3, H, W) -> (image, whether it was flipped).

    Brightness, contrast and saturation change by up to a fifth; hues stay, since captions name colours.
    """
    flip, brightness, contrast, saturation = torch.rand(4, generator=generator).tolist()
    image = T.adjust_brightness(image, 0.8 + 0.4 * brightness)
    image = T.adjust_contrast(image, 0.8 + 0.4 * contrast)
    image = T.adjust_saturation(image, 0.8 + 0.4 * saturation)
    return (T.horizontal_flip(image), True) if flip < 0.5 else (image, False)


def is_sound(path):
    """Whether read_image can read the picture."""
    try:
        read_image(path)
    except InputError:
        return False
    return True
