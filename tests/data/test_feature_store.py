"""Stored features: right values in the right rows, going on after a kill, and bottom-up features under any name."""
import base64
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from captioning.data import bottom_up, feature_store, images
from captioning.data.annotations import Record
from captioning.data.cnn_features import store_cnn
from captioning.errors import InputError

COUNT, SIZE = 7, 16


def stub(seed=0):
    """A tiny encoder: (B, 3, 16, 16) -> (B, 5, 4, 4)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.ReLU())


class Counting(nn.Sequential):
    """The stub, counting the pictures it sees; raises after so many calls."""

    def __init__(self, stop_after=10**9):
        super().__init__(*stub())
        self.seen, self.calls, self.stop_after = 0, 0, stop_after

    def forward(self, x):
        if self.calls > self.stop_after:    # the first call asks for the shape
            raise KeyboardInterrupt
        self.calls, self.seen = self.calls + 1, self.seen + len(x) * (self.calls > 0)
        return super().forward(x)


def make_pictures(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return [Record(name, name, "train", [["a"]], ["a"]) for name in names]


@pytest.fixture
def records(tmp_path):
    return make_pictures(tmp_path, [f"{i}.png" for i in range(COUNT)])


def store(folder, records, encoder=None, name="out.hdf5", size=SIZE, workers=0):
    store_cnn(folder / name, records, folder, encoder or stub(), "stub", size, 2, workers, torch.device("cpu"))
    return folder / name


def arrays(path):
    with h5py.File(path) as file:
        return {name: file[name][:] for name in file} | {name: str(value) for name, value in file.attrs.items()}


def test_features_row_by_row(tmp_path, records):
    found = arrays(store(tmp_path, records))
    assert found["features"].shape == (COUNT, 16, 5) and found["features"].dtype == np.float16
    assert found["done"].all() and not (tmp_path / "out.hdf5.partial").exists()
    with torch.inference_mode():
        picture = images.preprocess(images.read_image(tmp_path / "5.png"), SIZE)
        expected = stub()(picture[None])[0]         # (5, 4, 4)
    assert np.allclose(found["features"][5, 4 * 1 + 3], expected[:, 1, 3], atol=2e-3)


def test_workers_change_nothing(tmp_path, records):
    here, there = store(tmp_path, records), store(tmp_path, records, name="other.hdf5", workers=2)
    assert here.read_bytes() == there.read_bytes()


def test_a_complete_file_stays(tmp_path, records, capsys):
    path = store(tmp_path, records)
    before = path.stat()
    encoder = Counting()
    store(tmp_path, records, encoder)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and encoder.seen == 0
    assert "already there" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(tmp_path, records):
    whole = store(tmp_path, records, name="whole.hdf5").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, records, Counting(stop_after=2))
    assert not (tmp_path / "out.hdf5").exists()
    encoder = Counting()
    assert store(tmp_path, records, encoder).read_bytes() == whole
    assert encoder.seen == COUNT - 4


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [{root!r}, {tests!r}]
import test_feature_store as t
from captioning.data.feature_store import Store
folder, when = Path(sys.argv[1]), sys.argv[2]
records = [t.Record(f"{{i}}.png", f"{{i}}.png", "train", [["a"]], ["a"]) for i in range(t.COUNT)]
write = Store.write
def killed(self, start, values, boxes=None):
    if start == 4:
        if when == "between features and flags":
            self.file["features"][start:start + 1] = 7
            self.file.flush()
        if when == "after the flags, not flushed":
            self.file["done"][0:1] = self.marks[0:1]
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, start, values, boxes)
Store.write = killed
t.store(folder, records, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize(("when", "workers"), [("before", 2), ("between features and flags", 0),
                                               ("after the flags, not flushed", 0)])
def test_kill_9_loses_nothing(tmp_path, records, when, workers):
    whole = store(tmp_path, records, name="whole.hdf5").read_bytes()
    script = KILLED.format(root=str(Path(__file__).parents[2]), tests=str(Path(__file__).parent))
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path), when, str(workers)],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    assert ended.returncode == -9
    assert (tmp_path / "out.hdf5.partial").exists() and not (tmp_path / "out.hdf5").exists()
    encoder = Counting()
    assert store(tmp_path, records, encoder).read_bytes() == whole
    assert encoder.seen == COUNT - 4


@pytest.mark.parametrize("change", ["weights", "names", "size", "truncated", "no hdf5"])
def test_a_partial_file_of_something_else_is_started_anew(tmp_path, records, change):
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, records, Counting(stop_after=2))
    partial = tmp_path / "out.hdf5.partial"
    encoder, size = Counting(), SIZE
    if change == "weights":
        encoder[0].weight.data = encoder[0].weight.data.flip(0)     # the same sum of weights
    elif change == "names":
        records = records[::-1]
    elif change == "size":
        size = 32
    else:
        partial.write_bytes(partial.read_bytes()[:-300] if change == "truncated" else b"no hdf5")
    path = store(tmp_path, records, encoder, size=size)
    assert encoder.seen == COUNT
    assert path.read_bytes() == store(tmp_path, records, encoder, name="whole.hdf5", size=size).read_bytes()


def test_a_replaced_picture_is_computed_again(tmp_path, records):
    store(tmp_path, records)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "3.png")
    path = store(tmp_path, records)
    assert path.read_bytes() == store(tmp_path, records, name="new.hdf5").read_bytes()


def test_a_disk_without_room_is_noticed_first(tmp_path, records, monkeypatch):
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="0.0 GB are needed"):
        store(tmp_path, records)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_and_what_was_done_is_kept(tmp_path, records, workers):
    sound = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(sound[:100])
    with pytest.raises(InputError, match=r"5\.png") as error:
        store(tmp_path, records, workers=workers)
    assert "\n" not in str(error.value)
    (tmp_path / "5.png").write_bytes(sound)
    encoder = Counting()
    store(tmp_path, records, encoder)
    assert encoder.seen == COUNT - 4


def test_two_runs_do_not_write_one_file(tmp_path, records):
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, records, Counting(stop_after=2))
    partial = tmp_path / "out.hdf5.partial"
    before = partial.read_bytes()
    with open(partial, "rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run"):
            store(tmp_path, records)
    assert partial.read_bytes() == before


def test_a_full_disk_is_one_sentence(tmp_path, records, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(h5py.File, "flush", full)
    with pytest.raises(InputError, match="No space left"):
        store(tmp_path, records)


def encoded(array, kind=np.float32):
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode()


def tsv_row(name, count, value, conf=None):
    """A row of py-bottom-up-attention's tsv whose region k holds value + k everywhere."""
    regions = value + np.arange(count)[:, None]
    conf = np.ones(count) if conf is None else conf
    ids = encoded(np.zeros(count), np.int64)
    return "\t".join([name, "480", "640", ids, encoded(conf), ids, encoded(conf), str(count),
                      encoded(regions * np.ones(4)), encoded(regions * np.ones(2048))])


def named(*names):
    return [Record(name, name, "train", [["a"]], ["a"]) for name in names]


def from_tsv(tmp_path, records, rows):
    source = tmp_path / "boxes.tsv"
    source.write_text("".join(row + "\n" for row in rows))
    bottom_up.store(tmp_path / "out.hdf5", records, source)
    return arrays(tmp_path / "out.hdf5")


def test_tsv_by_name_stem_or_number(tmp_path):
    records = named("dog.jpg", "COCO_val2014_000000000042.jpg", "000000000007.jpg", "12.jpg")
    rows = [tsv_row("other_12", 36, 900), tsv_row("42", 36, 100), tsv_row("dog", 36, 0),
            tsv_row("COCO_train2014_000000000007", 36, 200), tsv_row("12.jpg", 36, 300)]
    found = from_tsv(tmp_path, records, rows[1:])
    assert found["features"].shape == (4, 36, 2048) and found["features"].dtype == np.float16
    assert found["boxes"].shape == (4, 36, 4)
    assert found["features"][:, 0, 0].tolist() == [0, 100, 200, 300]
    assert found["boxes"][:, 35, 3].tolist() == [35, 135, 235, 335]


def test_a_number_that_fits_two_pictures_fits_none(tmp_path):
    records = named("cat_1.jpg", "dog_1.jpg")
    with pytest.raises(InputError, match=r"cat_1\.jpg"):
        from_tsv(tmp_path, records, [tsv_row("1", 36, 0), tsv_row("bird_1", 36, 0), tsv_row("dog_1", 36, 0)])


def test_more_and_fewer_than_36_regions(tmp_path):
    conf = np.zeros(50)
    conf[10:46] = np.linspace(1, 2, 36)
    found = from_tsv(tmp_path, named("1.jpg", "2.jpg"), [tsv_row("1", 50, 0, conf), tsv_row("2", 10, 5)])
    assert found["features"][0, :, 0].tolist() == list(range(10, 46)), "the 36 surest, in their order"
    assert found["features"][1, :, 0].tolist() == [*range(5, 15), *[0] * 26]
    assert not found["boxes"][1, 10:].any()


def test_tsv_of_the_older_form(tmp_path):
    row = "\t".join(["1", "640", "480", "36", encoded(np.ones((36, 4))), encoded(np.full((36, 2048), 3))])
    assert (from_tsv(tmp_path, named("1.jpg"), [row])["features"] == 3).all()


def test_tsv_interrupted_goes_on(tmp_path):
    records = named("1.jpg", "2.jpg", "3.jpg")
    with pytest.raises(InputError, match=r"no features of 2 of the 3 pictures, of 1\.jpg, 2\.jpg for a start"):
        from_tsv(tmp_path, records, [tsv_row("3", 36, 300)])
    assert (tmp_path / "out.hdf5.missing.txt").read_text() == "1.jpg\n2.jpg\n"
    found = from_tsv(tmp_path, records, [tsv_row("2", 36, 200), tsv_row("1", 36, 100)])
    assert found["features"][:, 0, 0].tolist() == [100, 200, 300]
    assert not (tmp_path / "out.hdf5.missing.txt").exists()


def test_a_folder_of_tsv_files(tmp_path):
    """As such features are published: karpathy_train_….tsv.0 and .1; or train2014_obj36.tsv and val2014_obj36.tsv"""
    (tmp_path / "in").mkdir()
    for name, some in (("a.tsv.0", ["1", "5"]), ("a.tsv.1", ["3"]), ("b.tsv", ["2"])):
        rows = [tsv_row(number, 36, 100 * int(number)) for number in some]
        (tmp_path / "in" / name).write_text("".join(row + "\n" for row in rows))
    bottom_up.store(tmp_path / "out.hdf5", named("1.jpg", "2.jpg", "3.jpg"), tmp_path / "in")
    assert arrays(tmp_path / "out.hdf5")["features"][:, 0, 0].tolist() == [100, 200, 300]


@pytest.mark.parametrize("row", [
    "1\t2\t3", "nothing", "1\t\0",
    tsv_row("1", 36, 0)[:-40],                                  # cut off
    tsv_row("1", 36, 0).replace("\t36\t", "\t35\t"),
    tsv_row("1", 36, 0).replace("\t36\t", "\tmany\t"),
    tsv_row("1", 36, float("nan")), tsv_row("1", 36, 1e6), tsv_row("1", 1, 0),
    "\t".join(["1", "6", "4", "36", encoded(np.ones((36, 3))), encoded(np.ones((36, 100)))]),
])
def test_wrong_tsv(tmp_path, row):
    with pytest.raises(InputError, match=r"boxes\.tsv"):
        from_tsv(tmp_path, named("1.jpg"), [row])


def write_regions(folder, name, **datasets):
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        file.update(datasets)


def test_folder_of_hdf5(tmp_path):
    records = named("a.jpg", "b.jpg")
    for value, record in enumerate(records):
        write_regions(tmp_path, record.name, image_features=np.full((36 - value, 2048), value + 1.0),
                      image_boxes=np.full((36 - value, 4), value))
    bottom_up.store(tmp_path / "out.hdf5", records, tmp_path)
    found = arrays(tmp_path / "out.hdf5")
    assert (found["features"][0] == 1).all() and (found["features"][1, :35] == 2).all()
    assert (found["features"][1, 35] == 0).all()


def test_folders_of_numpy_files(tmp_path):
    """Named in full, without ending, or by number; 10 to 100 regions, of any width"""
    records = named("a.jpg", "b.jpg", "COCO_val2014_000000000042.jpg")
    np.savez(tmp_path / "a.jpg.npz", x=np.full((100, 7), 1.0), bbox=np.full((100, 4), 2.0), info="no array of numbers")
    np.savez(tmp_path / "b.npz", feat=np.full((10, 7), 3.0), boxes=np.full((10, 4), 4.0))
    np.save(tmp_path / "42.npy", np.full((50, 7), 5.0))
    bottom_up.store(tmp_path / "out.hdf5", records, tmp_path, regions=50)
    found = arrays(tmp_path / "out.hdf5")
    assert found["features"].shape == (3, 50, 7) and found["boxes"].shape == (3, 50, 4)
    assert found["counts"].tolist() == [50, 10, 50]
    assert (found["features"][:, 9] == np.array([[1], [3], [5]])).all() and not found["features"][1, 10:].any()
    assert found["boxes"][:, 9, 0].tolist() == [2, 4, 0]


@pytest.mark.parametrize("arrays_of_file", [{"x": np.ones((10, 7))}, {"bbox": np.ones((10, 4))},
                                            {"x": np.array([{"an": "object"}]), "bbox": np.ones((1, 4))}])
def test_wrong_numpy_files(tmp_path, arrays_of_file):
    np.savez(tmp_path / "a.jpg.npz", **arrays_of_file)
    with pytest.raises(InputError, match=r"a\.jpg\.npz"):
        bottom_up.store(tmp_path / "out.hdf5", named("a.jpg"), tmp_path)
    (tmp_path / "a.jpg.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"a\.jpg\.npz"):
        bottom_up.store(tmp_path / "out.hdf5", named("a.jpg"), tmp_path)


def test_pictures_of_two_widths_are_named(tmp_path):
    for name, C in (("a.jpg", 7), ("b.jpg", 8)):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((10, C)), bbox=np.ones((10, 4)))
    with pytest.raises(InputError, match=r"\(10, 8\).*'b\.jpg'.*\(regions, 7\)"):
        bottom_up.store(tmp_path / "out.hdf5", named("a.jpg", "b.jpg"), tmp_path)


@pytest.mark.parametrize("datasets", [
    {"image_features": np.ones((36, 2048))},
    {"image_features": np.ones(36), "image_boxes": np.ones((36, 4))},
    {"image_features": np.ones((36, 2048)), "image_boxes": np.ones((35, 4))},
    {"image_features": np.ones((0, 2048)), "image_boxes": np.ones((0, 4))},
    {"image_features": 5.0, "image_boxes": np.ones((36, 4))},
    {"image_features": ["text"], "image_boxes": np.ones((36, 4))},
])
def test_wrong_folder(tmp_path, datasets):
    write_regions(tmp_path, "a.jpg", **datasets)
    with pytest.raises(InputError, match=r"a\.jpg"):
        bottom_up.store(tmp_path / "out.hdf5", named("a.jpg"), tmp_path)
    path = tmp_path / "a.jpg.hdf5"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"a\.jpg"):
        bottom_up.store(tmp_path / "out.hdf5", named("a.jpg"), tmp_path)


def test_real_bottom_up_features(tmp_path, shared_data):
    source = shared_data / "bottom_up_sample" / "train2014_obj36.tsv"
    ids = [line.split("\t")[0] for line in source.read_text().splitlines()]
    records = named(*(f"{int(name[-12:]):012d}.jpg" for name in reversed(ids)))
    bottom_up.store(tmp_path / "out.hdf5", records, source)
    found = arrays(tmp_path / "out.hdf5")
    last = source.read_text().splitlines()[-1].split("\t")
    expected = np.frombuffer(base64.b64decode(last[9]), np.float32).reshape(36, 2048)
    assert np.allclose(found["features"][0], expected, rtol=1e-3, atol=1e-3)
    assert (found["boxes"][..., 2] > found["boxes"][..., 0]).all()
