"""The studies' scripts: bad input ends them with one sentence."""
import json
import re
from pathlib import Path

import h5py
import pytest
import torch

from captioning import checkpoint
from captioning.data.dataset import split_path
from captioning.data.vocabulary import build
from captioning.errors import InputError, run_script
from gridTDmodel import GridTDModel
from studies import contrastive_decoding, grounded_decoding, start_relevance, weighted_words

STUDIES = Path(__file__).parents[1] / "studies"


def model_file(folder, vocabulary):
    """A checkpoint of a small model with random weights."""
    model = GridTDModel(len(vocabulary), 4, 6, 5, encoder="small")
    checkpoint.save(folder / "checkpoint_last.pth", model, vocabulary)
    return folder / "checkpoint_last.pth"


def test_every_study_ends_with_run_script():
    scripts = [path for path in STUDIES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert len(scripts) > 9
    assert all(path.read_text(encoding="utf-8").splitlines()[-1].startswith("    run_script(") for path in scripts)


@pytest.mark.parametrize("study, arguments, message", [
    (contrastive_decoding, ["none.pth"], "none.pth cannot be read"),
    (contrastive_decoding, ["none.pth", "--alpha", "nan"], "must be a number at least 0"),
    (start_relevance, ["none.pth"], "none.pth cannot be read"),
    (start_relevance, ["none.pth", "--max_images", "0"], "must be a whole number at least 1"),
    (grounded_decoding, ["none.pth", "scores"], "grounding_words_val.csv cannot be read .*: run evaluation.py --calib"),
])
def test_missing_files_are_named_in_one_sentence(study, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_script(study.main, study.get_args_parser().parse_args(arguments))
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert end.value.code == 2 and re.search(message, error)


def test_scores_of_other_experiments_are_refused(tmp_path):
    (tmp_path / "grounding_words_val.csv").write_text("image,step,word,method,measure,value\na.png,0,dog,lrp,share,1\n")
    with pytest.raises(InputError, match="grounding_words_val.csv lacks values of the object words: run evaluation.py"):
        grounded_decoding.read_scores(tmp_path)


def test_start_relevance_has_no_more_images_than_the_split(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    words = build([["dog", "ball", "tree", "runs"]], 1)
    features = torch.rand(5, 4, 128).numpy()

    class Data:
        __len__ = features.__len__

        def read_features(self, indices):
            assert set(indices) <= set(range(5))
            return features[indices]

    monkeypatch.setattr(start_relevance, "open_features", lambda *_: Data())
    arguments = [str(model_file(tmp_path, words)), "--max_images", "100"]
    start_relevance.main(start_relevance.get_args_parser().parse_args(arguments))
    assert capsys.readouterr().out.strip().endswith("words")


def test_captions_without_an_object_word(demo_data, tmp_path):
    model_file(tmp_path, build([["a", "scene"]], 1))
    with h5py.File(split_path(demo_data, "demo", "test")) as file:
        names = file["names"].asstr()[:]
    (tmp_path / "predictions_test.json").write_text(json.dumps([{"image": name, "caption": "a scene"}
                                                                for name in names]))
    with pytest.raises(InputError, match="predictions_test.json names an object"):
        weighted_words.main(weighted_words.get_args_parser().parse_args(
            [str(tmp_path), "--data_folder", str(demo_data)]))
