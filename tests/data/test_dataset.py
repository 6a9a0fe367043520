"""Pictures and prepared splits: what is stored, what a batch holds, and that chance depends on the seed alone."""
import json
import random
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captioning.data import dataset, images, vocabulary
from captioning.data.annotations import Record
from captioning.data.dataset import CaptionDataset, pick_captions
from captioning.data.loader import collate
from captioning.errors import InputError
from captioning.files import write_json

COUNT = 6
SENTENCES = [["the", "dog", "is", "on", "the", "left", "side"], ["right", "cat"], ["a", "bird"]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with one split `train` of the data set `x`: six pictures, one to three sentences each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    records = []
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
        tokens = SENTENCES[:1 + i % 3]
        records.append(Record(f"{i}.png", f"{i}.png", "train", tokens, [" ".join(words) for words in tokens]))
    words = vocabulary.build(SENTENCES, 1)
    write_json(dataset.wordmap_path(folder, "x"), words.wordmap)
    dataset.write_split(dataset.split_path(folder, "x", "train"), records, words, 3, 5, 1, folder / "pictures")
    with h5py.File(dataset.features_path(folder, "x", "train", "stub"), "w") as file:
        file["features"] = rng.standard_normal((COUNT, 4, 3)).astype(np.float16)
        file["done"] = np.ones(COUNT, np.uint8)
        file.attrs["names"] = dataset.fingerprint([record.name for record in records])
    return folder


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of `prepared` to spoil."""
    return shutil.copytree(prepared, tmp_path / "copy")


def epoch_of(data, workers, batches, **options):
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers, **options)
    return list(loader)


def test_captions_and_references(prepared):
    data = CaptionDataset(prepared, "x", "train")
    words = data.vocabulary
    assert len(data) == COUNT and data.names == data.paths == [f"{i}.png" for i in range(COUNT)]
    assert data.references[2] == [" ".join(tokens) for tokens in SENTENCES]
    assert data.captions.shape == (COUNT, 3, 7)
    first = data.captions[2, 0].tolist()
    assert first == words.encode(SENTENCES[0], 5) and len(first) == 7 and first[-1] == words.end, "cut to five words"
    assert words.decode(data.captions[2, 1, 1:].tolist()) == ["right", "cat"]
    assert data.captions[2, 2].tolist() == [*words.encode(["a", "bird"], 5), 0, 0, 0]


def test_missing_captions_are_drawn_with_the_seed():
    four = list("abcd")
    picked = pick_captions(four, 5, random.Random("1 x"))
    assert picked[:4] == four and picked[4] in four
    assert picked == pick_captions(four, 5, random.Random("1 x"))
    assert len({pick_captions(four, 5, random.Random(f"{seed} x"))[4] for seed in range(40)}) == 4
    seven = pick_captions(list("abcdefg"), 5, random.Random("1 x"))
    assert len(set(seven)) == 5
    assert pick_captions(four, 4, random.Random(0)) == four


def test_the_same_file_again(prepared, tmp_path):
    first = CaptionDataset(prepared, "x", "train")
    records = [Record(name, name, "train", [text.split() for text in texts], texts)
               for name, texts in zip(first.names, first.references, strict=True)]
    files = []
    for seed, some in ((1, records), (1, records[1:]), (2, records)):
        path = tmp_path / f"{len(files)}.hdf5"
        dataset.write_split(path, some, first.vocabulary, 3, 5, seed, None)
        with h5py.File(path) as file:
            files.append(file["captions"][:])
    assert np.array_equal(files[0], first.captions)
    assert np.array_equal(files[0][1:], files[1]), "a picture left out changes no other's captions"
    assert not np.array_equal(files[0], files[2])


def test_batches_of_features(prepared):
    path = dataset.features_path(prepared, "x", "train", "stub")
    data = CaptionDataset(prepared, "x", "train", features=path)
    with h5py.File(path) as file:
        features = torch.from_numpy(file["features"][:]).float()
    batch = data.__getitems__([4, 0, 3, 0])
    assert torch.equal(batch["images"], features[[4, 0, 3, 0]]) and batch["images"].dtype == torch.float32
    assert torch.equal(batch["index"], torch.tensor([4, 0, 3, 0])) and batch["captions"].dtype == torch.int64
    assert torch.equal(data.__getitems__([1])["captions"], data.captions[[1]].long())


def test_captions_are_trimmed_to_the_longest_of_the_batch(tmp_path):
    words = vocabulary.build(SENTENCES, 1)
    records = [Record(name, name, "val", [tokens], ["x"]) for name, tokens in (("a", ["cat"]), ("b", ["a", "bird"]))]
    write_json(dataset.wordmap_path(tmp_path, "x"), words.wordmap)
    dataset.write_split(dataset.split_path(tmp_path, "x", "val"), records, words, 2, 9, 1, None)
    data = CaptionDataset(tmp_path, "x", "val")
    data.read_pictures = lambda indices, captions: None
    assert data.captions.shape == (2, 2, 11)
    assert data.__getitems__([0])["captions"].shape == (1, 2, 3)
    assert data.__getitems__([0, 1])["captions"].shape == (2, 2, 4)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_features_though_the_file_is_open_here(prepared, method):
    data = CaptionDataset(prepared, "x", "train", features=dataset.features_path(prepared, "x", "train", "stub"))
    here = [data.__getitems__(batch)["images"] for batch in ([0, 5], [2, 1])]
    there = epoch_of(data, 1, [[0, 5], [2, 1]], multiprocessing_context=method)
    assert all(torch.equal(one, other["images"]) for one, other in zip(here, there, strict=True))


def test_batches_of_pictures(prepared):
    data = CaptionDataset(prepared, "x", "train", image_size=16)
    batch = data.__getitems__([3, 1])
    assert batch["images"].shape == (2, 3, 16, 16) and batch["images"].dtype == torch.float32
    expected = images.preprocess(images.read_image(prepared / "pictures" / "3.png"), 16)
    assert torch.equal(batch["images"][0], expected)


def test_augmentation_depends_on_seed_epoch_and_picture_alone(prepared):
    data = CaptionDataset(prepared, "x", "train", image_size=16, augment=True)
    batches = [[0, 1, 2], [3, 4, 5]]

    def pictures(workers, epoch, batches=batches):
        data.set_epoch(epoch)
        torch.manual_seed(workers)      # the global generators play no part
        found = epoch_of(data, workers, batches)
        return torch.cat([batch["images"] for batch in found]), [row for batch in found for row in batch["captions"]]

    here, captions = pictures(0, epoch=1)
    there, captions_there = pictures(2, epoch=1)
    assert torch.equal(here, there)
    assert all(torch.equal(one, other) for one, other in zip(captions, captions_there, strict=True))
    alone, _ = pictures(0, epoch=1, batches=[[5], [2]])
    assert torch.equal(alone, here[[5, 2]])
    assert not torch.equal(here, pictures(0, epoch=2)[0])
    other = CaptionDataset(prepared, "x", "train", image_size=16, augment=True, seed=2)
    other.set_epoch(1)
    assert not torch.equal(here[:3], other.__getitems__([0, 1, 2])["images"])


def test_captions_drawn_anew_each_epoch(prepared):
    path = dataset.features_path(prepared, "x", "train", "stub")
    data = CaptionDataset(prepared, "x", "train", features=path, captions_per_step=2)
    seen = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        drawn = data.__getitems__([2])["captions"]
        alone = epoch_of(data, 1, [[5, 2]])[0]["captions"][1:, :, :drawn.shape[2]]
        assert drawn.shape[:2] == (1, 2) and torch.equal(drawn, alone)
        rows = [row.tolist() for row in torch.nn.functional.pad(drawn[0], (0, 7 - drawn.shape[2]))]
        stored = data.captions[2].tolist()
        seen.add(tuple(stored.index(row) for row in rows))
    assert all(one != other for one, other in seen) and {i for pair in seen for i in pair} == {0, 1, 2}


def test_a_flipped_picture_has_left_and_right_swapped(prepared):
    plain = CaptionDataset(prepared, "x", "train", image_size=16)
    data = CaptionDataset(prepared, "x", "train", image_size=16, augment=True)
    left, right = (data.vocabulary.wordmap[word] for word in ("left", "right"))
    seen = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        batch, original = data.__getitems__([2, 5]), plain.__getitems__([2, 5])
        for x, y, row, unchanged in zip(batch["images"], original["images"], batch["captions"], original["captions"],
                                        strict=True):
            # the jitter moves brightness, contrast and saturation but not what is where
            alike = torch.corrcoef(torch.stack([x.mean(0), y.mean(0), y.mean(0).flip(-1)]).flatten(1))[0, 1:]
            assert alike.max() > 0.9 > 0.5 > alike.min()
            flipped = bool(alike[1] > alike[0])
            swapped = torch.where(unchanged == left, right, torch.where(unchanged == right, left, unchanged))
            assert torch.equal(row, swapped if flipped else unchanged)
            seen.add(flipped)
    assert seen == {True, False}
    assert torch.equal(data.captions, plain.captions), "the stored captions stay as they are"


def spoil_hdf5(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace(name, value):
    def change(file):
        del file[name]
        if value is not None:
            file[name] = value
    return change


@pytest.mark.parametrize(("change", "named"), [
    (replace("captions", None), "no dataset 'captions'"),
    (replace("captions", np.zeros((COUNT, 7), np.int32)), "damaged"),
    (replace("captions", np.zeros((COUNT - 1, 3, 7), np.int32)), "do not fit"),
    (replace("captions", np.full((COUNT, 3, 7), 999, np.int32)), "do not fit"),
    (replace("captions", np.full((COUNT, 3, 7), -1, np.int32)), "do not fit"),
    (replace("captions", np.zeros((0, 3, 7), np.int32)), "empty"),
    (replace("names", np.arange(COUNT)), "damaged"),
    (replace("references", ["no json"] * COUNT), "damaged"),
    (replace("references", ["[]"] * COUNT), "do not fit"),
    (replace("references", ["[5]"] * COUNT), "do not fit"),
    (replace("paths", ["../x.png"] * COUNT), "leaves the image folder"),
    (lambda file: file.attrs.__delitem__("wordmap"), "damaged"),
    (lambda file: file.attrs.__setitem__("wordmap", "of other words"), "not the word map"),
])
def test_spoilt_split(copied, change, named):
    path = dataset.split_path(copied, "x", "train")
    spoil_hdf5(path, change)
    with pytest.raises(InputError, match=named):
        CaptionDataset(copied, "x", "train")


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize("which", ["split", "features"])
def test_truncated_hdf5(copied, which, share):
    features = dataset.features_path(copied, "x", "train", "stub")
    path = dataset.split_path(copied, "x", "train") if which == "split" else features
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=path.name):
        CaptionDataset(copied, "x", "train", features=features)


@pytest.mark.parametrize(("change", "named"), [
    (replace("features", None), "no dataset 'features'"),
    (replace("features", np.zeros((COUNT - 1, 4, 3), np.float16)), "holds no features"),
    (replace("features", np.zeros((COUNT, 4), np.float16)), "holds no features"),
    (lambda file: file.attrs.__setitem__("names", "others"), "other pictures"),
])
def test_spoilt_features(copied, change, named):
    path = dataset.features_path(copied, "x", "train", "stub")
    spoil_hdf5(path, change)
    with pytest.raises(InputError, match=named):
        CaptionDataset(copied, "x", "train", features=path)


def test_missing_files(copied):
    with pytest.raises(InputError, match=r"val_x\.hdf5"):
        CaptionDataset(copied, "x", "val")
    with pytest.raises(InputError, match=r"features_no_train_x\.hdf5"):
        CaptionDataset(copied, "x", "train", features=dataset.features_path(copied, "x", "train", "no"))
    (copied / "x" / "wordmap_x.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(InputError, match=r"wordmap_x\.json"):
        CaptionDataset(copied, "x", "train")


def test_pictures_that_are_gone(prepared, copied):
    spoil_hdf5(dataset.split_path(copied, "x", "train"),
               lambda file: file.attrs.__setitem__("image_folder", str(copied / "pictures")))
    data = CaptionDataset(copied, "x", "train", image_size=16)
    (copied / "pictures" / "3.png").write_bytes((prepared / "pictures" / "3.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"3\.png") as error:
        epoch_of(data, 1, [[3]])
    assert "\n" not in str(error.value), "one sentence, though it comes from a worker"
    (copied / "pictures" / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png"):
        CaptionDataset(copied, "x", "train", image_size=16)
    spoil_hdf5(dataset.split_path(copied, "x", "train"), lambda file: file.attrs.__setitem__("image_folder", ""))
    with pytest.raises(InputError, match="--image_folder"):
        CaptionDataset(copied, "x", "train", image_size=16)


RAMP = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)


@pytest.mark.parametrize(("mode", "ending"), [("L", "png"), ("P", "png"), ("CMYK", "tif"), ("RGBA", "png"),
                                              ("LA", "png"), ("YCbCr", "tif"), ("RGB", "bmp")])
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    grey = Image.fromarray(RAMP)
    (grey if mode == "P" else grey.convert("RGB")).convert(mode).save(path)
    assert Image.open(path).mode == mode
    picture = images.read_image(path)
    assert picture.shape == (3, 12, 16) and picture.dtype == torch.uint8
    assert (picture.int() - torch.from_numpy(RAMP).int()).abs().max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "x.png")
    picture = images.read_image(tmp_path / "x.png")
    assert (picture.int() - torch.from_numpy(RAMP).int()).abs().max() <= 1


def test_exif_rotation_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6    # "rotate by 90 degrees"
    Image.fromarray(RAMP).convert("RGB").save(tmp_path / "x.jpg", exif=exif)
    assert images.read_image(tmp_path / "x.jpg").shape == (3, 12, 16)


def make_broken(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind.startswith("truncated"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=kind.split()[1])
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated JPEG", "truncated PNG",
                                  "truncated GIF", "truncated BMP", "truncated TIFF"])
def test_broken_pictures_are_named(tmp_path, kind):
    path = make_broken(kind, tmp_path / "broken.jpg")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        images.read_image(path)
    Image.fromarray(RAMP).save(tmp_path / "sound.png")
    assert images.are_sound([path, tmp_path / "sound.png"], 2) == [False, True]


def test_preprocess_is_torchvisions(tmp_path):
    from torchvision.transforms import v2
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 30, 50), dtype=np.uint8))
    reference = v2.Compose([v2.Resize([16, 16], antialias=True), v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    assert torch.allclose(images.preprocess(picture, 16), reference(picture), atol=1e-6)
