"""studies/compare.py: the metrics of several runs in one table and one plot."""
import json

import pytest
from helpers import call, refused

from studies import compare


def run(*arguments):
    call(compare, *arguments)


@pytest.mark.parametrize("flags", [[], ["--save_path", "elsewhere"]])
def test_comparison_of_runs(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    for name, metrics in (("one", {"bleu_1": 0.5, "cider": 1.25}), ("two", {"bleu_1": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics_test.json").write_text(json.dumps(metrics))
    run(tmp_path / "one", "two", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["one", "two"], ["bleu_1", "0.5000", "1"], ["cider", "1.2500"]]
    assert (tmp_path / (flags or ["", ""])[1] / "compare_test.png").stat().st_size > 5000


@pytest.mark.parametrize("content", [
    None, "[]", "{}", '{"cider": "high"}', '{"cider": NaN}', '{"cider": 1e999}', '{"cider": null}'])
def test_runs_that_cannot_be_compared(tmp_path, content):
    if content:
        (tmp_path / "metrics_test.json").write_text(content)
    with refused("metrics_test.json"):
        run(tmp_path, "--save_path", tmp_path)
    assert not (tmp_path / "compare_test.png").exists()
