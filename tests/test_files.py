"""Files that are written completely or not at all, JSON, and names that stay in their folder."""
import os
import string
import subprocess
import sys

import pytest
from helpers import refused

from captioning import files


@pytest.mark.parametrize("stem", [
    "", ".", "..", "...", "a/b", "..\\b", "/etc/passwd", "C:\\x", "\0", "index.html", "INDEX.html",
    "a ", "a.", "x" * 300, "ä" * 200, "\udcff", "a.m.7.tmp", *string.punctuation])
def test_a_folder_name_is_one_valid_component(stem, tmp_path):
    name = files.folder_name(stem)
    assert name not in ("", ".", "..") and not set(name) & set('/\\\0:*?"<>|')
    assert name.upper() != "INDEX.HTML"
    assert len(name.encode()) <= 152 and name.isprintable() and not files.TEMPORARY.search(name)
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_ordinary_stems_are_kept():
    for stem in ("test_00001", "COCO_val2014_000000000042", "Füße am Strand", "a.b", "日本"):
        assert files.folder_name(stem) == stem


@pytest.mark.parametrize("name", ["", ".", "./", "./.", "..", "a/../b", "/a", "C:\\a", "a\0", "a\n",
                                  "\ud800", 3, None])
def test_unsafe_names_in_data_files_are_refused(name):
    with pytest.raises(ValueError, match="file name"):
        files.safe_name(name)


@pytest.mark.parametrize("text", [
    '{"a": 1, "a": 2}', "1" * 5000, "[1" + "0" * 400 + "]", '"\\ud800"',
    '{"\\udfff": 1}', "[" * 100_000, "", "{", "nonsense", '{"a": 9223372036854775808}'])
def test_json_with_values_that_nothing_can_use_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with refused("x.json") as raised:
        files.read_json(tmp_path / "x.json")
    assert len(str(raised.value)) < 300


def test_valid_json_is_read(tmp_path):
    text = ('{"a": 9223372036854775807, "b": "\\ud83d\\ude00 \\\\ud800", "c": 1e9, '
            '"d": [NaN, -Infinity]}')
    (tmp_path / "x.json").write_text(text)
    assert files.read_json(tmp_path / "x.json") == {"a": 2 ** 63 - 1, "b": "😀 \\ud800", "c": 1e9,
                                                     "d": [None, None]}


def test_pipes_folders_and_missing_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "pipe"), ("", "folder"), ("missing", "no such file"),
                         ("x" * 300, "too long")):
        with refused(reason):
            files.read_json(tmp_path / name)


def test_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = files.temporary_path(tmp_path / "own").name
    left = own.replace(str(os.getpid()), str(dead.pid))
    other = f"a.elsewhere.{dead.pid}.0123abcd.tmp"
    (tmp_path / left).mkdir()
    (tmp_path / left / "half.png").write_text("")
    for name in (left.replace("own", "file"), own, other, "a.tmp", "a.1.tmp"):
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own, other, "a.tmp", "a.1.tmp"}


def test_shortened_texts_are_one_line():
    assert files.shortened("two\nlines of  words", 10) == "two lines…"
    assert files.shortened("two\nlines") == "two lines"


def test_json_with_file_names_that_are_not_unicode_can_be_read(tmp_path):
    files.write_json(tmp_path / "x.json", {"é \udcff 😀": ["\ud800"]})
    assert files.read_json(tmp_path / "x.json") == {"é \\udcff 😀": ["\\ud800"]}
