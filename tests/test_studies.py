"""The studies: tables of runs with known numbers, changed captions, and bad input."""
import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from helpers import train_run
from PIL import Image

import evaluation
from captioning import explain, grounding
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.errors import run_script
from captioning.explanation.methods import SPLIT
from captioning.metrics.object_words import Objects, load_objects
from studies.before_after import before_after
from studies.flickr8k import flickr8k
from studies.grounded_decoding import grounded_decoding
from studies.hallucination import hallucination
from studies.memory import memory

STUDIES = Path(__file__).parents[1] / "studies"
OBJECTS = Objects({"dog": "dog", "ball": "ball"}, pairs=[("dog", "ball")], exact=True)


def run(study, *arguments):
    run_script(study.main, study.get_args_parser().parse_args([str(x) for x in arguments]))


def test_every_study_ends_with_run_script_and_is_described():
    scripts = [path for path in STUDIES.rglob("*.py") if "__main__" in path.read_text("utf-8")]
    assert len(scripts) > 5
    for path in scripts:
        assert path.read_text("utf-8").splitlines()[-1].startswith("    run_script(")
        assert path.parent == STUDIES or path.name in (path.parent / "README.md").read_text("utf-8")


@pytest.mark.parametrize("study, arguments, message", [
    (grounded_decoding, ["none.pth", "scores"],
     "grounding_words_val.csv cannot be read .*: run evaluation.py --calib"),
    (grounded_decoding, ["none.pth", "scores", "--max_images", "0"], "a whole number at least 1"),
    (hallucination, ["none"], "no finished runs: run studies/hallucination/run.sh first"),
    (flickr8k, ["none"], "no finished runs: run studies/flickr8k/run.sh first")])
def test_missing_files_are_named_in_one_sentence(study, arguments, message, capsys, tmp_path,
                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(study, *arguments)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip().split("\n")[-1])


def test_scores_of_grounded_decoding(tmp_path):
    path = tmp_path / "grounding_words_val.csv"
    head = "image,step,word,method,measure,value\n"
    path.write_text(head + "a.png,0,dog,lrp,share,1\n")
    assert grounding.read_scores(tmp_path, "val").empty
    rows = [f"{image}.png,1,{word},any,{name},{value}"
            for image, word, value in (("a", "dog", 1), ("b", "null", 0))
            for name in (*grounding.SCORES[:-1], "present")]
    path.write_text(head + "\n".join(rows))
    table = grounding.read_scores(tmp_path, "val")
    assert table.absolute_share.tolist() == [1, 0] and table.present.tolist() == [1, 0]
    assert table.index.get_level_values("word").tolist() == ["dog", "null"]


# -- tables of fine-tuned models ----------------------------------------------------------------


def write_metrics(folder, run, mode, **values):
    path = folder / run / mode / "metrics_test.json"
    path.parent.mkdir(parents=True)
    names = {**hallucination.METRICS, **flickr8k.SHOWN}
    path.write_text(json.dumps(dict.fromkeys(names, 0.5) | values))


def write_runs(folder, models, seeds, modes=hallucination.MODES):
    """Hallucinated companions: 0.4 + seed / 100 in the base, 0.1 less after lrp."""
    decrease = {"base": 0, "ce": 0, "erase": 0.2, "lrp": 0.1, "cider": 0.2, "lrp_cider": 0.2}
    for model in models:
        for seed in seeds:
            for mode in modes:
                invented = 0.4 + seed / 100 - decrease[mode] * (1 + (seed - 2) / 10)
                write_metrics(folder, f"{model}_{seed}", mode, companions_invented=invented)


def table_rows(text, column):
    """{first cell: cell of the column} of Markdown tables."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {line[0]: line[column] for line in lines if len(line) > column}


def test_table_of_means_standard_errors_and_paired_differences(tmp_path):
    write_runs(tmp_path, ("gridtd", "aoa"), (1, 2, 3))
    (tmp_path / "gridtd_4" / "base").mkdir(parents=True)        # unfinished: not counted
    (tmp_path / "gridtd_4" / "base" / "metrics_test.json").write_text("{}")
    write_runs(tmp_path, ("aoa",), (5,), ("base", "ce"))        # the other modes are not finished
    for mode, invented in (("ce", 0.3), ("erase", 0.1), ("erase_mask", 0.15)):
        write_metrics(tmp_path, "gridtd_1", f"{mode}_epochs4", companions_invented=invented)
    for weight in ("0.03", "1"):
        write_metrics(tmp_path, "gridtd_1", f"erase_mu{weight}")
    run(hallucination, tmp_path)
    column = 1 + list(hallucination.METRICS).index("companions_invented")
    rows = table_rows((tmp_path / "table.md").read_text(), column)
    assert "gridtd, 3 seeds" in rows and "aoa, 4 seeds" in rows and "lrp (seeds 1, 2, 3)" in rows
    assert rows["base"] == "0.420 ± 0.006"                      # 0.41, 0.42, 0.43
    assert rows["lrp"] == "0.320 ± 0.000"                       # 0.32 each
    assert rows["lrp − ce"] == "-0.100 ± 0.006 (p = 0.0033)"    # -0.09, -0.10, -0.11
    assert rows["cider − ce"].startswith("-0.200 ± 0.012") and "ce − ce" not in rows
    assert rows["erase_epochs4 (seeds 1) − ce_epochs4"] == "-0.200"
    assert rows["erase_mask_epochs4 (seeds 1) − ce_epochs4"] == "-0.150"
    assert not any(name.startswith("ce_epochs4 (seeds 1) −") for name in rows)
    cider = table_rows((tmp_path / "table.md").read_text(), 1)
    assert cider["lrp − ce"] == "+0.000 ± 0.000 (p = 1.0000)"
    assert (tmp_path / "trade_off.png").stat().st_size > 5000


def test_tables_of_flickr8k(demo_data, tmp_path, capsys, monkeypatch):
    """CHAIR_i of captions that name one absent object each is 100 %, of references 0 %."""
    words = load_objects(demo_data, "demo", {}).words
    objects = Objects({" ".join(phrase): category for phrase, category in words.items()})
    monkeypatch.setattr(flickr8k, "load_objects", lambda *_: objects)
    data = CaptionDataset(demo_data, "demo", "test")
    for seed in (1, 2):
        for mode in ("base", "ce", "erase"):
            write_metrics(tmp_path, f"aoa_{seed}", mode, cider=0.1 * seed + (mode == "erase"))
            captions = [caption[0] for caption in data.references]
            if mode == "ce":
                captions = [absent_object(caption) for caption in data.references]
            (tmp_path / f"aoa_{seed}" / mode / "predictions_test.json").write_text(json.dumps(
                [{"image": name, "caption": caption}
                 for name, caption in zip(data.names, captions, strict=True)]))
    run(flickr8k, tmp_path, "--dataset", "demo", "--data_folder", demo_data)
    output = capsys.readouterr().out
    cider = table_rows(output, 4)      # in the second table, the difference of CHAIR_i
    assert cider["ce"] == "15.0 ± 5.0" and cider["erase − ce"].startswith("+100.0 ± 0.0")
    assert cider["`aoa`, erase"] == "-100.0 [-100.0, -100.0]" and cider["`aoa`, ce"] == ""


def absent_object(references):
    """A caption that names an object which none of the references names."""
    words = " ".join(references).split()
    name = next(name for name in ("dog", "cat", "umbrella", "bicycle", "chair")
                if not {name, f"{name}s"} & set(words))
    return f"a {name}"


# -- what fine-tuning changed -------------------------------------------------------------------


def test_changed_captions_are_shown_first():
    cases = [(i, "dog", "ball") for i in range(4)]
    with_ball, without = "a dog with a ball", "a dog"
    captions = [[with_ball, without, with_ball, without], [with_ball, without, without, with_ball]]
    selected, removed, added = before_after.select(cases, captions, OBJECTS, 3)
    assert (removed, added) == (1, 1)
    assert [(i, hallucinated) for i, _, _, hallucinated in selected] == [
        (2, (True, False)), (3, (False, True)), (0, (True, True))]


@pytest.mark.parametrize("caption, expected", [
    ("a dog with a ball", (4, "ball")), ("a dog", (1, "dog")), ("nothing", (0, "nothing")),
    ("", (0, "<end>"))])
def test_the_word_that_is_explained(caption, expected):
    assert before_after.explained_step(caption.split(), OBJECTS, "dog", "ball") == expected


def test_figure_of_two_models(demo_data, tmp_path, capsys):
    folders = [tmp_path / name for name in ("before", "after")]
    for folder, seed in zip(folders, "12", strict=True):
        train_run(demo_data, folder, "--epochs", "1", "--seed", seed, "--decoder_lr", "1e-2")
        run(evaluation, "--weight", folder / "checkpoint_best.pth", "--data_folder", demo_data,
            "--save_path", folder, "--metrics", "chair", "--decoding", "greedy", "--device", "cpu",
            "--workers", "0")
    data = CaptionDataset(demo_data, "demo", "test")
    boxes = load_boxes(demo_data / "demo" / "boxes_demo.json")
    objects = load_objects(demo_data, "demo", boxes)
    cases = before_after.images_without_companion(data, boxes, objects)
    for i, first, companion in cases:
        present = boxes[data.names[i]]["categories"]
        assert first in present and companion not in present
    capsys.readouterr()
    run(before_after, *folders, "--data_folder", demo_data)
    assert f"hallucinated companions of {len(cases)} images" in capsys.readouterr().out
    figure = np.asarray(Image.open(tmp_path / "after" / "before_after.png"))
    assert figure.shape[1] == 924 and figure.std() > 10


# -- memory of long runs, and a captioner of transformers ---------------------------------------


def test_memory_of_long_runs(tmp_path, capsys):
    """From the samples of finished runs; its commands are valid, and a session uses something."""
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/test_demo.hdf5").touch()
    for command in memory.commands(tmp_path):
        script, *flags = command.split()
        import_module(script.removesuffix(".py")).get_args_parser().parse_args(flags)
        rows = "".join(f"{100 + second},{second}\n" for second in range(10))
        (tmp_path / f"{script}.csv").write_text(f"MB,open files\n{rows}")
    run(memory, "--save_path", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0] == (
        "train.py: median of the second fifth of the time 102 MB, 2 open files")
    assert lines[-1] == "explain.py: median of the last fifth of the time 108 MB, 8 open files"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts as Linux does")
def test_memory_of_a_command(tmp_path):
    table = memory.measure("-c __import__('time').sleep(1.5)", tmp_path / "log")
    assert len(table) >= 2 and table["MB"].max() > 1 and table["open files"].max() >= 3


def test_captioner_of_transformers(demo_data, tmp_path):
    pytest.importorskip("transformers")
    from studies.transformer import train
    run(train, "--data_folder", demo_data, "--epochs", "1", "--save_path", tmp_path)
    image = demo_data / "demo" / "images" / "test_00000.png"
    explained = explain(image, weight=tmp_path, caption="a dog", methods=("lrp",))
    assert explained.words == ["a", "dog", "<end>"]
    total = sum(explained.split[part] for part in SPLIT)
    np.testing.assert_allclose(total, explained.logits, rtol=1e-3, atol=1e-3)
