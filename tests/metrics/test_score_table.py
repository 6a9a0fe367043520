"""Metrics computed independently of each other, their table and their CSV file."""
import csv

from captioning.errors import InputError
from captioning.metrics.score_table import format_table, score_all, write_per_image


def broken(captions, references):
    raise ZeroDivisionError("on\ntwo lines")


def not_installed(captions, references):
    raise InputError("not installed: install it")


def test_metrics_are_computed_although_others_fail():
    length = {"length": lambda captions, references: ({"length": 2.0}, {"length": [1, 3]})}
    scorers = {"broken": broken} | length | {"missing": not_installed}
    results = score_all(["a", "abc"], [["a"], ["b"]], scorers)
    assert results == ({"length": 2.0}, {"length": [1, 3]},
                       {"broken": "ZeroDivisionError: on two lines",
                        "missing": "not installed: install it"})


def test_table():
    runs = {"one": {"bleu_1": 0.5, "cider": 1.23456}, "another": {"bleu_1": 1, "spice": 0.25}}
    lines = format_table(runs).splitlines()
    assert [line.split() for line in lines] == [
        ["one", "another"], ["bleu_1", "0.5000", "1"], ["cider", "1.2346"], ["spice", "0.2500"]]
    assert len(set(map(len, lines))) == 1


def test_scores_of_each_image(tmp_path):
    captions = {"a.jpg": 'a "dog", on\ngrass', "é.jpg": ""}
    write_per_image(tmp_path / "s.csv", captions,
                    {"cider": [1.5, 0.0], "objects": ["dog; hot dog", ""]})
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"image": "a.jpg", "caption": 'a "dog", on\ngrass', "cider": "1.5",
             "objects": "dog; hot dog"},
            {"image": "é.jpg", "caption": "", "cider": "0", "objects": ""}]
