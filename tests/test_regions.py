"""Region features from end to end: masking, and explanations drawn as boxes."""
import csv
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from helpers import (
    MODELS,
    call,
    encoded,
    literal_of_regions,
    make,
    reds_and_blues,
    refused,
    small_model,
)

import evaluation
import explain
from captioning import checkpoint
from captioning.data import bottom_up
from captioning.data.annotations import Record
from captioning.data.dataset import CaptionDataset, features_path, split_path
from captioning.data.vocabulary import read

COUNTS = [3, 5, 1, 5, 5, 5, 5, 5]       # number of regions of each test image, at most 5


@pytest.fixture(scope="module")
def data(demo_data, tmp_path_factory):
    """A copy of the demo data folder with region features of 6 channels for its test images."""
    folder = tmp_path_factory.mktemp("regions") / "data"
    shutil.copytree(demo_data, folder)
    with h5py.File(split_path(demo_data, "demo", "test")) as file:
        names = file["names"].asstr()[:].tolist()
    rng = np.random.default_rng(0)
    boxes = [np.sort(rng.uniform(0, 112, (n, 2, 2)), axis=1).reshape(n, 4) for n in COUNTS]
    store(folder, "test", names, boxes, [rng.random((n, 6)) for n in COUNTS])
    return folder


def store(data, split, names, boxes, features):
    """Stores region features of the images `names`, as a tsv file contains them."""
    rows = [f"{name}\t112\t112\t{len(x)}\t{encoded(corners)}\t{encoded(x)}"
            for name, corners, x in zip(names, boxes, features, strict=True)]
    (data / "regions.tsv").write_text("\n".join(rows))
    path = features_path(data, "demo", split, "bottom_up")
    records = [Record(name, name, split, [], []) for name in names]
    bottom_up.store(path, records, data / "regions.tsv", regions=5)
    return path


@pytest.fixture(scope="module", params=["gridtd", "aoa"])
def weights(request, data, tmp_path_factory):
    words = read(data / "demo" / "wordmap_demo.json")
    path = tmp_path_factory.mktemp("weights") / "x.pth"
    checkpoint.save(path, small_model(request.param, words, encoder=None, feature_dim=6), words)
    return path


def run(weights, data, save_path, flags="", dataset="--dataset demo --max_len 6"):
    """Runs explain.py -> {folder: its arrays}."""
    flags = (f"--weight {weights} --data_folder {data} --save_path {save_path} --device cpu "
             f"{dataset} {flags}")
    call(explain, *flags.split())
    return {path.parent.name: dict(np.load(path)) for path in save_path.glob("*/explanation.npz")}


@MODELS
@pytest.mark.parametrize("method", ["lrp", "gradient", "guided_backprop"])
def test_padding_does_not_change_explanations(model_type, method):
    """An image of 3 regions has the same explanation in a batch of images with 5 as alone."""
    model, captions = make(model_type), torch.tensor([[1, 7, 3, 9]] * 3)
    features = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[1, 3:], features[2, 1:] = 0, 0
    batched = getattr(model, method)(features, captions)
    for b, n in enumerate([5, 3, 1]):
        alone = getattr(model, method)(features[b:b + 1, :n], captions[:1])
        assert not batched.features[b, :, n:].any() and not batched.attention[b, ..., n:].any()
        for part in ("logits", "words"):
            torch.testing.assert_close(getattr(batched, part)[b:b + 1], getattr(alone, part))
        torch.testing.assert_close(batched.features[b:b + 1, :, :n], alone.features)
        torch.testing.assert_close(batched.attention[b:b + 1, ..., :n], alone.attention)


def test_explanations_of_a_split(weights, data, tmp_path, capsys):
    """Methods that need pixels are omitted with a message."""
    methods = ["lrp", "gradient", "guided_backprop", "attention"]
    flags = f"--max_images 4 --methods grad_cam {' '.join(methods)} guided_grad_cam"
    explanations = run(weights, data, tmp_path, f"{flags} --batch_size 3")
    output = capsys.readouterr().out
    assert output.count("have no pixel maps: grad_cam, guided_grad_cam omitted\n") == 1
    assert len(explanations) == 4
    features = features_path(data, "demo", "test", "bottom_up")
    split = CaptionDataset(data, "demo", "test", features=features)
    model, vocabulary = checkpoint.load(weights)
    for i, (name, n) in enumerate(zip(split.names[:4], COUNTS, strict=False)):
        arrays = explanations[name.removesuffix(".png")]
        T = len(arrays["words"]) - 1
        assert arrays["boxes"].shape == (n, 4) and arrays["methods"].tolist() == methods
        assert not any(key.endswith("_pixels") for key in arrays)
        assert arrays["lrp_regions"].shape == arrays["attention_regions"].shape == (T, n)
        np.testing.assert_allclose(arrays["attention_regions"].sum(1), 1, rtol=1e-5)
        ids = torch.tensor([[vocabulary.wordmap[word] for word in arrays["words"]]])
        expected = model.lrp(split.read_features([i]), ids).features.sum(-1)[0, :, :n]
        np.testing.assert_allclose(arrays["lrp_regions"], expected.numpy(), rtol=1e-4, atol=1e-5)
        folder = tmp_path / name.removesuffix(".png")
        assert max(reds_and_blues(folder / "lrp.png")) > 20
    again = run(weights, data, tmp_path, flags)
    assert {name: str(arrays["identity"]) for name, arrays in again.items()} == {
        name: str(arrays["identity"]) for name, arrays in explanations.items()}


@pytest.mark.parametrize("flags, message", [
    ("--images .", "region features.*give --dataset"),
    ("--dataset demo --methods grad_cam", "no pixel maps: choose other --methods than grad_cam"),
    ("--dataset demo --split train", "features_bottom_up_train_demo.hdf5.*preparedataset.py")])
def test_flags_that_region_features_do_not_permit(weights, data, tmp_path, flags, message):
    with refused(message):
        run(weights, data, tmp_path, dataset=flags)


def test_evaluation_measures_regions(weights, data, tmp_path, monkeypatch, capsys):
    """Correctness of every word equals its definition; experiments that need pixels are omitted."""
    features = features_path(data, "demo", "test", "bottom_up")
    split = CaptionDataset(data, "demo", "test", features=features)
    captions = [texts[0] for texts in split.references]
    monkeypatch.setattr(evaluation, "caption_split", lambda *_: captions)
    flags = (f"--weight {weights} --data_folder {data} --workers 0 --device cpu --metrics bleu "
             f"--save_path {tmp_path} --batch_size 3 --explanations correctness tpfp ablation "
             "--methods lrp attention random grad_cam")
    call(evaluation, *flags.split())
    output = capsys.readouterr().out
    assert "no pixel maps: grad_cam omitted" in output
    assert "no pixel maps: tpfp, patch_ablation omitted" in output
    model, vocabulary = checkpoint.load(weights)
    boxes, words_of = (json.loads((data / "demo" / f"{name}_demo.json").read_text())
                       for name in ("boxes", "objects"))
    expected = {"lrp": [], "attention": [], "even": []}
    for i, caption in enumerate(captions):
        words, entry, n = caption.split(), boxes[split.names[i]], COUNTS[i]
        explanation = model.lrp(split.read_features([i]),
                                torch.tensor([vocabulary.encode(words, len(words))]))
        attention = explanation.attention[0]
        attention = attention.mean(1) if attention.dim() == 3 else attention
        regions = split.read_boxes([i])[0][:n].double() / 112
        for t, word in enumerate(words):
            if word in words_of["words"]:
                number = entry["categories"][words_of["words"][word]]
                word_boxes = torch.tensor(entry["bbox"][str(number)]).double() / 112
                for name, relevance in (("lrp", explanation.features[0, t].sum(-1)),
                                        ("attention", attention[t]),
                                        ("even", torch.ones(5))):
                    positive = relevance[:n].clamp(min=0).sum() > 0
                    expected[name].append(literal_of_regions(relevance[:n], regions, word_boxes, 0)
                                          if positive else 0)
    metrics = json.loads((tmp_path / "metrics_test.json").read_text())
    table, ablation = (
        list(csv.DictReader((tmp_path / f"{name}_test.csv").read_text().splitlines()))
        for name in ("correctness", "ablation"))
    table = {(row["method"], row["measure"]): row for row in table}
    count = int(table["lrp", "0.0"]["count"])
    assert count == len(expected["lrp"]) == metrics["explained_words"] > 5
    for name, values in expected.items():
        assert float(table[name, "0.0"]["mean"]) == pytest.approx(np.mean(values), rel=1e-4)
        assert metrics[f"inside_box_{name}"] == pytest.approx(np.mean(values), rel=1e-4)
    assert ("random", "0.5") in table and (tmp_path / "correctness_test.png").exists()
    assert {row["measure"] for row in ablation} == {"stop_word_drop", "object_word_drop"}


def test_images_of_another_size_than_their_regions_are_rejected(weights, data, tmp_path,
                                                                monkeypatch):
    read_image = explain.read_image
    monkeypatch.setattr(explain, "read_image", lambda path, upright: (
        read_image(path, upright)[:, ::2, ::2]))
    with refused("regions beyond .*test_0000"):
        run(weights, data, tmp_path)


def test_features_without_boxes_cannot_be_drawn(weights, data, tmp_path):
    """Captioning does not need them."""
    with h5py.File(split_path(data, "demo", "val")) as file:
        names = file["names"].asstr()[:].tolist()
    features = np.random.default_rng(0).random((len(names), 4, 6))
    store(data, "val", names, np.zeros((len(names), 4, 4)), features)
    with refused(r"for val_00000\.png .*no boxes"):
        run(weights, data, tmp_path / "out", "--split val")
