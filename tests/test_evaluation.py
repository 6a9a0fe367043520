"""evaluation.py: the captions of a split, their metrics, and the experiments on explanations."""
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from distributed import run_all
from helpers import call, refused, small_model

import evaluation
import preparedataset
from captioning import checkpoint, decoding
from captioning.data.dataset import CaptionDataset
from captioning.data.predictions import read_references
from captioning.errors import InputError
from captioning.explanation import encoders
from captioning.metrics.object_metrics import frequent_word_scores
from captioning.metrics.object_words import frequent_words, load_objects
from pycocoevalcap import java, spice_jar
from pycocoevalcap.caption_metrics import scores


@pytest.fixture(scope="module")
def weights(demo_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    vocabulary = CaptionDataset(demo_data, "demo", "test").vocabulary
    regions = small_model("aoa", vocabulary, encoder=None, feature_dim=5)
    checkpoint.save(folder / "regions.pth", regions, vocabulary)
    for name in ("gridtd", "aoa"):
        checkpoint.save(folder / f"{name}.pth", small_model(name, vocabulary), vocabulary)
    (folder / "empty.json").write_text("{}")
    return folder


def evaluate(data_folder, *flags):
    """Runs evaluation.py with its default --save_path."""
    assert call(evaluation, "--data_folder", data_folder, "--workers", 0, "--max_len", 6,
                "--device", "cpu", *flags)


def run(data_folder, save_path, *flags):
    """The metrics of a run of evaluation.py."""
    evaluate(data_folder, "--save_path", save_path, *flags)
    return json.loads((Path(save_path) / "metrics_test.json").read_text())


def predictions(path, data, captions):
    path.write_text(json.dumps([{"image": name, "caption": caption} for name, caption in
                                zip(data.names, captions, strict=True)]))
    return path


def read_table(path):
    """The rows of a CSV table that evaluation.py wrote."""
    return pd.read_csv(path, keep_default_na=False, na_values=["nan"])


# -- captions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, method, options", [("gridtd", "beam_search", {"beam_size": 2}),
                                                   ("aoa", "greedy", {})])
def test_captions_equal_the_decoders_and_can_be_scored_again(demo_data, weights, tmp_path, kind,
                                                             method, options):
    metrics = ["--metrics", "bleu", "rouge_l", "cider", "map", "chair"]
    if kind == "gridtd":
        metrics = []        # all by default
    first = run(demo_data, tmp_path, "--weight", weights / f"{kind}.pth", "--decoding", method,
                "--beam_size", 2, "--batch_size", 3, *metrics)
    model, vocabulary = checkpoint.load(weights / f"{kind}.pth")
    data = CaptionDataset(demo_data, "demo", "test", image_size=112)
    with torch.no_grad():
        features = model.encode(data.__getitems__(list(range(len(data))))["images"])
        expected = decoding.decode(model, features, vocabulary, method, 6, **options)
    written = json.loads((tmp_path / "predictions_test.json").read_text())
    assert [item["image"] for item in written] == data.names
    assert [item["caption"] for item in written] == [
        " ".join(vocabulary.decode(ids)) for ids in expected.tolist()]
    again = run(demo_data, tmp_path / "again", "--predictions",
                tmp_path / "predictions_test.json", *metrics)
    assert again == first
    assert {"bleu_1", "bleu_4", "rouge_l", "cider", "chair_i", "chair_s"} <= first.keys()
    assert ("meteor" in first) == (not metrics)
    assert json.loads((tmp_path / "again" / "predictions_test.json").read_text()) == written


def test_correct_captions_score_high_and_hallucinated_objects_are_counted(demo_data, tmp_path):
    data = CaptionDataset(demo_data, "demo", "test")
    boxes = json.loads((demo_data / "demo" / "boxes_demo.json").read_text())

    def score(captions, *metrics):
        path = predictions(tmp_path / "p.json", data, captions)
        return run(demo_data, tmp_path, "--predictions", path, "--metrics", *metrics)
    correct = score([texts[0] for texts in data.references], "bleu", "cider", "chair")
    assert correct["bleu_4"] == pytest.approx(1) and correct["cider"] > 2
    assert correct["chair_i"] == correct["chair_s"] == 0 and correct["object_precision"] == 1
    present = [boxes[name]["categories"] for name in data.names]
    trees = sum("pizza" in names and "tree" in names for names in present)
    wrong = score(["a tree and grass" if "pizza" in names else "a pizza" for names in present],
                  "chair")
    assert wrong["chair_i"] == wrong["chair_s"] == pytest.approx(1 - trees / len(data))
    assert "cider" not in wrong


# -- explanations ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_correctness_is_the_share_inside_the_box(demo_data, weights, tmp_path, monkeypatch, kind):
    data = CaptionDataset(demo_data, "demo", "test", image_size=112)
    monkeypatch.setattr(evaluation, "caption_split",
                        lambda *_: [texts[0] for texts in data.references])
    metrics = run(demo_data, tmp_path, "--weight", weights / f"{kind}.pth", "--explanations",
                  "correctness", "--methods", "lrp", "attention", "--max_images", 2, "--metrics",
                  "map")
    # the same for the first two images, word by word
    model, vocabulary = checkpoint.load(weights / f"{kind}.pth")
    boxes = json.loads((demo_data / "demo" / "boxes_demo.json").read_text())
    words_of = json.loads((demo_data / "demo" / "objects_demo.json").read_text())["words"]
    inside, areas = [], []
    for i in range(2):
        words, entry = data.references[i][0].split(), boxes[data.names[i]]
        ids = torch.tensor([vocabulary.encode(words, len(words))])
        maps = model.lrp(data.__getitems__([i])["images"], ids).pixels[0].sum(1).clamp(min=0)
        for t, word in enumerate(words):
            if word in words_of:
                corners = entry["bbox"][str(entry["categories"][words_of[word]])]
                total = maps[t].sum().clamp(min=1e-30)
                shares = [maps[t, y0:y1, x0:x1].sum() / total for x0, y0, x1, y1 in corners]
                inside.append(max(shares).item())
                sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in corners]
                areas.append(max(sizes) / 112 ** 2)
    assert metrics["explained_words"] == len(inside) > 1
    assert metrics["inside_box_lrp"] == pytest.approx(sum(inside) / len(inside), rel=1e-4)
    assert metrics["box_share"] == pytest.approx(sum(areas) / len(areas), rel=1e-4)
    assert 0 < metrics["inside_box_attention"] < 1


def test_calibration_flags_the_words_below_the_threshold(demo_data, weights, tmp_path, monkeypatch):
    """The captions are references of other images, so that some of their objects are absent."""
    monkeypatch.setattr(evaluation, "caption_split", lambda model, vocabulary, data, *_: [
        texts[0] for texts in [*data.references[2:], *data.references[:2]]])
    weight = tmp_path / "gridtd.pth"
    weight.write_bytes((weights / "gridtd.pth").read_bytes())
    metrics = run(demo_data, tmp_path, "--weight", weight, "--calibrate", "--metrics", "chair")
    threshold = json.loads((tmp_path / "gridtd_grounding.json").read_text())["threshold"]
    test = read_table(tmp_path / "grounding_words_test.csv").pivot_table(
        index=["image", "step", "word"], columns="measure", values="value")
    # no word outside the vocabulary is flagged
    vocabulary = CaptionDataset(demo_data, "demo", "test").vocabulary.wordmap
    is_known = test.index.get_level_values("word").isin(list(vocabulary))
    is_flagged = (test["estimate"] < threshold) & is_known
    assert (is_flagged == (test["flagged"] > 0)).all() and is_flagged.any()
    is_absent = test["present"] == 0
    both = (is_absent & is_flagged).sum()
    assert metrics["flag_recall"] == pytest.approx(both / is_absent.sum())
    assert metrics["flag_precision"] == pytest.approx(both / is_flagged.sum())


EXPERIMENTS = ["ablation", "correctness", "tpfp", "deletion_insertion", "pointing_game",
               "mask_mass", "grounding"]
SCORING = ["--explanations", *EXPERIMENTS, "--methods", "lrp", "attention", "random",
           "--max_images", "4", "--batch_size", "2", "--metrics", "bleu"]


def contents(folder):
    """{file name: content} of the results in a folder, without what records the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and path.name not in ("settings.json", "log.txt")}


def reference_captions(model, vocabulary, data, *_):
    """Instead of caption_split: a reference of each image, of another one for the first two."""
    return [texts[0] for texts in [*data.references[2:4], *data.references[2:]]]


@pytest.fixture(scope="module")
def scored(demo_data, weights, tmp_path_factory):
    """The experiments on four images in a single run; `sanity`, the slowest, on one image."""
    folder = tmp_path_factory.mktemp("scored")
    flags = ["--weight", weights / "gridtd.pth", *SCORING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "caption_split", reference_captions)
        run(demo_data, folder, *flags)
        run(demo_data, folder / "sanity", *flags, "--explanations", "sanity", "--methods",
            "grad_cam", "--max_images", 1)
    return folder


def test_every_experiment_writes_words_table_and_plot(scored):
    for name in [*EXPERIMENTS, "sanity/sanity"]:
        words = read_table(scored / f"{name}_words_test.csv")
        table = read_table(scored / f"{name}_test.csv")
        assert list(words) == ["image", "step", "word", "method", "measure", "value"]
        assert list(table) == ["method", "measure", "mean", "standard_error", "count"]
        assert (scored / f"{name}_test.png").stat().st_size > 3000
        assert set(words["image"]) <= {f"test_0000{i}.png" for i in range(4)}
        assert not words.duplicated(list(words)[:5]).any()
        if name not in ("tpfp", "grounding"):
            for row in table[::7].itertuples():
                of_row = (words["method"] == row.method) & (words["measure"] == row.measure)
                values = words["value"][of_row]
                assert row.count == len(values)
                assert row.mean == pytest.approx(values.mean(), 1e-5)
    assert not {path.name for path in scored.iterdir() if ".tmp" in path.name}
    # the scores of all maps, without a threshold, are metrics as well
    metrics = json.loads((scored / "metrics_test.json").read_text())
    table = read_table(scored / "correctness_test.csv").set_index(["method", "measure"])
    assert metrics["explained_words"] == table["count"]["lrp", 0] > 1
    for method in ("lrp", "attention", "random"):
        expected = table["mean"][method, 0]
        assert metrics[f"inside_box_{method}"] == pytest.approx(expected, rel=1e-5) != 0
    assert metrics["box_share"] == pytest.approx(table["mean"]["box"].iloc[0], rel=1e-5)


def test_two_processes_give_identical_results(demo_data, weights, tmp_path):
    """Also for the captions, which the processes sample together: their seeds are the images'."""
    flags = ["--weight", weights / "aoa.pth", "--data_folder", demo_data, "--workers", "0",
             "--max_len", "12", "--device", "cpu", *SCORING, "--methods", "lrp", "random",
             "--decoding", "sample", "--top_k", "5", "--save_path"]
    for count, name in ((1, "one"), (2, "two")):
        output = run_all([("evaluation", [*flags, tmp_path / name])], tmp_path, count)
        assert output.count("settings:") == 1
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two") and not list((tmp_path / "two").glob("parts_*"))
    assert any(name.startswith("ablation_words") for name in one)
    other = [*flags, tmp_path / "other", "--seed", 2, "--explanations", "tpfp", "--max_images", 1]
    run_all([("evaluation", other)], tmp_path)
    assert contents(tmp_path / "other")["predictions_test.json"] != one["predictions_test.json"]


def test_only_mask_mass_requires_masks(demo_data, weights, tmp_path):
    data = tmp_path / "data"
    (data / "demo").mkdir(parents=True)
    for path in (demo_data / "demo").iterdir():
        if path.name != "masks_demo.hdf5":
            (data / "demo" / path.name).symlink_to(path)
    flags = ["--weight", weights / "gridtd.pth", "--metrics", "bleu", "--max_images", 1,
             "--explanations", "tpfp"]
    run(data, tmp_path / "out", *flags)
    with refused("masks_demo.hdf5 is missing: --explanations mask_mass"):
        run(data, tmp_path / "out", *flags, "mask_mass")


# -- captions and references from files --------------------------------------------------------


def test_chair_without_boxes(tmp_path):
    """Objects that a reference names are present; the demo's, which references omit, need boxes."""
    folder = tmp_path / "flickr8k"
    folder.mkdir()
    lines = [f"{i}.jpg#0\tA dog with a ball .\n" for i in range(3)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines))
    for i, part in enumerate(("train", "dev", "test")):
        (folder / f"Flickr_8k.{part}Images.txt").write_text(f"{i}.jpg\n")
    call(preparedataset, "--dataset", "flickr8k", "--annotation_folder", folder, "--output_folder",
         tmp_path / "data", "--min_word_freq", "1")
    data = CaptionDataset(tmp_path / "data", "flickr8k", "test")
    captions = predictions(tmp_path / "p.json", data, ["a dog and a cat"])
    flags = ["--predictions", captions, "--dataset", "flickr8k", "--metrics", "chair"]
    metrics = run(tmp_path / "data", tmp_path, *flags, "map")
    assert metrics["chair_i"] == 0.5 and metrics["chair_s"] == 1
    path = tmp_path / "data" / "flickr8k" / "objects_flickr8k.json"
    path.write_text('{"words": {"dog": "dog"}, "pairs": []}')
    with refused("has no boxes"):
        run(tmp_path / "data", tmp_path, *flags)


@pytest.fixture
def coco_files(tmp_path):
    """A COCO captions file, its instances, and results for two of its three images."""
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "width": 60, "height": 40}
              for i in (3, 8, 20)]
    captions = [(3, "A dog on grass."), (3, "One puppy runs"), (8, "Two men eat pizza"),
                (8, "a hot dog and a man"), (20, "A bus!")]
    files = {
        "captions": {"images": images, "annotations": [
            {"image_id": i, "caption": text} for i, text in captions]},
        "instances": {
            "images": images,
            "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
            "annotations": [{"image_id": 3, "category_id": 18, "bbox": [0, 0, 9, 9]}]},
        "results": [{"image_id": 8, "caption": "a dog eats pizza with men"},
                    {"image_id": 3, "caption": "a dog on grass"}]}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def coco_flags(folder):
    return ["--predictions", folder / "results.json", "--references", folder / "captions.json"]


def test_coco_results_against_a_coco_captions_file(coco_files):
    flags = [*coco_flags(coco_files), "--boxes", coco_files / "instances.json", "--per_image"]
    with refused("COCO_val2014_000000000020.jpg has no caption"):
        run(coco_files, coco_files / "out", *flags)
    assert not (coco_files / "out").exists()
    metrics = run(coco_files, coco_files / "out", *flags, "--partial")
    captions = ["a dog on grass", "a dog eats pizza with men"]
    references = [["A dog on grass.", "One puppy runs"],
                  ["Two men eat pizza", "a hot dog and a man"]]
    assert metrics["cider"] == scores(captions, references)["cider"]
    # of dog, dog, pizza and person, the dog of the second image is not there, but a hot dog
    assert metrics["chair_i"] == 1 / 4 and metrics["chair_s"] == 1 / 2
    # of COCO's frequent words, dog, grass and pizza are always correct ("a hot dog" contains
    # "dog"), man is never named
    assert metrics["map"] == 1 and metrics["map_recall"] == pytest.approx(3 / 4)
    table = read_table(coco_files / "out" / "per_image_test.csv")
    assert table["image"].tolist() == [f"COCO_val2014_{i:012d}.jpg" for i in (3, 8)]
    assert table["invented_objects"].tolist() == ["", "dog"]
    assert table["objects"][1] == "dog; pizza; person"
    assert table["bleu_4"][0] == pytest.approx(1, abs=1e-3)
    assert {"meteor", "rouge_l", "cider", "chair_s"} <= set(table)


def test_a_metric_that_fails_is_reported_in_one_sentence(coco_files, monkeypatch, capsys):
    """And the others are computed."""
    def no_java():
        raise InputError("no working Java runtime was found")
    monkeypatch.setattr(spice_jar, "ARCHIVE", "http://127.0.0.1:9/corenlp.zip")
    monkeypatch.setattr(java, "runtime", no_java)
    flags = [*coco_flags(coco_files), "--partial", "--bert_model", coco_files, "--metrics",
             "meteor", "spice", "bert"]
    metrics = run(coco_files, coco_files / "out", *flags, "rouge_l")
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert metrics.keys() == {"rouge_l"}
    expected = [" no meteor", " no spice", " no bert"]       # after that of the tokeniser, if any
    assert [line.split(":")[1] for line in warnings[-3:]] == expected
    with refused("none of the metrics"):
        run(coco_files, coco_files / "none", *flags)
    assert not (coco_files / "none" / "metrics_test.json").exists()


def test_boxes_of_other_images(coco_files):
    path = coco_files / "instances.json"
    path.write_text(path.read_text().replace("COCO_val2014_", ""))
    message = "boxes belong to other images, such as 000000000003.jpg"
    with refused(message):
        run(coco_files, coco_files / "out", *coco_flags(coco_files), "--boxes", path, "--partial")
    assert {path.name for path in (coco_files / "out").iterdir()} == {"settings.json", "log.txt"}


def test_generated_captions_against_a_coco_captions_file(demo_data, weights, tmp_path):
    names = CaptionDataset(demo_data, "demo", "test").names[:5]
    content = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
               "annotations": [{"image_id": i, "caption": "a dog by a lake"} for i in range(5)]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    flags = ["--weight", weights / "aoa.pth", "--decoding", "greedy", "--references",
             tmp_path / "captions.json", "--metrics", "bleu"]
    with refused("test_00005.png first"):
        run(demo_data, tmp_path / "out", *flags)
    run(demo_data, tmp_path / "out", *flags, "--partial")
    assert len(json.loads((tmp_path / "out" / "predictions_test.json").read_text())) == 5


@pytest.mark.parametrize("flags, dataset", [([], "coco"), (["--dataset", "demo"], "demo")])
def test_frequent_words_are_those_of_the_given_data_set(demo_data, coco_files, capsys, flags,
                                                        dataset):
    metrics = run(demo_data, coco_files / "out", *flags, *coco_flags(coco_files), "--partial",
                  "--metrics", "map")
    references, _ = read_references(coco_files / "captions.json")
    items = json.loads((coco_files / "out" / "predictions_test.json").read_text())
    words = frequent_words(dataset, load_objects(demo_data, dataset, {}))
    assert metrics == frequent_word_scores(
        [item["caption"] for item in items], [references[item["image"]] for item in items], words)
    assert f"--dataset {dataset} " in capsys.readouterr().out
    assert ("grass" in words) == (dataset == "coco")


# -- flags and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ([], "exactly one of --weight"),
    (["--weight", "no.pth", "--predictions", "p.json"], "exactly one of --weight"),
    (["--weight", "no.pth"], "no.pth"),
    (["--predictions", "p.json", "--explanations", "correctness"],
     "--explanations requires --weight"),
    (["--predictions", "p.json", "--calibrate"], "--calibrate requires --weight"),
    (["--weight", "{weights}/gridtd.pth", "--dataset", "nothing"], "nothing"),
    (["--weight", "{weights}/gridtd.pth", "--boxes", "no.json"], "no.json"),
    (["--weight", "{weights}/regions.pth", "--explanations", "correctness", "--methods",
      "grad_cam"], "region feature"),
    (["--weight", "{weights}/regions.pth"], "bottom_up"),
    (["--weight", "{weights}/gridtd.pth", "--boxes", "{weights}/empty.json", "--explanations",
      "tpfp", "pointing_game"], "empty.json.*it contains no boxes"),
])
def test_invalid_input_is_reported_in_one_sentence(demo_data, weights, tmp_path, flags, message):
    with refused(message):
        run(demo_data, tmp_path, *(flag.format(weights=weights) for flag in flags))


def test_stored_features_of_other_encoder_weights(demo_data, weights, tmp_path):
    """They must be reported: captions of such features would be scored as if they were right."""
    model, vocabulary = checkpoint.load(weights / "gridtd.pth")
    flags = ["--weight", tmp_path / "model.pth", "--metrics", "bleu"]
    torch.manual_seed(1)        # the seed with which preparedataset.py initialised the encoder
    model.encoder.load_state_dict(encoders.build("small").state_dict())
    checkpoint.save(tmp_path / "model.pth", model, vocabulary, {"from_features": True})
    run(demo_data, tmp_path, *flags)
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1.1)
    checkpoint.save(tmp_path / "model.pth", model, vocabulary, {"from_features": True})
    with refused("features_small_test_demo.hdf5"):
        run(demo_data, tmp_path, *flags)


def test_results_are_written_beside_the_input(demo_data, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.pth").write_bytes((weights / "gridtd.pth").read_bytes())
    evaluate(demo_data, "--weight", folder / "model.pth", "--metrics", "bleu")
    assert (folder / "metrics_test.json").exists()
    written = folder / "predictions_test.json"
    reordered = json.dumps(json.loads(written.read_text())[::-1])
    written.write_text(reordered)
    evaluate(demo_data, "--predictions", written, "--metrics", "rouge_l")
    assert json.loads((folder / "metrics_test.json").read_text()).keys() == {"rouge_l"}
    assert written.read_text() == reordered         # the input is not overwritten
    with refused("no.pth"):
        evaluate(demo_data, "--weight", tmp_path / "missing" / "no.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
