"""Prepared splits: contents of the files, batches, and randomness that depends only on the seed."""
import contextlib
import json
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import refused
from made_up import random_image
from torch.utils.data import DataLoader

from captioning.data import dataset, images, vocabulary
from captioning.data.annotations import Record
from captioning.data.dataset import CaptionDataset, pick_captions
from captioning.data.loader import collate
from captioning.files import write_json

COUNT = 6
CAPTIONS = [["the", "dog", "is", "on", "the", "left", "side"], ["right", "cat"], ["a", "bird"]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with the split `train` of `x`: six images, each with one to three captions."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    records = []
    for i in range(COUNT):
        random_image((30, 20 + i), i).save(folder / "images" / f"{i}.png")
        tokens = CAPTIONS[:1 + i % 3]
        records.append(Record(f"{i}.png", f"{i}.png", "train", tokens,
                              [" ".join(words) for words in tokens]))
    words = vocabulary.build(CAPTIONS, 1)
    write_json(dataset.wordmap_path(folder, "x"), words.wordmap)
    dataset.write_split(dataset.split_path(folder, "x", "train"), records, words, 3, 5, 1,
                        folder / "images")
    with h5py.File(dataset.features_path(folder, "x", "train", "stub"), "w") as file:
        file["features"] = rng.standard_normal((COUNT, 4, 3)).astype(np.float16)
        file["done"] = np.ones(COUNT, np.uint8)
        file.attrs["names"] = dataset.fingerprint([record.name for record in records])
    return folder


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of `prepared` that may be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy")


def stub_path(folder):
    return dataset.features_path(folder, "x", "train", "stub")


def opened(folder, **options):
    return CaptionDataset(folder, "x", "train", **options)


def read_epoch(data, workers, batches, **options):
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                        **options)
    return list(loader)


def test_contents_of_a_split(prepared):
    data = opened(prepared)
    words = data.vocabulary
    assert len(data) == COUNT and data.names == data.paths == [f"{i}.png" for i in range(COUNT)]
    assert data.references[2] == [" ".join(tokens) for tokens in CAPTIONS]
    assert data.captions.shape == (COUNT, 3, 7)
    first = data.captions[2, 0].tolist()
    assert first == words.encode(CAPTIONS[0], 5), "truncated to five words"
    assert len(first) == 7 and first[-1] == words.end
    assert words.decode(data.captions[2, 1, 1:].tolist()) == ["right", "cat"]
    assert data.captions[2, 2].tolist() == [*words.encode(["a", "bird"], 5), 0, 0, 0]


def test_pick_captions_is_determined_by_the_seed():
    four = list("abcd")
    picked = [pick_captions(four, 5, random.Random(f"{seed} x")) for seed in [*range(40), 0]]
    assert picked[0] == picked[-1] and all(captions[:4] == four for captions in picked)
    assert {captions[4] for captions in picked} == set(four)
    picked = pick_captions(list("abcdefg"), 5, random.Random("1 x"))
    assert sorted(picked) == list("abcdefg"), "the first 5 are for training, the others follow"
    assert pick_captions(four, 4, random.Random(0)) == four


def test_stored_captions_depend_on_seed_and_name(prepared, tmp_path):
    first = opened(prepared)
    records = [Record(name, name, "train", [text.split() for text in texts], texts)
               for name, texts in zip(first.names, first.references, strict=True)]
    captions = []
    for seed, split_records in ((1, records), (1, records[1:]), (2, records)):
        path = tmp_path / f"{len(captions)}.hdf5"
        dataset.write_split(path, split_records, first.vocabulary, 3, 5, seed, None)
        with h5py.File(path) as file:
            captions.append(file["captions"][:])
    assert np.array_equal(captions[0], first.captions)
    assert np.array_equal(captions[0][1:], captions[1]), "omitting an image changes no others"
    assert not np.array_equal(captions[0], captions[2])


def test_batches_of_features(prepared):
    data = opened(prepared, features=stub_path(prepared))
    with h5py.File(data.features) as file:
        features = torch.from_numpy(file["features"][:]).float()
    batch = data.__getitems__([4, 0, 3, 0])
    assert torch.equal(batch["images"], features[[4, 0, 3, 0]])
    assert batch["images"].dtype == torch.float32
    assert torch.equal(batch["index"], torch.tensor([4, 0, 3, 0]))
    assert batch["captions"].dtype == torch.int64
    assert torch.equal(data.__getitems__([1])["captions"], data.captions[[1]].long())


def test_captions_are_trimmed_to_the_longest_in_the_batch(prepared):
    data = opened(prepared, features=stub_path(prepared))
    data.captions[0, :, 4:] = 0
    data.captions[1, :, 3:] = 0
    assert data.__getitems__([0, 1])["captions"].shape == (2, 3, 4)
    assert data.__getitems__([1])["captions"].shape == (1, 3, 3)


def test_workers_read_features_while_the_file_is_open(prepared):
    """Forked ones, and spawned ones, which receive a pickled data set."""
    data = opened(prepared, features=stub_path(prepared))
    batches = [[0, 5], [2, 1]]
    expected = [data.__getitems__(indices)["images"] for indices in batches]
    received = pickle.loads(pickle.dumps(data))
    for read in (read_epoch(data, 1, batches, multiprocessing_context="fork"),
                 map(received.__getitems__, batches)):
        for batch, features in zip(read, expected, strict=True):
            assert torch.equal(batch["images"], features)


def test_process_ends_although_a_loader_is_left_behind():
    """Its worker ignores SIGTERM."""
    code = ("import torch\nfrom captioning.data.loader import make_loader\n"
            "left = iter(make_loader(range(2), [[0], [1]], 1, torch.device('cpu')))\n"
            "print(next(left))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=120, cwd=Path(__file__).parents[2])
    assert (result.returncode, result.stdout, result.stderr) == (0, "[0]\n", "")


def test_batches_of_images(prepared):
    data = opened(prepared, image_size=16)
    batch = data.__getitems__([3, 1])
    assert batch["images"].shape == (2, 3, 16, 16) and batch["images"].dtype == torch.float32
    expected = images.preprocess(images.read_image(prepared / "images" / "3.png"), 16)
    assert torch.equal(batch["images"][0], expected)


def test_augmentation_depends_only_on_seed_epoch_and_index(prepared):
    data = opened(prepared, image_size=16, augment=True)
    batches = [[0, 1, 2], [3, 4, 5]]

    def images_and_captions(workers, epoch, batches=batches):
        data.epoch = epoch
        torch.manual_seed(workers)      # the global random state has no effect
        read = read_epoch(data, workers, batches)
        return (torch.cat([batch["images"] for batch in read]),
                [batch["captions"] for batch in read])

    images, captions = images_and_captions(0, epoch=1)
    worker_images, worker_captions = images_and_captions(2, epoch=1)
    assert torch.equal(images, worker_images)
    assert all(map(torch.equal, captions, worker_captions))
    single_images, _ = images_and_captions(0, epoch=1, batches=[[5], [2]])
    assert torch.equal(single_images, images[[5, 2]])
    assert not torch.equal(images, images_and_captions(0, epoch=2)[0])
    other_seed = opened(prepared, image_size=16, augment=True, seed=2)
    other_seed.epoch = 1
    assert not torch.equal(images[:3], other_seed.__getitems__([0, 1, 2])["images"])


def test_captions_are_sampled_per_epoch(prepared):
    data = opened(prepared, features=stub_path(prepared), captions_per_epoch=2)
    pairs = set()
    for epoch in range(12):
        data.epoch = epoch
        sampled = data.__getitems__([2])["captions"]
        by_worker = read_epoch(data, 1, [[5, 2]])[0]["captions"][1:, :, :sampled.shape[2]]
        assert sampled.shape[:2] == (1, 2) and torch.equal(sampled, by_worker)
        rows = torch.nn.functional.pad(sampled[0], (0, 7 - sampled.shape[2])).tolist()
        stored = data.captions[2].tolist()
        pairs.add(tuple(stored.index(row) for row in rows))
    assert all(i != j for i, j in pairs) and {i for pair in pairs for i in pair} == {0, 1, 2}


def test_captions_of_flipped_images_swap_left_and_right(prepared):
    plain = opened(prepared, image_size=16)
    data = opened(prepared, image_size=16, augment=True)
    left, right = (data.vocabulary.wordmap[word] for word in ("left", "right"))
    observed = set()
    for epoch in range(8):
        data.epoch = epoch
        batch, original = data.__getitems__([2, 5]), plain.__getitems__([2, 5])
        for x, y, row, unchanged in zip(batch["images"].mean(1), original["images"].mean(1),
                                        batch["captions"], original["captions"], strict=True):
            # colour jitter does not move pixels
            candidates = torch.stack([x, y, y.flip(-1)]).flatten(1)
            correlation = torch.corrcoef(candidates)[0, 1:]
            assert correlation.max() > 0.9 > 0.5 > correlation.min()
            flipped = bool(correlation[1] > correlation[0])
            swapped = torch.where(unchanged == left, right,
                                  torch.where(unchanged == right, left, unchanged))
            assert torch.equal(row, swapped if flipped else unchanged)
            observed.add(flipped)
    assert observed == {True, False}
    assert torch.equal(data.captions, plain.captions), "the stored captions are unchanged"


def replace(name, value):
    """A change of an HDF5 file: its dataset `name` becomes `value`, or is removed if None."""
    def change(file):
        del file[name]
        if value is not None:
            file[name] = value
    return change


def attribute(name, value):
    """A change of an HDF5 file: its attribute `name` becomes `value`."""
    return lambda file: file.attrs.modify(name, value) if file.attrs[name] else None


@pytest.mark.parametrize(("change", "message"), [
    (replace("captions", None), "no dataset 'captions'"),
    (replace("captions", np.zeros((COUNT, 7), np.int32)), "damaged"),
    (replace("captions", np.zeros((COUNT - 1, 3, 7), np.int32)), "do not fit"),
    (replace("captions", np.full((COUNT, 3, 7), 999, np.int32)), "its words"),
    (replace("captions", np.full((COUNT, 3, 7), -1, np.int32)), "its words"),
    (replace("captions", np.full((COUNT, 3, 7), 2**32 + 1)), "its words"),
    (replace("captions", np.zeros((0, 3, 7), np.int32)), "empty"),
    (replace("names", np.arange(COUNT)), "damaged"),
    (replace("references", ["no json"] * COUNT), "damaged"),
    (replace("references", ["[]"] * COUNT), "no lists of captions"),
    (replace("references", ["[5]"] * COUNT), "no lists of captions"),
    (replace("references", ['"text"'] * COUNT), "no lists of captions"),
    (replace("paths", ["../x.png"] * COUNT), "lies outside the image folder"),
    (lambda file: file.attrs.__delitem__("wordmap"), "damaged"),
    (attribute("wordmap", "of other words"), "not the word map"),
    (replace("features", None), "no dataset 'features'"),
    (replace("features", np.zeros((COUNT - 1, 4, 3), np.float16)), "of another form"),
    (replace("features", np.zeros((COUNT, 4), np.float16)), "of another form"),
    (replace("features", np.ones((COUNT, 4, 3), np.uint8)),      # of earlier versions
     "type uint8 .*of another form.*preparedataset.py"),
    (attribute("names", "others"), "other images")])
def test_invalid_files(copied, change, message):
    for path in (dataset.split_path(copied, "x", "train"), stub_path(copied)):
        with h5py.File(path, "r+") as file, contextlib.suppress(KeyError):
            change(file)    # KeyError: it concerns the other file
    with refused(message):
        opened(copied, features=stub_path(copied))


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize("which", ["split", "features"])
def test_truncated_hdf5(copied, which, share):
    path = dataset.split_path(copied, "x", "train") if which == "split" else stub_path(copied)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with refused(path.name):
        opened(copied, features=stub_path(copied))


def test_missing_files(copied):
    with refused(r"val_x\.hdf5"):
        CaptionDataset(copied, "x", "val")
    with refused(r"features_no_train_x\.hdf5"):
        opened(copied, features=dataset.features_path(copied, "x", "train", "no"))
    (copied / "x" / "wordmap_x.json").write_text(json.dumps({"a": 0}))
    with refused(r"wordmap_x\.json"):
        opened(copied)


def test_missing_and_damaged_images(prepared, copied):
    with h5py.File(dataset.split_path(copied, "x", "train"), "r+") as file:
        file.attrs["image_folder"] = str(copied / "images")
    data = opened(copied, image_size=16)
    (copied / "images" / "3.png").write_bytes((prepared / "images" / "3.png").read_bytes()[:200])
    with refused(r"3\.png"):
        read_epoch(data, 1, [[3]])
    (copied / "images" / "0.png").unlink()
    with refused(r"0\.png"):
        opened(copied, image_size=16)
    with h5py.File(dataset.split_path(copied, "x", "train"), "r+") as file:
        file.attrs["image_folder"] = ""
    with refused("--image_folder"):
        opened(copied, image_size=16)
