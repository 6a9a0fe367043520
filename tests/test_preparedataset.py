"""preparedataset.py from the command line: its output, resumption, and errors for invalid input."""
import json
import re
from collections import Counter

import h5py
import numpy as np
import pytest
from helpers import call, refused
from made_up import random_image
from PIL import Image

import preparedataset
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.detector import DETECTORS
from captioning.data.vocabulary import tokenise
from captioning.explanation import encoders
from captioning.files import read_json

SPLITS = ("train", "val", "test")
SPECIAL = {"<pad>", "<unk>", "<start>", "<end>"}
KARPATHY = "--dataset karpathy --karpathy_json SOURCE/karpathy.json"
CNN = "--features cnn --encoder small --image_folder SOURCE/images --batch_size 2"


@pytest.fixture
def source(tmp_path):
    """A folder with karpathy.json and seven images in images/."""
    (tmp_path / "images").mkdir()
    images = []
    for i, split in enumerate(["train", "train", "restval", "train", "val", "val", "test"]):
        random_image((32, 24), i).save(tmp_path / "images" / f"{i}.jpg")
        texts = ["A dog runs.", f"A word{i} runs"] + ["Only tested words"] * (split == "test")
        images.append({"filename": f"{i}.jpg", "split": split,
                       "sentences": [{"raw": text} for text in texts]})
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    return tmp_path


@pytest.fixture
def prepare(source):
    """Runs the script with the flags in a text, in which SOURCE is that folder."""
    def run(text):
        flags = f"--output_folder SOURCE/out --workers 0 --device cpu {text}"
        call(preparedataset, *flags.replace("SOURCE", str(source)).split())
    return run


def opened(folder, split, dataset="karpathy", **options):
    return CaptionDataset(folder / "out", dataset, split, **options)


def read_features(folder, split, encoder="small"):
    with h5py.File(features_path(folder / "out", "karpathy", split, encoder)) as file:
        return file["features"][:]


def test_captions_are_prepared_without_opening_images(source, prepare, capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an image was opened")
    monkeypatch.setattr(Image, "open", fail)
    prepare(f"{KARPATHY} --min_word_freq 1 --image_folder SOURCE/images")
    train = opened(source, "train")
    assert train.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    # words of the training split
    assert set(train.vocabulary.wordmap) == SPECIAL | {"a", "dog", "runs", "word0", "word1",
                                                       "word2", "word3"}
    assert train.captions.shape == (4, 5, 52)
    assert train.image_folder == str((source / "images").resolve())
    test = opened(source, "test")
    words = test.vocabulary
    assert test.references == [["A dog runs.", "A word6 runs", "Only tested words"]]
    assert test.captions[0, 2, :5].tolist() == [words.start, *[words.unk] * 3, words.end]
    out = capsys.readouterr().out
    assert out.startswith("settings: --dataset karpathy") and "train_karpathy.hdf5" in out
    assert "4 train, 2 val, 1 test images, 15 captions" in out


def test_minimum_frequency_and_maximum_length(source, prepare):
    prepare(f"{KARPATHY} --min_word_freq 2 --max_len 2 --captions_per_image 1")
    train = opened(source, "train")
    assert set(train.vocabulary.words) == SPECIAL | {"a", "dog", "runs"}
    assert train.captions.shape == (4, 1, 4)
    assert (train.captions[:, 0, -1] == train.vocabulary.end).all()


def test_cnn_features_are_computed_once(source, prepare, capsys):
    """A second run leaves the same files."""
    def written():
        return {file.name: file.read_bytes() for file in (source / "out" / "karpathy").iterdir()
                if file.name not in ("settings.json", "log.txt")}
    prepare(f"{KARPATHY} {CNN} --min_word_freq 1")
    files = written()
    assert len(files) == 8
    first = {split: read_features(source, split) for split in SPLITS}
    assert len(first["train"]) == 4
    assert first["train"].shape[2] == encoders.feature_dim(encoders.build("small"))
    path = features_path(source / "out", "karpathy", "val", "small")
    batch = opened(source, "val", features=path).__getitems__([1])
    assert np.array_equal(batch["images"][0].numpy(), first["val"][1].astype(np.float32))
    prepare(f"{KARPATHY} {CNN} --min_word_freq 1")
    assert capsys.readouterr().out.count("already complete") == 3
    assert written() == files


def test_skip_broken_omits_and_counts(source, prepare, capsys):
    flags = f"{KARPATHY} {CNN} --min_word_freq 1"
    (source / "images" / "1.jpg").write_bytes((source / "images" / "0.jpg").read_bytes()[:300])
    (source / "images" / "4.jpg").unlink()
    with refused(r"1 of 7 images are missing, the first being .*4\.jpg"):
        prepare(flags)
    prepare(f"{flags} --skip_broken")
    out = capsys.readouterr().out
    assert "2 broken or missing images omitted" in out and "1.jpg" in out and "4.jpg" in out
    assert opened(source, "train").names == ["0.jpg", "2.jpg", "3.jpg"]
    assert opened(source, "val").names == ["5.jpg"]
    assert [len(read_features(source, split)) for split in ("train", "val")] == [3, 1]
    (source / "images" / "6.jpg").unlink()
    with refused("the test split"):
        prepare(f"{flags} --skip_broken")


@pytest.mark.parametrize(("flags", "message"), [
    ("--dataset flickr30k", "--karpathy_json"),
    ("--dataset karpathy", "--karpathy_json"),
    ("--dataset flickr8k", "--annotation_folder"),
    ("--dataset coco2014", "--annotation_folder"),
    ("--dataset coco2017", "--annotation_folder"),
    ("--dataset coco2017 --karpathy_json SOURCE/karpathy.json --annotation_folder SOURCE",
     "--karpathy_json cannot be used with --dataset coco2017"),
    ("--dataset coco2017 --annotation_folder SOURCE", "captions_train2017.json"),
    ("--dataset coco2017 --annotation_folder SOURCE/none", "SOURCE/none"),
    (f"--dataset coco2017 --annotation_folder {'x' * 5000}", "is not a folder"),
    ("--dataset demo --image_folder SOURCE", "demo"),
    ("--karpathy_json SOURCE/karpathy.json", "--dataset"),
    ("--dataset karpathy --karpathy_json SOURCE/none.json", "SOURCE/none.json"),
    ("--dataset karpathy --karpathy_json SOURCE", "SOURCE"),
    ("--dataset karpathy --karpathy_json SOURCE/images/0.jpg", "0.jpg"),
    (f"{KARPATHY} --image_folder SOURCE/none", "SOURCE/none"),
    (f"{KARPATHY} --features cnn", "--image_folder"),
    (f"{KARPATHY} --skip_broken", "--image_folder"),
    (f"{KARPATHY} --features cnn --encoder small --image_folder SOURCE", "SOURCE/0.jpg"),
    (f"{KARPATHY} {CNN} --encoder_weights SOURCE/none.pth", "SOURCE/none.pth"),
    (f"{KARPATHY} --features bottom_up", "either --bottom_up FOLDER_OR_TSV"),
    (f"{KARPATHY} --features bottom_up --bottom_up . --detector {DETECTORS[0]}",
     "either --bottom_up FOLDER_OR_TSV"),
    (f"{KARPATHY} --features bottom_up --bottom_up SOURCE/none.tsv", "--bottom_up"),
    (f"{KARPATHY} --features bottom_up --bottom_up SOURCE/images", "no features of 0.jpg"),
    (f"{KARPATHY} --min_word_freq 1000", "--min_word_freq"),
    (f"{KARPATHY} --output_folder SOURCE/karpathy.json", "karpathy.json"),
    (f"{KARPATHY} --output_folder /proc/none", "/proc/none")])
def test_invalid_input(source, prepare, flags, message):
    with refused(re.escape(message.replace("SOURCE", str(source)))):
        prepare(flags)


@pytest.mark.parametrize("flag", [
    "--dataset mnist", "--min_word_freq 0", "--max_len -1", "--max_len many",
    "--captions_per_image 0", f"--captions_per_image {'9' * 30}", "--features all",
    "--encoder vgg11", "--batch_size 0", "--workers -1", "--workers 100000", "--bias 1.5",
    "--bias nan", "--test_bias -0.1", "--image_size 4", "--demo_size 5", "--demo_size 3 0 1",
    "--seed -1", "--device tpu", "--no_such_flag 1"])
def test_invalid_flag_values(prepare, flag, capsys):
    with pytest.raises(SystemExit) as error:
        prepare(flag)
    message = capsys.readouterr().err
    assert error.value.code == 2 and flag.split()[0] in message
    assert message.startswith("error: ") and message.count("\n") == 1


def test_coco_2017(source, prepare, shared_data):
    coco = shared_data / "coco_sample"
    prepare(f"--dataset coco2017 --annotation_folder {coco}/annotations --image_folder {coco}")
    data = [opened(source, split, "coco2017", image_size=32) for split in SPLITS]
    assert list(map(len, data)) == [107, 5, 64]
    counts = Counter()
    for texts in data[0].references:
        counts.update(word for text in texts for word in tokenise(text))
    frequent = {word for word, count in counts.items() if count >= 4}
    assert set(data[0].vocabulary.words[1:-3]) == frequent
    boxes = read_json(source / "out" / "coco2017" / "boxes_coco2017.json")
    assert set(boxes) == {name for of_split in data for name in of_split.names}
    for of_split in data:
        assert of_split.__getitems__([0, 3])["images"].shape == (2, 3, 32, 32)


def test_coco_2014_from_either_annotation_format(source, prepare):
    for part, ids in (("train", range(30)), ("val", range(50, 53))):
        content = {
            "images": [{"id": i, "file_name": f"COCO_{part}2014_{i:012d}.jpg"} for i in ids],
            "annotations": [{"image_id": i, "caption": "a dog and a cat"} for i in ids]}
        (source / f"captions_{part}2014.json").write_text(json.dumps(content))
    prepare("--dataset coco2014 --annotation_folder SOURCE")
    assert len(opened(source, "train", "coco2014")) == 29
    first = opened(source, "test", "coco2014").paths[0]
    assert first == "val2014/COCO_val2014_000000000050.jpg"
    prepare(KARPATHY.replace("--dataset karpathy", "--dataset coco2014 --min_word_freq 1"))
    assert len(opened(source, "train", "coco2014")) == 4
