"""Stored features: values, resumption, bottom-up features, and checks against a model."""
import base64
import fcntl
import os
import signal

import h5py
import numpy as np
import pytest
import torch
from helpers import encoded, refused
from made_up import random_image
from PIL import Image
from torch import nn

from captioning.data import bottom_up, dataset, feature_store, images, vocabulary
from captioning.data.annotations import Record
from captioning.data.feature_store import Store
from captioning.files import write_json
from gridTDmodel import GridTDModel

COUNT, SIZE = 7, 16
CPU = torch.device("cpu")


class Stub(nn.Sequential):
    """A small random encoder, (B, 3, 16, 16) -> (B, 5, 4, 4), with a counter of images; raises
    KeyboardInterrupt after `stop_after` batches."""

    def __init__(self, stop_after=10**9):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 5, 4, stride=4), nn.ReLU())
        self.images, self.calls, self.stop_after = 0, 0, stop_after

    def forward(self, x):
        if self.calls > self.stop_after:    # the first call determines the shape
            raise KeyboardInterrupt
        self.images += len(x) * (self.calls > 0)
        self.calls += 1
        return super().forward(x)


def make_records(*names):
    return [Record(name, name, "train", [["a"]], ["a"]) for name in names]


@pytest.fixture
def records(tmp_path):
    """Of random images in tmp_path."""
    records = make_records(*(f"{i}.png" for i in range(COUNT)))
    for seed, record in enumerate(records):
        random_image((24, 20), seed).save(tmp_path / record.path)
    return records


def store_stub(folder, records, encoder=None, name="out.hdf5", size=SIZE, workers=0, **options):
    feature_store.store_cnn(folder / name, records, folder, encoder or Stub(), "stub", size, 2,
                            workers, CPU, **options)
    return folder / name


def read_file(path):
    """Datasets and attributes of an HDF5 file."""
    with h5py.File(path) as file:
        attributes = {name: str(value) for name, value in file.attrs.items()}
        return {name: file[name][:] for name in file} | attributes


def interrupt(folder, records):
    """Stops after two batches, so that 4 images are complete -> the partial file."""
    with pytest.raises(KeyboardInterrupt):
        store_stub(folder, records, Stub(stop_after=2))
    assert not (folder / "out.hdf5").exists()
    return folder / "out.hdf5.partial"


def test_values_of_features(tmp_path, records):
    """They do not depend on the number of workers."""
    path = store_stub(tmp_path, records)
    file = read_file(path)
    assert file["features"].shape == (COUNT, 16, 5) and file["features"].dtype == np.float16
    assert file["done"].all() and not (tmp_path / "out.hdf5.partial").exists()
    with torch.inference_mode():
        image = images.preprocess(images.read_image(tmp_path / "5.png"), SIZE)
        expected = Stub()(image[None])[0]         # (5, 4, 4)
    assert np.allclose(file["features"][5, 4 * 1 + 3], expected[:, 1, 3], atol=2e-3)
    other = store_stub(tmp_path, records, name="other.hdf5", workers=2)
    assert other.read_bytes() == path.read_bytes()


def test_complete_file_is_kept(tmp_path, records, capsys):
    """Also beside a partial file of another run."""
    path = store_stub(tmp_path, records)
    before = path.stat()
    (tmp_path / "out.hdf5.partial").write_bytes(b"of another run")
    encoder = Stub()
    store_stub(tmp_path, records, encoder)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and encoder.images == 0
    assert "already complete" in capsys.readouterr().out


def test_features_in_mixed_precision(tmp_path, records, monkeypatch):
    """Values are close to those in float32, and a file in another precision is regenerated."""
    for module in ("device", "data.feature_store"):
        monkeypatch.setattr(f"captioning.{module}.supports_amp", lambda device: True)
    single = read_file(store_stub(tmp_path, records))
    mixed = read_file(store_stub(tmp_path, records, amp=True))
    assert single["precision"] == "torch.float32" and mixed["precision"] == "torch.bfloat16"
    assert not np.array_equal(mixed["features"], single["features"])
    assert np.allclose(mixed["features"], single["features"], rtol=0.02, atol=0.02)


def assert_resumes(folder, records):
    """The first four images are not computed again, and the file is that of a whole run."""
    encoder = Stub()
    resumed = store_stub(folder, records, encoder)
    assert encoder.images == COUNT - 4
    assert resumed.read_bytes() == store_stub(folder, records, name="whole.hdf5").read_bytes()


@pytest.mark.parametrize(("moment", "workers"), [
    ("before", 2), ("between features and flags", 0), ("after the flags, not flushed", 0)])
def test_killed_run_resumes(tmp_path, records, moment, workers):
    """A forked process kills itself at the third batch."""
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
            store_stub(tmp_path, records, workers=workers)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "out.hdf5.partial").exists() and not (tmp_path / "out.hdf5").exists()
    assert_resumes(tmp_path, records)


@pytest.mark.parametrize("change", ["weights", "names", "size", "truncated", "no hdf5"])
def test_partial_file_that_does_not_fit_is_discarded(tmp_path, records, change):
    partial = interrupt(tmp_path, records)
    encoder, size = Stub(), SIZE
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
    whole = store_stub(tmp_path, records, encoder, name="whole.hdf5", size=size)
    assert path.read_bytes() == whole.read_bytes()


def test_replaced_image_is_computed_again(tmp_path, records):
    store_stub(tmp_path, records)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "3.png")
    path = store_stub(tmp_path, records)
    assert path.read_bytes() == store_stub(tmp_path, records, name="new.hdf5").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_and_the_run_resumes(tmp_path, records, workers):
    intact = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(intact[:100])
    with refused(r"5\.png"):
        store_stub(tmp_path, records, workers=workers)
    (tmp_path / "5.png").write_bytes(intact)
    assert_resumes(tmp_path, records)


def test_concurrent_runs_do_not_write_the_same_file(tmp_path, records):
    partial = interrupt(tmp_path, records)
    before = partial.read_bytes()
    with open(partial, "rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with refused("another run"):
            store_stub(tmp_path, records)
    assert partial.read_bytes() == before


def test_full_disk(tmp_path, records, monkeypatch):
    """Is reported before any image is read, or as one sentence."""
    encoder = Stub()

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with refused("No space left"):
            store_stub(tmp_path, records, encoder)
    assert encoder.images == 0 and not (tmp_path / "out.hdf5.partial").exists()
    monkeypatch.setattr(h5py.File, "flush", full)
    with refused("No space left"):
        store_stub(tmp_path, records)


def tsv_row(name, count, value, conf=None):
    """A row of py-bottom-up-attention's tsv; all numbers of region k are value + k."""
    regions = value + np.arange(count)[:, None]
    conf = encoded(np.ones(count) if conf is None else conf)
    ids = encoded(np.zeros(count), np.int64)
    return "\t".join([name, "480", "640", ids, conf, ids, conf, str(count),
                      encoded(regions * np.ones(4)), encoded(regions * np.ones(2048))])


def old_row(name, boxes, features):
    """A row of bottom-up-attention's tsv."""
    count = str(len(features))
    return "\t".join([name, "640", "480", count, encoded(boxes), encoded(features)])


def store_tsv(folder, records, rows, path=None):
    """Stores the features of a tsv file with these rows -> the contents of the result."""
    path = path or folder / "out.hdf5"
    (folder / "boxes.tsv").write_text("".join(row + "\n" for row in rows))
    bottom_up.store(path, records, folder / "boxes.tsv")
    return read_file(path)


def test_tsv_by_name_stem_or_number(tmp_path):
    records = make_records("dog.jpg", "COCO_val2014_000000000042.jpg", "000000000007.jpg", "12.jpg")
    rows = [tsv_row("42", 36, 100), tsv_row("dog", 36, 0),
            tsv_row("COCO_train2014_000000000007", 36, 200), tsv_row("12.jpg", 36, 300)]
    file = store_tsv(tmp_path, records, rows)
    assert file["features"].shape == (4, 36, 2048) and file["features"].dtype == np.float16
    assert file["boxes"].shape == (4, 36, 4)
    assert file["features"][:, 0, 0].tolist() == [0, 100, 200, 300]
    assert file["boxes"][:, 35, 3].tolist() == [35, 135, 235, 335]

    # a number that matches two images is ignored
    rows = [tsv_row(name, 36, 0) for name in ("1", "bird_1", "dog_1")]
    with refused(r"cat_1\.jpg"):
        store_tsv(tmp_path, make_records("cat_1.jpg", "dog_1.jpg"), rows)


def test_more_and_fewer_than_36_regions(tmp_path):
    conf = np.zeros(50)
    conf[10:46] = np.linspace(1, 2, 36)
    rows = [tsv_row("1", 50, 0, conf), tsv_row("2", 10, 5),
            old_row("3", np.ones((50, 4)), np.arange(50)[:, None] * np.ones(2048))]
    file = store_tsv(tmp_path, make_records("1.jpg", "2.jpg", "3.jpg"), rows)
    features = file["features"][:, :, 0].tolist()
    assert features[0] == list(range(10, 46)), "the 36 highest-scoring, in their order"
    assert features[1] == [*range(5, 15), *[0] * 26] and not file["boxes"][1, 10:].any()
    assert features[2] == list(range(36)), "the first ones, as this file has no scores"
    assert file["counts"].tolist() == [36, 10, 36]


def test_incomplete_tsv_is_replaced_by_another(tmp_path):
    """Features of two files are never mixed."""
    records = make_records("1.jpg", "2.jpg", "3.jpg")
    message = r"no features of 2 of the 3 images, among them 1\.jpg, 2\.jpg "
    with refused(message):
        store_tsv(tmp_path, records, [tsv_row("3", 36, 300)])
    assert (tmp_path / "out.hdf5.missing.txt").read_text() == "1.jpg\n2.jpg\n"
    file = store_tsv(tmp_path, records, [tsv_row("2", 36, 200), tsv_row("3", 36, 301),
                                         tsv_row("1", 36, 100)])
    assert file["features"][:, 0, 0].tolist() == [100, 200, 301]
    assert not (tmp_path / "out.hdf5.missing.txt").exists()


def test_folder_of_tsv_files(tmp_path):
    """As published ones: karpathy_train_….tsv.0 and .1; train2014_obj36.tsv, val2014_obj36.tsv."""
    (tmp_path / "in").mkdir()
    for name, ids in (("a.tsv.0", ["1", "5"]), ("a.tsv.1", ["3"]), ("b.tsv", ["2"])):
        rows = [tsv_row(image_id, 36, 100 * int(image_id)) for image_id in ids]
        (tmp_path / "in" / name).write_text("".join(row + "\n" for row in rows))
    records = make_records("1.jpg", "2.jpg", "3.jpg")
    bottom_up.store(tmp_path / "out.hdf5", records, tmp_path / "in")
    features = read_file(tmp_path / "out.hdf5")["features"]
    assert features[:, 0, 0].tolist() == [100, 200, 300]


def test_folder_without_tsv_files(tmp_path):
    (tmp_path / "a.jpg.npy").write_bytes(b"")
    with refused("no features of a.jpg .*give --bottom_up a tsv"):
        bottom_up.store(tmp_path / "out.hdf5", make_records("a.jpg"), tmp_path)


@pytest.mark.parametrize("row", [
    "1\t2\t3", "nothing", "1\t\0",
    tsv_row("1", 36, 0)[:-40],                                  # truncated
    tsv_row("1", 36, 0).replace("\t36\t", "\t35\t"),
    tsv_row("1", 36, 0).replace("\t36\t", "\tmany\t"),
    tsv_row("1", 36, float("nan")), tsv_row("1", 36, 1e6), tsv_row("1", 1, 0),
    old_row("1", np.ones((36, 3)), np.ones((36, 100))),
    old_row("1", np.ones((36, 4)) * [2, 1, 1, 1], np.ones((36, 100))),
    old_row("1", np.ones((0, 4)), np.ones((0, 100))),
    old_row("1", np.ones((9, 4)), np.ones((9, 7)))])            # of another width
def test_invalid_tsv(tmp_path, row):
    rows = [row, old_row("2", np.ones((9, 4)), np.ones((9, 8)))]
    with refused(r"boxes\.tsv"):
        store_tsv(tmp_path, make_records("1.jpg", "2.jpg"), rows)


def test_real_bottom_up_features(tmp_path, shared_data):
    source = shared_data / "bottom_up_sample" / "train2014_obj36.tsv"
    rows = [line.split("\t") for line in source.read_text().splitlines()]
    records = make_records(*(f"{int(row[0][-12:]):012d}.jpg" for row in reversed(rows)))
    bottom_up.store(tmp_path / "out.hdf5", records, source)
    file = read_file(tmp_path / "out.hdf5")
    expected = np.frombuffer(base64.b64decode(rows[-1][9]), np.float32).reshape(36, 2048)
    assert np.allclose(file["features"][0], expected, rtol=1e-3, atol=1e-3)
    assert (file["boxes"][..., 2] > file["boxes"][..., 0]).all()


@pytest.fixture
def split(tmp_path, records):
    """A data folder with the split `train` of the data set `x`, without features."""
    words = vocabulary.build([["a"]], 1)
    write_json(dataset.wordmap_path(tmp_path, "x"), words.wordmap)
    path = dataset.split_path(tmp_path, "x", "train")
    dataset.write_split(path, records, words, 1, 5, 1, tmp_path)
    return tmp_path


def grid_model():
    torch.manual_seed(0)
    return GridTDModel(5, 4, 6, 5, encoder="small")


def region_model():
    return GridTDModel(5, 4, 6, 5, encoder=None, feature_dim=8)


def test_features_of_other_encoder_weights(split, records):
    model = grid_model()
    path = dataset.features_path(split, "x", "train", "small")
    feature_store.store_cnn(path, records, split, model.encoder, "small", 112, 4, 0, CPU)
    message = "other weights of the encoder: give the same --encoder_weights"
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    with refused(message):
        feature_store.open_features(split, "x", "train", model)
    with h5py.File(path, "r+") as file:     # now it is not known of which weights they are
        del file.attrs["weights"], file.attrs["encoder"]
    with refused(message):
        feature_store.open_features(split, "x", "train", model)


@pytest.mark.parametrize(("encoder", "make_model", "message"), [
    ("bottom_up", region_model, "features of 7 channels, the model takes 8"),
    ("small", grid_model, "region features, the model takes features of the encoder small")])
def test_features_that_do_not_fit_the_model(split, records, encoder, make_model, message):
    rows = [old_row(record.name, np.ones((3, 4)), np.ones((3, 7))) for record in records]
    store_tsv(split, records, rows, dataset.features_path(split, "x", "train", encoder))
    with refused(message):
        feature_store.open_features(split, "x", "train", make_model())
