"""Stored features: their values, resumption after interruptions, bottom-up features, and checks against a model."""
import base64
import fcntl
import os
import signal
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from captioning.data import bottom_up, dataset, feature_store, images, vocabulary
from captioning.data.annotations import Record
from captioning.data.cnn_features import store_cnn
from captioning.data.feature_store import Store
from captioning.errors import InputError
from captioning.files import write_json
from gridTDmodel import GridTDModel

COUNT, SIZE = 7, 16


def stub(seed=0):
    """A small random encoder: (B, 3, 16, 16) -> (B, 5, 4, 4)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.ReLU())


class Counting(nn.Sequential):
    """The stub, with a counter of images; raises KeyboardInterrupt after `stop_after` batches."""

    def __init__(self, stop_after=10**9):
        super().__init__(*stub())
        self.images, self.calls, self.stop_after = 0, 0, stop_after

    def forward(self, x):
        if self.calls > self.stop_after:    # the first call determines the shape
            raise KeyboardInterrupt
        self.calls, self.images = self.calls + 1, self.images + len(x) * (self.calls > 0)
        return super().forward(x)


def make_images(folder, names):
    """Writes random images and returns their Records."""
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return [Record(name, name, "train", [["a"]], ["a"]) for name in names]


@pytest.fixture
def records(tmp_path):
    return make_images(tmp_path, [f"{i}.png" for i in range(COUNT)])


def store_stub(folder, records, encoder=None, name="out.hdf5", size=SIZE, workers=0):
    store_cnn(folder / name, records, folder, encoder or stub(), "stub", size, 2, workers, torch.device("cpu"))
    return folder / name


def read_file(path):
    """Datasets and attributes of an HDF5 file."""
    with h5py.File(path) as file:
        return {name: file[name][:] for name in file} | {name: str(value) for name, value in file.attrs.items()}


def test_values_of_features(tmp_path, records):
    file = read_file(store_stub(tmp_path, records))
    assert file["features"].shape == (COUNT, 16, 5) and file["features"].dtype == np.float16
    assert file["done"].all() and not (tmp_path / "out.hdf5.partial").exists()
    with torch.inference_mode():
        image = images.preprocess(images.read_image(tmp_path / "5.png"), SIZE)
        expected = stub()(image[None])[0]         # (5, 4, 4)
    assert np.allclose(file["features"][5, 4 * 1 + 3], expected[:, 1, 3], atol=2e-3)


def test_features_do_not_depend_on_workers(tmp_path, records):
    single, parallel = store_stub(tmp_path, records), store_stub(tmp_path, records, name="other.hdf5", workers=2)
    assert single.read_bytes() == parallel.read_bytes()


def test_complete_file_is_kept(tmp_path, records, capsys):
    path = store_stub(tmp_path, records)
    before = path.stat()
    encoder = Counting()
    store_stub(tmp_path, records, encoder)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and encoder.images == 0
    assert "already complete" in capsys.readouterr().out


def test_features_in_mixed_precision(tmp_path, records, monkeypatch):
    """Values are close to those in float32, and a file in another precision is regenerated."""
    monkeypatch.setattr("captioning.device.supports_amp", lambda device: True)
    monkeypatch.setattr("captioning.data.cnn_features.supports_amp", lambda device: True)
    single = read_file(store_stub(tmp_path, records))
    store_cnn(tmp_path / "out.hdf5", records, tmp_path, stub(), "stub", SIZE, 2, 0, torch.device("cpu"), amp=True)
    mixed = read_file(tmp_path / "out.hdf5")
    assert single["precision"] == "torch.float32" and mixed["precision"] == "torch.bfloat16"
    assert not np.array_equal(mixed["features"], single["features"])
    assert np.allclose(mixed["features"], single["features"], rtol=0.02, atol=0.02)


def test_features_of_8_bits(tmp_path, records):
    """They differ by half a step of 1/255 of the image's largest feature, and take the place of a file of float16."""
    single = read_file(store_stub(tmp_path, records))["features"].astype(np.float32)
    store_cnn(tmp_path / "out.hdf5", records, tmp_path, stub(), "stub", SIZE, 2, 0, torch.device("cpu"), dtype="uint8")
    file = read_file(tmp_path / "out.hdf5")
    assert file["features"].dtype == np.uint8 and file["features"].max() == 255
    error = np.abs(file["features"] * file["scales"][:, None, None] - single)
    assert (error <= 0.502 * single.max((1, 2), keepdims=True) / 255 + 1e-3).all() and error.max() > 0


def test_interrupted_run_resumes(tmp_path, records):
    whole = store_stub(tmp_path, records, name="whole.hdf5").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        store_stub(tmp_path, records, Counting(stop_after=2))
    assert not (tmp_path / "out.hdf5").exists()
    encoder = Counting()
    assert store_stub(tmp_path, records, encoder).read_bytes() == whole
    assert encoder.images == COUNT - 4


def store_and_kill(folder, records, moment, workers):
    """`store_stub` in a forked process, which kills itself at the third batch -> its exit status."""
    write = Store.write

    def killed_write(self, start, features):
        if start == 4:
            if moment == "between features and flags":
                self.file["features"][start:start + 1] = 7
                self.file.flush()
            if moment == "after the flags, not flushed":
                self.file["done"][0:1] = self.marks[0:1]
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, start, features)
    child = os.fork()
    if child == 0:
        try:
            Store.write = killed_write
            store_stub(folder, records, workers=workers)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("moment", "workers"), [("before", 2), ("between features and flags", 0),
                                               ("after the flags, not flushed", 0)])
def test_killed_run_resumes(tmp_path, records, moment, workers):
    whole = store_stub(tmp_path, records, name="whole.hdf5").read_bytes()
    assert store_and_kill(tmp_path, records, moment, workers) == -signal.SIGKILL
    assert (tmp_path / "out.hdf5.partial").exists() and not (tmp_path / "out.hdf5").exists()
    encoder = Counting()
    assert store_stub(tmp_path, records, encoder).read_bytes() == whole
    assert encoder.images == COUNT - 4


@pytest.mark.parametrize("change", ["weights", "names", "size", "truncated", "no hdf5"])
def test_partial_file_that_does_not_fit_is_discarded(tmp_path, records, change):
    with pytest.raises(KeyboardInterrupt):
        store_stub(tmp_path, records, Counting(stop_after=2))
    partial = tmp_path / "out.hdf5.partial"
    encoder, size = Counting(), SIZE
    if change == "weights":
        encoder[0].weight.data = encoder[0].weight.data.flip(0)     # keeps the sum of the weights
    elif change == "names":
        records = records[::-1]
    elif change == "size":
        size = 32
    else:
        partial.write_bytes(partial.read_bytes()[:-300] if change == "truncated" else b"no hdf5")
    path = store_stub(tmp_path, records, encoder, size=size)
    assert encoder.images == COUNT
    assert path.read_bytes() == store_stub(tmp_path, records, encoder, name="whole.hdf5", size=size).read_bytes()


def test_replaced_image_is_computed_again(tmp_path, records):
    store_stub(tmp_path, records)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "3.png")
    path = store_stub(tmp_path, records)
    assert path.read_bytes() == store_stub(tmp_path, records, name="new.hdf5").read_bytes()


def test_insufficient_disk_space_is_reported_first(tmp_path, records, monkeypatch):
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="kB are needed"):
        store_stub(tmp_path, records)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_and_the_run_resumes(tmp_path, records, workers):
    intact = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(intact[:100])
    with pytest.raises(InputError, match=r"5\.png") as error:
        store_stub(tmp_path, records, workers=workers)
    assert "\n" not in str(error.value)
    (tmp_path / "5.png").write_bytes(intact)
    encoder = Counting()
    store_stub(tmp_path, records, encoder)
    assert encoder.images == COUNT - 4


def test_concurrent_runs_do_not_write_the_same_file(tmp_path, records):
    with pytest.raises(KeyboardInterrupt):
        store_stub(tmp_path, records, Counting(stop_after=2))
    partial = tmp_path / "out.hdf5.partial"
    before = partial.read_bytes()
    with open(partial, "rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run"):
            store_stub(tmp_path, records)
    assert partial.read_bytes() == before


def test_full_disk_raises_input_error(tmp_path, records, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(h5py.File, "flush", full)
    with pytest.raises(InputError, match="No space left"):
        store_stub(tmp_path, records)


def encoded(array, kind=np.float32):
    """base64 text of an array."""
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode()


def tsv_row(name, count, value, conf=None):
    """A row of py-bottom-up-attention's tsv; all features and coordinates of region k are value + k."""
    regions = value + np.arange(count)[:, None]
    conf = np.ones(count) if conf is None else conf
    ids = encoded(np.zeros(count), np.int64)
    return "\t".join([name, "480", "640", ids, encoded(conf), ids, encoded(conf), str(count),
                      encoded(regions * np.ones(4)), encoded(regions * np.ones(2048))])


def make_records(*names):
    return [Record(name, name, "train", [["a"]], ["a"]) for name in names]


def store_tsv(tmp_path, records, rows):
    """Stores the features of a tsv file with these rows and returns the contents of the result."""
    source = tmp_path / "boxes.tsv"
    source.write_text("".join(row + "\n" for row in rows))
    bottom_up.store(tmp_path / "out.hdf5", records, source)
    return read_file(tmp_path / "out.hdf5")


def test_tsv_by_name_stem_or_number(tmp_path):
    records = make_records("dog.jpg", "COCO_val2014_000000000042.jpg", "000000000007.jpg", "12.jpg")
    rows = [tsv_row("other_12", 36, 900), tsv_row("42", 36, 100), tsv_row("dog", 36, 0),
            tsv_row("COCO_train2014_000000000007", 36, 200), tsv_row("12.jpg", 36, 300)]
    file = store_tsv(tmp_path, records, rows[1:])
    assert file["features"].shape == (4, 36, 2048) and file["features"].dtype == np.float16
    assert file["boxes"].shape == (4, 36, 4)
    assert file["features"][:, 0, 0].tolist() == [0, 100, 200, 300]
    assert file["boxes"][:, 35, 3].tolist() == [35, 135, 235, 335]


def test_number_that_matches_two_images_is_ignored(tmp_path):
    records = make_records("cat_1.jpg", "dog_1.jpg")
    with pytest.raises(InputError, match=r"cat_1\.jpg"):
        store_tsv(tmp_path, records, [tsv_row("1", 36, 0), tsv_row("bird_1", 36, 0), tsv_row("dog_1", 36, 0)])


def test_more_and_fewer_than_36_regions(tmp_path):
    conf = np.zeros(50)
    conf[10:46] = np.linspace(1, 2, 36)
    file = store_tsv(tmp_path, make_records("1.jpg", "2.jpg"), [tsv_row("1", 50, 0, conf), tsv_row("2", 10, 5)])
    assert file["features"][0, :, 0].tolist() == list(range(10, 46)), "the 36 highest-scoring, in their order"
    assert file["features"][1, :, 0].tolist() == [*range(5, 15), *[0] * 26]
    assert not file["boxes"][1, 10:].any()


def test_tsv_of_bottom_up_attention(tmp_path):
    row = "\t".join(["1", "640", "480", "36", encoded(np.ones((36, 4))), encoded(np.full((36, 2048), 3))])
    assert (store_tsv(tmp_path, make_records("1.jpg"), [row])["features"] == 3).all()


def test_incomplete_tsv_is_resumed_with_another(tmp_path):
    records = make_records("1.jpg", "2.jpg", "3.jpg")
    with pytest.raises(InputError, match=r"no features of 2 of the 3 images, among them 1\.jpg, 2\.jpg "):
        store_tsv(tmp_path, records, [tsv_row("3", 36, 300)])
    assert (tmp_path / "out.hdf5.missing.txt").read_text() == "1.jpg\n2.jpg\n"
    file = store_tsv(tmp_path, records, [tsv_row("2", 36, 200), tsv_row("1", 36, 100)])
    assert file["features"][:, 0, 0].tolist() == [100, 200, 300]
    assert not (tmp_path / "out.hdf5.missing.txt").exists()


def test_folder_of_tsv_files(tmp_path):
    """Published features are split into files such as karpathy_train_….tsv.0 and .1, or train2014_obj36.tsv and
    val2014_obj36.tsv."""
    (tmp_path / "in").mkdir()
    for name, ids in (("a.tsv.0", ["1", "5"]), ("a.tsv.1", ["3"]), ("b.tsv", ["2"])):
        rows = [tsv_row(image_id, 36, 100 * int(image_id)) for image_id in ids]
        (tmp_path / "in" / name).write_text("".join(row + "\n" for row in rows))
    bottom_up.store(tmp_path / "out.hdf5", make_records("1.jpg", "2.jpg", "3.jpg"), tmp_path / "in")
    assert read_file(tmp_path / "out.hdf5")["features"][:, 0, 0].tolist() == [100, 200, 300]


@pytest.mark.parametrize("row", [
    "1\t2\t3", "nothing", "1\t\0",
    tsv_row("1", 36, 0)[:-40],                                  # truncated
    tsv_row("1", 36, 0).replace("\t36\t", "\t35\t"),
    tsv_row("1", 36, 0).replace("\t36\t", "\tmany\t"),
    tsv_row("1", 36, float("nan")), tsv_row("1", 36, 1e6), tsv_row("1", 1, 0),
    "\t".join(["1", "6", "4", "36", encoded(np.ones((36, 3))), encoded(np.ones((36, 100)))]),
])
def test_invalid_tsv(tmp_path, row):
    with pytest.raises(InputError, match=r"boxes\.tsv"):
        store_tsv(tmp_path, make_records("1.jpg"), [row])


def write_hdf5(folder, name, **datasets):
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        file.update(datasets)


def test_folder_of_hdf5(tmp_path):
    records = make_records("a.jpg", "b.jpg")
    for value, record in enumerate(records):
        write_hdf5(tmp_path, record.name, image_features=np.full((36 - value, 2048), value + 1.0),
                      image_boxes=np.full((36 - value, 4), value))
    bottom_up.store(tmp_path / "out.hdf5", records, tmp_path)
    file = read_file(tmp_path / "out.hdf5")
    assert (file["features"][0] == 1).all() and (file["features"][1, :35] == 2).all()
    assert (file["features"][1, 35] == 0).all()


def test_folders_of_numpy_files(tmp_path):
    """Files named after the file name, the stem or the number; 10 to 100 regions of any width."""
    records = make_records("a.jpg", "b.jpg", "COCO_val2014_000000000042.jpg")
    np.savez(tmp_path / "a.jpg.npz", x=np.full((100, 7), 1.0), bbox=np.full((100, 4), 2.0), info="not numeric")
    np.savez(tmp_path / "b.npz", feat=np.full((10, 7), 3.0), boxes=np.full((10, 4), 4.0))
    np.save(tmp_path / "42.npy", np.full((50, 7), 5.0))
    bottom_up.store(tmp_path / "out.hdf5", records, tmp_path, regions=50)
    file = read_file(tmp_path / "out.hdf5")
    assert file["features"].shape == (3, 50, 7) and file["boxes"].shape == (3, 50, 4)
    assert file["counts"].tolist() == [50, 10, 50]
    assert (file["features"][:, 9] == np.array([[1], [3], [5]])).all() and not file["features"][1, 10:].any()
    assert file["boxes"][:, 9, 0].tolist() == [2, 4, 0]


@pytest.mark.parametrize("datasets", [{"x": np.ones((10, 7))}, {"bbox": np.ones((10, 4))},
                                            {"x": np.array([{"an": "object"}]), "bbox": np.ones((1, 4))}])
def test_invalid_numpy_files(tmp_path, datasets):
    np.savez(tmp_path / "a.jpg.npz", **datasets)
    with pytest.raises(InputError, match=r"a\.jpg\.npz"):
        bottom_up.store(tmp_path / "out.hdf5", make_records("a.jpg"), tmp_path)
    (tmp_path / "a.jpg.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"a\.jpg\.npz"):
        bottom_up.store(tmp_path / "out.hdf5", make_records("a.jpg"), tmp_path)


def test_features_of_different_widths(tmp_path):
    for name, C in (("a.jpg", 7), ("b.jpg", 8)):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((10, C)), bbox=np.ones((10, 4)))
    with pytest.raises(InputError, match=r"\(10, 8\).*'b\.jpg'.*\(regions, 7\)"):
        bottom_up.store(tmp_path / "out.hdf5", make_records("a.jpg", "b.jpg"), tmp_path)


@pytest.mark.parametrize("datasets", [
    {"image_features": np.ones((36, 2048))},
    {"image_features": np.ones(36), "image_boxes": np.ones((36, 4))},
    {"image_features": np.ones((36, 2048)), "image_boxes": np.ones((35, 4))},
    {"image_features": np.ones((0, 2048)), "image_boxes": np.ones((0, 4))},
    {"image_features": 5.0, "image_boxes": np.ones((36, 4))},
    {"image_features": ["text"], "image_boxes": np.ones((36, 4))},
])
def test_invalid_hdf5_files(tmp_path, datasets):
    write_hdf5(tmp_path, "a.jpg", **datasets)
    with pytest.raises(InputError, match=r"a\.jpg"):
        bottom_up.store(tmp_path / "out.hdf5", make_records("a.jpg"), tmp_path)
    path = tmp_path / "a.jpg.hdf5"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"a\.jpg"):
        bottom_up.store(tmp_path / "out.hdf5", make_records("a.jpg"), tmp_path)


def test_real_bottom_up_features(tmp_path, shared_data):
    source = shared_data / "bottom_up_sample" / "train2014_obj36.tsv"
    ids = [line.split("\t")[0] for line in source.read_text().splitlines()]
    records = make_records(*(f"{int(name[-12:]):012d}.jpg" for name in reversed(ids)))
    bottom_up.store(tmp_path / "out.hdf5", records, source)
    file = read_file(tmp_path / "out.hdf5")
    last = source.read_text().splitlines()[-1].split("\t")
    expected = np.frombuffer(base64.b64decode(last[9]), np.float32).reshape(36, 2048)
    assert np.allclose(file["features"][0], expected, rtol=1e-3, atol=1e-3)
    assert (file["boxes"][..., 2] > file["boxes"][..., 0]).all()


@pytest.fixture
def split(tmp_path, records):
    """A data folder with the split `train` of the data set `x`, without features."""
    words = vocabulary.build([["a"]], 1)
    write_json(dataset.wordmap_path(tmp_path, "x"), words.wordmap)
    dataset.write_split(dataset.split_path(tmp_path, "x", "train"), records, words, 1, 5, 1, tmp_path)
    return tmp_path


def grid_model():
    torch.manual_seed(0)
    return GridTDModel(5, 4, 6, 5, encoder="small")


def region_model(feature_dim):
    return GridTDModel(5, 4, 6, 5, encoder=None, feature_dim=feature_dim)


def store_grid(folder, records, model):
    store_cnn(dataset.features_path(folder, "x", "train", "small"), records, folder, model.encoder, "small", 112, 4, 0,
              torch.device("cpu"))


def store_regions(folder, records, feature_dim, encoder="bottom_up"):
    for record in records:
        np.savez(folder / f"{record.name}.npz", x=np.ones((3, feature_dim)), bbox=np.ones((3, 4)))
    bottom_up.store(dataset.features_path(folder, "x", "train", encoder), records, folder)


def test_open_features_of_a_grid_model(split, records):
    model = grid_model()
    store_grid(split, records, model)
    data = feature_store.open_features(split, "x", "train", model, seed=3)
    assert len(data) == COUNT and data.seed == 3
    assert data.features == dataset.features_path(split, "x", "train", "small")
    with torch.inference_mode():
        image = images.preprocess(images.read_image(split / "2.png"), 112)
        expected = model.encoder(image[None]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(data.read_features([2]), expected, rtol=2e-3, atol=2e-3)


def test_open_features_of_a_region_model(split, records):
    store_regions(split, records, 7)
    data = feature_store.open_features(split, "x", "train", region_model(7))
    assert data.read_features([0, 2]).shape == (2, 36, 7) and data.region_counts([0]).tolist() == [3]


@pytest.mark.parametrize(("make_model", "flags"), [(grid_model, "--features cnn --encoder small"),
                                                   (lambda: region_model(7), "--features bottom_up")])
def test_missing_features_name_the_command(split, make_model, flags):
    with pytest.raises(InputError, match=f"are missing: run preparedataset.py with {flags}$") as error:
        feature_store.open_features(split, "x", "train", make_model())
    assert "\n" not in str(error.value)


def test_features_of_other_encoder_weights(split, records):
    model = grid_model()
    store_grid(split, records, model)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    with pytest.raises(InputError, match="other weights of the encoder: give the same --encoder_weights"):
        feature_store.open_features(split, "x", "train", model)


def test_features_without_attributes(split, records):
    """Of such features it is not known which weights they were computed with."""
    model = grid_model()
    store_grid(split, records, model)
    with h5py.File(dataset.features_path(split, "x", "train", "small"), "r+") as file:
        del file.attrs["weights"], file.attrs["encoder"]
    with pytest.raises(InputError, match="other weights of the encoder"):
        feature_store.open_features(split, "x", "train", model)


def test_region_features_of_another_width(split, records):
    store_regions(split, records, 7)
    with pytest.raises(InputError, match="features of 7 channels, the model takes 8"):
        feature_store.open_features(split, "x", "train", region_model(8))


def test_region_features_for_a_grid_model(split, records):
    store_regions(split, records, 7, encoder="small")       # bottom-up features under the file name of the encoder
    with pytest.raises(InputError, match="contains region features, the model takes features of the encoder small"):
        feature_store.open_features(split, "x", "train", grid_model())


def test_truncated_features(split, records):
    store_regions(split, records, 7)
    path = dataset.features_path(split, "x", "train", "bottom_up")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=path.name):
        feature_store.open_features(split, "x", "train", region_model(7))
