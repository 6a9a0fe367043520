"""Table of the hallucination experiment and figure of before_after.py, on runs with known numbers."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import train_run
from PIL import Image

import evaluation
from captioning.errors import InputError
from captioning.metrics.object_words import Objects
from studies import before_after, hallucination
from studies.cider_by_companion import GROUPS, group


def write_runs(folder, models=("gridtd", "aoa"), seeds=(1, 2, 3), modes=hallucination.MODES):
    """Hallucinated companions: 0.4 + seed / 100 in the base, 0.1 less after lrp, 0.2 after cider."""
    decrease = {"base": 0, "ce": 0, "erase": 0.2, "lrp": 0.1, "cider": 0.2, "lrp_cider": 0.2}
    for model in models:
        for seed in seeds:
            for mode in modes:
                path = folder / f"{model}_{seed}" / mode / "metrics_test.json"
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps(dict.fromkeys(hallucination.METRICS, 0.5) | {
                    "companions_invented": 0.4 + seed / 100 - decrease[mode] * (1 + (seed - 2) / 10)}))


def test_table_of_means_standard_errors_and_paired_differences(tmp_path):
    write_runs(tmp_path)
    (tmp_path / "gridtd_4" / "base").mkdir(parents=True)        # unfinished: not counted
    (tmp_path / "gridtd_4" / "base" / "metrics_test.json").write_text("{}")
    write_runs(tmp_path, ("aoa",), (5,), ("base", "ce"))     # the other modes are not finished
    for mode, invented in (("ce", 0.3), ("erase", 0.1), ("erase_mask", 0.15)):      # variants with their own control
        (tmp_path / "gridtd_1" / f"{mode}_epochs4").mkdir()
        (tmp_path / "gridtd_1" / f"{mode}_epochs4" / "metrics_test.json").write_text(json.dumps(
            dict.fromkeys(hallucination.METRICS, 0.5) | {"companions_invented": invented}))
    hallucination.main(hallucination.get_args_parser().parse_args([str(tmp_path)]))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in (tmp_path / "table.md").read_text().splitlines()]
    column = 1 + list(hallucination.METRICS).index("companions_invented")
    rows = {line[0]: line[column] for line in lines if len(line) > column}
    assert "gridtd, 3 seeds" in rows and "aoa, 4 seeds" in rows and "lrp (seeds 1, 2, 3)" in rows
    assert rows["base"] == "0.420 ± 0.006"                      # 0.41, 0.42, 0.43
    assert rows["lrp"] == "0.320 ± 0.000"                       # 0.32 each
    assert rows["lrp − ce"] == "-0.100 ± 0.006"                 # -0.09, -0.10, -0.11
    assert rows["cider − ce"] == "-0.200 ± 0.012" and "ce − ce" not in rows
    assert rows["erase_epochs4 (seeds 1) − ce_epochs4"] == "-0.200"
    assert rows["erase_mask_epochs4 (seeds 1) − ce_epochs4"] == "-0.150"
    assert not any(name.startswith("ce_epochs4 (seeds 1) −") for name in rows)
    assert ["gridtd, lrp", "companions invented", "-0.100 ± 0.006", "3", "0.0033", "0.2500"] in lines
    for figure in ("differences.png", "trade_off.png"):
        assert (tmp_path / figure).stat().st_size > 5000


@pytest.mark.parametrize("values, t_test, sign_test", [
    ([1.0, 2.0], 0.2048, 0.5), ([1.0, 2.0, 3.0], 0.0742, 0.25), ([-1.0, 2.0, 3.0, 4.0], 0.1612, 0.625),
    ([0.1, 0.2, 0.3, 0.2, 0.1], 0.0086, 0.0625), ([-3.0, 1.0, 1.5, 2.0, 0.5, -1.0], 0.8351, 0.6875),
    ([0.0, 0.0], 1.0, 1.0)])
def test_p_values(values, t_test, sign_test):
    """t-tests against scipy.stats.ttest_1samp, sign tests against counts of equally likely signs."""
    assert hallucination.paired_t_test(values) == pytest.approx(t_test, abs=1e-4)
    assert hallucination.sign_test(values) == sign_test


def test_a_folder_without_runs_is_rejected(tmp_path):
    with pytest.raises(InputError, match="contains no finished runs.*hallucination_experiment.sh"):
        hallucination.read_runs(tmp_path)


def test_changed_captions_are_shown_first():
    objects = Objects({"dog": "dog", "ball": "ball"}, pairs=[("dog", "ball")], exact=True)
    cases = [(i, "dog", "ball") for i in range(4)]
    with_ball, without = "a dog with a ball", "a dog"
    captions = [[with_ball, without, with_ball, without], [with_ball, without, without, with_ball]]
    selected, removed, added = before_after.select(cases, captions, objects, 3)
    assert (removed, added) == (1, 1)
    assert [(i, hallucinated) for i, _, _, hallucinated in selected] == [
        (2, (True, False)), (3, (False, True)), (0, (True, True))]
    changed = [(with_ball, without), (without, with_ball), ("a dog", "a ball"), ("a ball", "a ball")]
    data = SimpleNamespace(names=list("abcd"), references=[[]] * 4)
    counts = before_after.changes(data, {name: {"categories": {"dog": 1}} for name in "abcd"}, objects,
                                  list(zip(*changed, strict=True)))
    assert list(counts.values()) == [[1, 2], [0, 1]]       # ball: removed from a, added to b and c; dog lost in c
    assert before_after.explained_step(with_ball.split(), objects, "dog", "ball") == (4, "ball")
    assert before_after.explained_step(without.split(), objects, "dog", "ball") == (1, "dog")
    assert before_after.explained_step(["nothing"], objects, "dog", "ball") == (0, "nothing")


def test_of_an_empty_caption_its_end_is_explained():
    objects = Objects({"dog": "dog", "ball": "ball"}, pairs=[("dog", "ball")], exact=True)
    assert before_after.explained_step([], objects, "dog", "ball") == (0, "<end>")


def test_figure_of_two_models(demo_data, tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("before", "after")]
    for folder, seed in zip(folders, "12", strict=True):
        train_run(demo_data, folder, "--epochs", "1", "--seed", seed, "--decoder_lr", "1e-2")
        evaluation.main(evaluation.get_args_parser().parse_args(
            ["--weight", f"{folder}/checkpoint_best.pth", "--data_folder", str(demo_data), "--save_path", folder,
             "--metrics", "bleu", "cider", "chair", "--decoding", "greedy", "--device", "cpu", "--workers", "0"]))
    arguments = [*folders, "--data_folder", str(demo_data)]
    capsys.readouterr()
    data = before_after.CaptionDataset(demo_data, "demo", "test")
    boxes = json.loads((demo_data / "demo" / "boxes_demo.json").read_text())
    objects = before_after.load_objects(demo_data, "demo", boxes)
    for i, first, companion in before_after.images_without_companion(data, boxes, objects):
        assert first in boxes[data.names[i]]["categories"] and companion not in boxes[data.names[i]]["categories"]
    before_after.main(before_after.get_args_parser().parse_args(arguments))
    output = capsys.readouterr().out
    assert "companions_invented" in output and "hallucinated companions: removed, added" in output
    figure = np.asarray(Image.open(tmp_path / "after" / "before_after.png"))
    assert figure.shape[1] == 840 and figure.std() > 10


def test_images_are_grouped_by_companion():
    pairs = {"dog": "ball", "cat": "chair"}
    expected = [([], 2), (["tree", "ball"], 2), (["dog", "tree", "ball"], 0), (["dog", "chair"], 1),
                (["dog", "ball", "cat"], 1)]
    for categories, k in expected:
        assert group(categories, pairs) == GROUPS[k]
