"""The benchmarks' shared functions, and that the alternatives compute the same as the models."""
import pytest
import torch

from benchmarks import all as all_benchmarks
from benchmarks.measure import Products, Sizes, Table, build, compare, random_captions, vocabulary
from benchmarks.training import aoa_by_steps, gridtd_by_steps
from captioning.errors import InputError

SIZE, CPU = Sizes(V=20, d=8, K=6, C=5), torch.device("cpu")


@pytest.mark.parametrize(("name", "logits"), [("gridtd", gridtd_by_steps), ("aoa", aoa_by_steps)])
@torch.no_grad()
def test_models_step_by_step(name, logits):
    model, captions = build(name, SIZE, CPU).eval(), random_captions((4,), vocabulary(SIZE.V), 7, 3)
    assert ((captions == 19).sum(1) == 1).all() and sorted((captions != 0).sum(1).tolist())[0] >= 4
    features = torch.randn(4, SIZE.K, SIZE.C)
    assert torch.allclose(logits(model, features, captions), model(features, captions), atol=1e-5)


def test_ratios_are_medians_of_pairs(monkeypatch):
    """Of the times 1, 2, 6 and 2, 1, 4 after the warm-up: the median of 1/2, 2 and 3/2."""
    times = iter([t for seconds in (9, 9, 1, 2, 2, 1, 6, 4) for t in (0, seconds)])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert compare({"a": int, "b": int}, 3, CPU) == [["a", 2, "b", 2, 1.5, "0.50 to 2.00"]]


def test_recorded_products():
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    with Products() as products:
        (x @ y).relu() @ torch.ones(5)
    assert [function._schema.name for function, *_ in products.calls] == ["aten::mm", "aten::mv"]
    products.replay()


def test_tables_replace_those_in_the_document():
    table = Table("Title", ["a", "b"], [["x", 1234], [0.12345, 1234.5]], "Note.").markdown()
    assert table == "**Title**\n\n| a | b |\n| --- | --- |\n| x | 1,234 |\n| 0.123 | 1,234 |\n\nNote.\n"
    text = "before\n" + all_benchmarks.START + "old\n" + all_benchmarks.END + "after\n"
    result = all_benchmarks.document(text, ["## New\n", table])
    assert result == f"before\n{all_benchmarks.START}\n## New\n\n{table}{all_benchmarks.END}after\n"
    assert all_benchmarks.document(result, ["## New\n", table]) == result
    with pytest.raises(InputError, match="lacks the lines"):
        all_benchmarks.document("nothing", [])
