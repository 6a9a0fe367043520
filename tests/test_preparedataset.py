"""preparedataset.py from the command line: its output, resumption, and exit status 2 for invalid
input."""
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import preparedataset
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.vocabulary import tokenise
from captioning.errors import InputError
from captioning.explanation import encoders
from captioning.files import read_json

ROOT = Path(__file__).parents[1]
SPLIT = ["train", "train", "restval", "train", "val", "val", "test"]


def prepare(*flags):
    preparedataset.main(preparedataset.get_args_parser().parse_args([str(flag) for flag in flags]))


def read_features(folder, split):
    with h5py.File(features_path(folder, "karpathy", split, "small")) as file:
        return file["features"][:]


@pytest.fixture
def source(tmp_path):
    """A folder with karpathy.json and seven images in images/."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images = []
    for i, split in enumerate(SPLIT):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3),
                                     dtype=np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
        texts = ["A dog runs.", f"A word{i} runs"] + ["Only tested words"] * (split == "test")
        images.append({"filename": f"{i}.jpg", "split": split,
                       "sentences": [{"raw": text} for text in texts]})
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    return tmp_path


@pytest.fixture
def flags(source):
    return ["--dataset", "karpathy", "--karpathy_json", source / "karpathy.json", "--output_folder",
            source / "out",
            "--min_word_freq", 1, "--workers", 0, "--device", "cpu"]


def cnn(source):
    return ["--features", "cnn", "--encoder", "small", "--image_folder", source / "images",
            "--batch_size", 2]


def test_captions_are_prepared_without_opening_images(source, flags, capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an image was opened")
    monkeypatch.setattr(Image, "open", fail)
    prepare(*flags, "--image_folder", source / "images")
    train = CaptionDataset(source / "out", "karpathy", "train")
    assert train.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert set(train.vocabulary.wordmap) == {"a", "dog", "runs", "word0", "word1", "word2", "word3",
                                             "<pad>", "<unk>", "<start>",
                                             "<end>"}, "words of the training split"
    assert train.captions.shape == (4, 5, 52)
    assert train.image_folder == str((source / "images").resolve())
    test = CaptionDataset(source / "out", "karpathy", "test")
    assert test.references == [["A dog runs.", "A word6 runs", "Only tested words"]]
    unknown = test.vocabulary.unk
    assert (test.captions[0, 2, :5] == torch.tensor([test.vocabulary.start, *[unknown] * 3,
                                                     test.vocabulary.end])).all()
    out = capsys.readouterr().out
    assert out.startswith("settings: --dataset karpathy")
    assert "4 train, 2 val, 1 test images, 15 captions" in out
    assert "train_karpathy.hdf5" in out


def test_minimum_frequency_and_maximum_length(source, flags):
    prepare(*flags, "--min_word_freq", 2, "--max_len", 2, "--captions_per_image", 1)
    train = CaptionDataset(source / "out", "karpathy", "train")
    assert sorted(train.vocabulary.words) == sorted(["a", "dog", "runs", "<pad>", "<unk>",
                                                     "<start>", "<end>"])
    assert train.captions.shape == (4, 1, 4)
    assert (train.captions[:, 0, -1] == train.vocabulary.end).all()


def test_repeated_runs_write_the_same_files(source, flags):
    written = []
    for _ in range(2):
        prepare(*flags)
        written.append({file.name: file.read_bytes()
                        for file in (source / "out" / "karpathy").iterdir()
                        if file.name not in ("settings.json", "log.txt")})
    assert written[0] == written[1] and len(written[0]) == 5


def test_cnn_features_are_computed_once(source, flags, capsys):
    prepare(*flags, *cnn(source))
    first = {split: read_features(source / "out", split) for split in ("train", "val", "test")}
    assert len(first["train"]) == 4
    assert first["train"].shape[2] == encoders.feature_dim(encoders.build("small"))
    data = CaptionDataset(source / "out", "karpathy", "val",
                          features=features_path(source / "out", "karpathy", "val", "small"))
    assert np.array_equal(data.__getitems__([1])["images"][0].numpy(),
                          first["val"][1].astype(np.float32))
    prepare(*flags, *cnn(source))
    assert capsys.readouterr().out.count("already complete") == 3
    assert all(np.array_equal(read_features(source / "out", split), values)
               for split, values in first.items())


def test_skip_broken_omits_and_counts(source, flags, capsys):
    (source / "images" / "1.jpg").write_bytes((source / "images" / "0.jpg").read_bytes()[:300])
    (source / "images" / "4.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 7 images are missing, the first being .*4\.jpg"):
        prepare(*flags, *cnn(source))
    prepare(*flags, *cnn(source), "--skip_broken")
    out = capsys.readouterr().out
    assert "2 broken or missing images omitted" in out and "1.jpg" in out and "4.jpg" in out
    train, val = (CaptionDataset(source / "out", "karpathy", split) for split in ("train", "val"))
    assert train.names == ["0.jpg", "2.jpg", "3.jpg"] and val.names == ["5.jpg"]
    assert read_features(source / "out", "train").shape[0] == 3
    assert read_features(source / "out", "val").shape[0] == 1
    (source / "images" / "6.jpg").unlink()
    with pytest.raises(InputError, match="the test split"):
        prepare(*flags, *cnn(source), "--skip_broken")


def test_truncated_image_is_named_and_the_run_resumes(source, flags):
    path = source / "images" / "3.jpg"
    intact = path.read_bytes()
    path.write_bytes(intact[:300])
    with pytest.raises(InputError, match=r"3\.jpg"):
        prepare(*flags, *cnn(source))
    assert CaptionDataset(source / "out", "karpathy", "train").names[3] == "3.jpg"
    path.write_bytes(intact)
    prepare(*flags, *cnn(source))
    assert read_features(source / "out", "train").any(axis=(1, 2)).all()


def test_demo_can_be_trained_on(demo_data):
    train = CaptionDataset(demo_data, "demo", "train", features=features_path(demo_data, "demo",
                                                                              "train", "small"))
    assert len(train) == 24 and train.__getitems__([0, 23])["images"].shape[0] == 2
    assert set(CaptionDataset(demo_data, "demo",
                              "test").names) <= set(read_json(demo_data / "demo/boxes_demo.json"))
    val = CaptionDataset(demo_data, "demo", "val", image_size=112)
    assert len(val) == 8 and val.__getitems__([0])["images"].shape == (1, 3, 112, 112)


INVALID = [
    (["--dataset", "flickr30k"], "--karpathy_json"),
    (["--dataset", "karpathy"], "--karpathy_json"),
    (["--dataset", "flickr8k"], "--annotation_folder"),
    (["--dataset", "coco2014"], "--annotation_folder"),
    (["--dataset", "coco2017"], "--annotation_folder"),
    (["--dataset", "coco2017", "--karpathy_json", "SOURCE/karpathy.json", "--annotation_folder",
      "SOURCE"], "coco2017"),
    (["--dataset", "coco2017", "--annotation_folder", "SOURCE"], "captions_train2017.json"),
    (["--dataset", "coco2017", "--annotation_folder", "SOURCE/none"], "SOURCE/none"),
    (["--dataset", "coco2017", "--annotation_folder", "x" * 5000], "is not a folder"),
    (["--dataset", "demo", "--image_folder", "SOURCE"], "demo"),
    (["--karpathy_json", "SOURCE/karpathy.json"], "--dataset"),
    (["--dataset", "karpathy", "--karpathy_json", "SOURCE/none.json"], "SOURCE/none.json"),
    (["--dataset", "karpathy", "--karpathy_json", "SOURCE"], "SOURCE"),
    (["--dataset", "karpathy", "--karpathy_json", "SOURCE/images/0.jpg"], "0.jpg"),
    (["KARPATHY", "--image_folder", "SOURCE/none"], "SOURCE/none"),
    (["KARPATHY", "--features", "cnn"], "--image_folder"),
    (["KARPATHY", "--skip_broken"], "--image_folder"),
    (["KARPATHY", "--features", "cnn", "--encoder", "small", "--image_folder", "SOURCE"],
     "SOURCE/0.jpg"),
    (["KARPATHY", "--features", "cnn", "--image_folder", "SOURCE/images", "--encoder_weights",
      "SOURCE/none.pth"],
     "SOURCE/none.pth"),
    (["KARPATHY", "--features", "bottom_up"], "--bottom_up"),
    (["KARPATHY", "--features", "bottom_up", "--bottom_up", "SOURCE/none.tsv"], "--bottom_up"),
    (["KARPATHY", "--features", "bottom_up", "--bottom_up", "SOURCE/images"],
     "no features of 0.jpg"),
    (["KARPATHY", "--min_word_freq", "1000"], "--min_word_freq"),
    (["KARPATHY", "--output_folder", "SOURCE/karpathy.json"], "karpathy.json"),
    (["KARPATHY", "--output_folder", "/proc/none"], "/proc/none"),
]


@pytest.mark.parametrize(("flags", "message"), INVALID, ids=[" ".join(flags)[:60]
                                                             for flags, _ in INVALID])
def test_invalid_input(source, flags, message):
    karpathy = ["--dataset", "karpathy", "--karpathy_json", "SOURCE/karpathy.json"]
    expanded = [karpathy if flag == "KARPATHY" else [flag] for flag in flags]
    flags = [flag.replace("SOURCE", str(source)) for group in expanded for flag in group]
    with pytest.raises(InputError) as error:
        prepare("--output_folder", source / "out", "--device", "cpu", "--workers", 0, *flags)
    assert message.replace("SOURCE", str(source)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("flag", "value"), [
    ("--dataset", "mnist"), ("--min_word_freq", "0"), ("--max_len", "-1"), ("--max_len", "many"),
    ("--captions_per_image", "0"), ("--captions_per_image", "9" * 30), ("--features", "all"),
    ("--encoder", "vgg11"),
    ("--batch_size", "0"), ("--workers", "-1"), ("--workers", "100000"), ("--bias", "1.5"),
    ("--bias", "nan"),
    ("--image_size", "4"), ("--demo_size", "5"), ("--seed", "-1"), ("--device", "tpu"),
    ("--no_such_flag", "1")])
def test_invalid_flag_values(flag, value, capsys):
    with pytest.raises(SystemExit) as error:
        prepare(flag, value)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and flag in message and message.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu():
    with pytest.raises(InputError, match="--device cuda"):
        prepare("--device", "cuda")


def test_exit_status_2_without_traceback(source):
    process = subprocess.run([sys.executable, ROOT / "preparedataset.py", "--dataset", "karpathy",
                              "--karpathy_json",
                            source / "none.json"], capture_output=True, text=True, cwd=source,
                             timeout=120)
    assert process.returncode == 2 and process.stdout.startswith("settings: ")
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert "none.json" in process.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_unwritable_output_folder(source, flags):
    (source / "out").mkdir(mode=0o500)
    with pytest.raises(InputError, match="not writable"):
        prepare(*flags)


def test_coco_2017(tmp_path, shared_data):
    coco = shared_data / "coco_sample"
    prepare("--dataset", "coco2017", "--annotation_folder", coco / "annotations", "--image_folder",
            coco,
            "--output_folder", tmp_path)
    data = {split: CaptionDataset(tmp_path, "coco2017", split, image_size=32)
            for split in ("train", "val", "test")}
    assert [len(split_data) for split_data in data.values()] == [107, 5, 64]
    counts = Counter(word for texts in data["train"].references for text in texts
                     for word in tokenise(text))
    assert set(data["train"].vocabulary.words[1:-3]) == {word for word, count in counts.items()
                                                         if count >= 4}
    boxes = read_json(tmp_path / "coco2017" / "boxes_coco2017.json")
    assert set(boxes) == {name for split_data in data.values() for name in split_data.names}
    assert all(split_data.__getitems__([0, 3])["images"].shape == (2, 3, 32, 32)
               for split_data in data.values())


def test_coco_2014_from_either_annotation_format(tmp_path, source):
    for part, ids in (("train", range(30)), ("val", range(50, 53))):
        images = [{"id": i, "file_name": f"COCO_{part}2014_{i:012d}.jpg"} for i in ids]
        captions = [{"image_id": i, "caption": "a dog and a cat"} for i in ids]
        (tmp_path / f"captions_{part}2014.json").write_text(json.dumps({"images": images,
                                                                        "annotations": captions}))
    prepare("--dataset", "coco2014", "--annotation_folder", tmp_path, "--output_folder",
            tmp_path / "coco")
    assert len(CaptionDataset(tmp_path / "coco", "coco2014", "train")) == 29
    assert CaptionDataset(tmp_path / "coco", "coco2014",
                          "test").paths[0] == "val2014/COCO_val2014_000000000050.jpg"
    prepare("--dataset", "coco2014", "--karpathy_json", source / "karpathy.json", "--output_folder",
            tmp_path / "k")
    assert len(CaptionDataset(tmp_path / "k", "coco2014", "train")) == 4


def test_real_vgg16_features(tmp_path, shared_data):
    """Stored features of a real photograph equal those of a direct forward pass."""
    coco, weights = shared_data / "coco_sample", shared_data / "vgg16_features.pth"
    names = sorted(path.name for path in (coco / "val2017").iterdir())[:3]
    images = [{"filename": name, "split": split, "sentences": [{"raw": "a picture"}]}
              for name, split in zip(names, ("train", "val", "test"), strict=True)]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    prepare("--dataset", "karpathy", "--karpathy_json", tmp_path / "k.json", "--image_folder",
            coco / "val2017",
            "--output_folder", tmp_path, "--min_word_freq", 1, "--features", "cnn",
            "--encoder_weights", weights,
            "--device", "cpu", "--workers", 0)
    data = CaptionDataset(tmp_path, "karpathy", "val", image_size=224)
    with torch.inference_mode():
        expected = encoders.build("vgg16",
                                  weights)(data.__getitems__([0])["images"]).flatten(2).transpose(1,
                                                                                                  2)
    with h5py.File(features_path(tmp_path, "karpathy", "val", "vgg16")) as file:
        stored = torch.from_numpy(file["features"][:]).float()
    assert stored.shape == (1, 196, 512)
    assert (stored - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_moved_images_are_reported(source, flags):
    prepare(*flags, "--image_folder", source / "images")
    shutil.move(source / "images", source / "elsewhere")
    with pytest.raises(InputError, match="--image_folder"):
        CaptionDataset(source / "out", "karpathy", "train", image_size=16)
