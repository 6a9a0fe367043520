"""Images: reading in all modes and orientations, errors, and preprocessing."""
import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from torchvision.transforms import v2

from captioning.data import dataset, images, vocabulary
from captioning.data.annotations import Record
from captioning.data.dataset import CaptionDataset
from captioning.files import write_json

RAMP = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)


@pytest.mark.parametrize(("mode", "ending"), [
    ("L", "png"), ("P", "png"), ("CMYK", "tif"), ("RGBA", "png"), ("LA", "png"), ("YCbCr", "tif"),
    ("RGB", "bmp")])
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    grey = Image.fromarray(RAMP)
    (grey if mode == "P" else grey.convert("RGB")).convert(mode).save(path)
    if mode == "YCbCr" and Image.open(path).mode == "RGB":
        pytest.skip("this version of Pillow stores YCbCr as RGB")
    assert Image.open(path).mode == mode
    image = images.read_image(path)
    assert image.shape == (3, 12, 16) and image.dtype == torch.uint8
    assert (image.int() - torch.from_numpy(RAMP).int()).abs().max() <= 3


ROWS = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize("image", [
    RAMP, ROWS, ROWS.astype(">u2"), RAMP / 255, (RAMP / 255).astype(np.float32)[..., None],
    RAMP[..., None].repeat(3, 2), Image.fromarray(ROWS), Image.fromarray(RAMP / np.float32(255)),
    "big_endian.tif", "x.png"], ids=lambda image: type(image).__name__)
def test_every_entry_reads_images_of_more_than_8_bits_alike(tmp_path, monkeypatch, image):
    """Files, PIL images and arrays; Pillow alone would clip 16 bits."""
    monkeypatch.chdir(tmp_path)
    twin = Image.fromarray(ROWS)
    twin.save("x.png")
    stored = twin.tobytes("raw", "I;16B")
    Image.frombytes("I;16B", twin.size, stored).save("big_endian.tif")
    read = images.read_image(image)
    assert read.shape == (3, *RAMP.shape) and read.dtype == torch.uint8
    assert (read.int() - torch.from_numpy(RAMP).int()).abs().max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Viewers show neither the colours below full transparency nor those of a palette's entry."""
    pixels = np.full((12, 16, 4), 200, np.uint8)
    pixels[:, 4:, 3] = 0
    pixels[:, :4, 3] = 255
    picture = Image.fromarray(pixels)
    if mode == "P":
        palette = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8)).convert("P")
        palette.putpalette([200, 200, 200, 10, 20, 30])
        palette.save(tmp_path / "x.png", transparency=1)
    else:
        picture.convert(mode).save(tmp_path / "x.png")
    for image in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        read = images.read_image(image)
        assert (read[..., :4] == 200).all() and (read[..., 4:] == 255).all()


def test_avif_is_read(tmp_path):
    """HEIC as well, where pillow-heif is installed."""
    for ending in ("avif", "heic"):
        if ending.upper().replace("HEIC", "HEIF") in images.FORMATS:
            Image.fromarray(RAMP).convert("RGB").save(tmp_path / f"x.{ending}", quality=95)
            read = images.read_image(tmp_path / f"x.{ending}")
            assert (read.int() - torch.from_numpy(RAMP).int()).abs().float().mean() < 8


@pytest.mark.parametrize("image", [
    None, b"bytes", 5, torch.zeros(3, 40, 40), np.zeros((0, 3)), np.zeros((4, 4, 5)),
    np.full((4, 4, 3), 2.0), np.full((4, 4), np.nan), np.full((4, 4), -1), np.array(["a"]),
    torch.zeros(4, 4, 3, requires_grad=True)], ids=str)
def test_what_is_no_image_is_refused(image):
    with refused("the image is no path, PIL image, or array"):
        images.read_image(image)


def write_rotated(path):
    """Writes a portrait image as cameras do: stored in landscape format, 12×16, with EXIF
    orientation 6, which demands a clockwise rotation by 90°. Its stored left half is white."""
    pixels = np.zeros((12, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def test_upright_follows_exif_orientation(tmp_path):
    write_rotated(tmp_path / "x.jpg")
    upright = images.read_image(tmp_path / "x.jpg", upright=True)
    assert upright.shape == (3, 16, 12)
    assert upright[:, :7].min() > 200 and upright[:, 9:].max() < 50, "stored left half on top"
    stored = images.read_image(tmp_path / "x.jpg")      # the stored orientation is the default
    assert stored.shape == (3, 12, 16)
    assert stored[..., :7].min() > 200 and stored[..., 9:].max() < 50


def test_data_sets_keep_the_stored_orientation(tmp_path):
    """Boxes and region features refer to it."""
    write_rotated(tmp_path / "x.jpg")
    words = vocabulary.build([["a"]], 1)
    write_json(dataset.wordmap_path(tmp_path, "x"), words.wordmap)
    records = [Record("x.jpg", "x.jpg", "test", [["a"]], ["a"])]
    dataset.write_split(dataset.split_path(tmp_path, "x", "test"), records, words, 1, 5, 1,
                        tmp_path)
    batch = CaptionDataset(tmp_path, "x", "test", image_size=16).__getitems__([0])
    stored = images.preprocess(images.read_image(tmp_path / "x.jpg", upright=False), 16)
    assert torch.equal(batch["images"][0], stored)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "JPEG", "PNG", "GIF",
                                  "BMP", "TIFF"])
def test_broken_images_are_named(tmp_path, kind):
    """Formats: of truncated images."""
    path = tmp_path / "broken.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind != "missing":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=kind)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with refused(r"broken\.jpg"):
        images.read_image(path)
    Image.fromarray(RAMP).save(tmp_path / "valid.png")
    assert images.are_readable([path, tmp_path / "valid.png"], 2) == [False, True]


def test_preprocess_equals_torchvision():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 30, 50), dtype=np.uint8))
    reference = v2.Compose([v2.Resize([16, 16], antialias=True),
                            v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    assert torch.allclose(images.preprocess(image, 16), reference(image), atol=1e-6)


def test_heic_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FORMATS", [name for name in images.FORMATS if name != "HEIF"])
    path = tmp_path / "a.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic")
    with refused("a.HEIC is damaged .*: pip install pillow-heif, or"):
        images.read_image(path)
