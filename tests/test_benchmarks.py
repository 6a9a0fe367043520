"""The benchmarks run, and the alternatives compute the same as the models."""
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import refused

from benchmarks.measure import (
    Products,
    Sizes,
    Table,
    build,
    compare,
    get_parser,
    print_tables,
    random_captions,
    replaced,
    vocabulary,
)
from benchmarks.training import aoa_by_steps, gridtd_by_steps

BENCHMARKS = {path.stem for path in Path(__file__).parents[1].glob("benchmarks/*.py")} - {"measure"}
SIZE = Sizes(V=20, d=8, K=6, C=5)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "logits"), [("gridtd", gridtd_by_steps), ("aoa", aoa_by_steps)])
@torch.no_grad()
def test_models_step_by_step(name, logits):
    model = build(name, SIZE, CPU).eval()
    captions = random_captions((4,), vocabulary(SIZE.V), 7, 3)
    assert ((captions == 19).sum(1) == 1).all() and (captions != 0).sum(1).min() >= 4
    features = torch.randn(4, SIZE.K, SIZE.C)
    expected = logits(model, features, captions)
    assert torch.allclose(expected, model(features, captions), atol=1e-5)


def test_ratios_are_medians_of_pairs(monkeypatch):
    """Of the times 1, 2, 6 and 2, 1, 4 after the warm-up: the median of 1/2, 2 and 3/2."""
    times = iter([t for seconds in (9, 9, 1, 2, 2, 1, 6, 4) for t in (0, seconds)])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert compare({"a": int, "b": int}, 3, CPU) == [["a", 2, "b", 2, 1.5, "0.50 to 2.00"]]


def test_recorded_products():
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    with Products() as products:
        (x @ y).relu() @ torch.ones(5)
    names = [function._schema.name for function, *_ in products.calls]
    assert names == ["aten::mm", "aten::mv"]
    products.replay()


def test_tables_replace_those_in_the_document():
    table = Table("Title", ["a", "b"], [["x", 1234], [0.12345, 1234.5]]).markdown()
    assert table == "**Title**\n\n| a | b |\n| --- | --- |\n| x | 1,234 |\n| 0.123 | 1,234 |\n"
    text = "before\n<!-- cpu a -->\nold\n<!-- end -->\n<!-- cpu b -->\nkept\n<!-- end -->\n"
    new = replaced(text, "cpu a", table)
    assert new == text.replace("old\n", table) and replaced(new, "cpu a", table) == new
    with refused("lacks the lines <!-- cpu c -->"):
        replaced(text, "cpu c", table)


# without what takes long also for tiny models: passes through VGG16, and new processes
PARTS = {"explain": ["--parts", "whole", "decoder"]}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks_run(name, monkeypatch, tmp_path, capsys):
    if name == "pretrained":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    benchmark = import_module(f"benchmarks.{name}")
    flags = ["--quick", "--repeats", "1", "--device", "cpu", *PARTS.get(name, [])]
    parser = get_parser(benchmark.__doc__, flags=getattr(benchmark, "FLAGS", None))
    print_tables(name, benchmark.tables, parser.parse_args(flags))
    output = capsys.readouterr().out
    assert f"`python benchmarks/{name}.py`; " in output and "| --- |" in output
