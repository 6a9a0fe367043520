"""Reading Flickr8k's annotations: both caption formats, all sources of splits, and errors."""
import json

import pytest
from helpers import refused

from captioning.data.flickr8k import read_flickr8k

LISTS = {"Flickr_8k.trainImages.txt": "3.jpg\n1.jpg\n", "Flickr_8k.devImages.txt": "2.jpg\n",
         "Flickr_8k.testImages.txt": "4.jpg\r\n\n"}
TOKENS = "".join(f"{i}.jpg#{n}\tA dog , number {n} of {i} .\n" for i in range(1, 6)
                 for n in range(2))
KAGGLE = ('image,caption\n1.jpg,A dog .\n1.jpg,"A ""big"" dog , asleep ."\n2.jpg,Two cats\n3.jpg,\n'
          '3.jpg,A bird\n')


@pytest.fixture
def write(tmp_path):
    """Writes {file name: text} to a folder and returns it."""
    def write_files(files):
        for name, text in files.items():
            (tmp_path / name).write_text(text, errors="surrogateescape")
        return tmp_path
    return write_files


def test_official_files(write, capsys):
    records = read_flickr8k(write(LISTS | {"Flickr8k.token.txt": TOKENS,
                                           "captions.txt": "ignored"}))
    assert [(record.name, record.path, record.split) for record in records] == [
        ("3.jpg", "3.jpg", "train"), ("1.jpg", "1.jpg", "train"), ("2.jpg", "2.jpg", "val"),
        ("4.jpg", "4.jpg", "test")]
    assert records[0].raw == ["A dog , number 0 of 3 .", "A dog , number 1 of 3 ."]
    assert records[0].tokens[1] == ["a", "dog", "number", "1", "of", "3"]
    output = capsys.readouterr().out
    assert "Flickr_8k.{train,dev,test}Images.txt" in output
    assert "1 captioned images" in output, "5.jpg is in no list"


def test_kaggle_captions_with_karpathy_splits(write, capsys):
    images = [{"filename": name, "split": split, "sentences": [{"raw": "unused"}]}
              for name, split in (("1.jpg", "test"), ("2.jpg", "restval"), ("3.jpg", "val"))]
    folder = write({"captions.txt": KAGGLE, "k.json": json.dumps({"images": images})})
    records = read_flickr8k(folder, folder / "k.json")
    assert {record.name: record.split for record in records} == {"1.jpg": "test", "2.jpg": "train",
                                                                 "3.jpg": "val"}
    assert records[0].raw == ["A dog .",
                              'A "big" dog , asleep .'], "quotes and commas are part of the caption"
    assert records[2].raw == ["A bird"], "captions without words are omitted"
    assert "k.json" in capsys.readouterr().out


def test_random_splits_depend_on_the_seed_only(write, capsys):
    def splits(order, seed):
        lines = [f"{i}.jpg,a dog" for i in order]
        folder = write({"captions.txt": "\n".join(["image,caption", *lines])})
        return {record.name: record.split for record in read_flickr8k(folder, seed=seed)}
    first, again, other = splits(range(80), 1), splits(range(79, -1, -1), 1), splits(range(80), 2)
    assert first == again != other
    assert [list(first.values()).count(split) for split in ("train", "val", "test")] == [60, 10, 10]
    assert "random" in capsys.readouterr().out


@pytest.mark.parametrize(("files", "message"), [
    ({"Flickr8k.token.txt": None}, "contains neither Flickr8k.token.txt nor captions.txt"),
    ({"Flickr8k.token.txt": "1.jpg A dog\n"}, "Flickr8k.token.txt .*row 1 has 1 fields"),
    ({"Flickr8k.token.txt": TOKENS + "\n"}, "Flickr8k.token.txt .*row 11 "),
    ({"Flickr8k.token.txt": TOKENS + "6.jpg#0\t\n6.jpg#1\t .\n",
      "Flickr_8k.devImages.txt": "6.jpg"},
     "no caption with words for '6.jpg'"),
    ({"Flickr8k.token.txt": TOKENS + "../6.jpg#0\tA dog\n", "Flickr_8k.devImages.txt": "../6.jpg"},
     "outside the image"),
    ({"Flickr_8k.devImages.txt": "2.jpg\n7.jpg"}, "1 images of .* have no captions .*'7.jpg'"),
    ({"Flickr_8k.devImages.txt": "2.jpg\n1.jpg"},
     "devImages.txt .*'1.jpg' is already listed in .*trainImages.txt"),
    ({"Flickr_8k.devImages.txt": "2.jpg\n2.jpg"},
     "devImages.txt .*'2.jpg' is already listed in .*devImages.txt"),
    ({"Flickr_8k.devImages.txt": ""}, "the val split of .* is empty"),
    ({"Flickr_8k.devImages.txt": None}, "devImages.txt cannot be read"),
    ({"Flickr8k.token.txt": None, "captions.txt": "1.jpg,A dog\n"},
     "captions.txt .*first line is not"),
    ({"Flickr8k.token.txt": None, "captions.txt": ""}, "captions.txt .*first line is not"),
    ({"Flickr8k.token.txt": None, "captions.txt": KAGGLE + "4.jpg,A dog, asleep\n"},
     "row 7 has 3 fields"),
    ({"Flickr8k.token.txt": None, "captions.txt": KAGGLE + '4.jpg,"A "dog" here"\n'},
     "double quotes"),
    ({"Flickr8k.token.txt": None, "captions.txt": "image,caption\n1.jpg,\udcff\n"},
     "captions.txt is damaged"),
])
def test_malformed_files(write, files, message):
    files = LISTS | {"Flickr8k.token.txt": TOKENS} | files
    contents = {name: text for name, text in files.items() if text is not None}
    with refused(message):
        read_flickr8k(write(contents))


def test_real_files(shared_data, capsys):
    records = read_flickr8k(shared_data / "flickr8k")
    splits = [record.split for record in records]
    assert [splits.count(split) for split in ("train", "val", "test")] == [6000, 1000, 1000]
    assert all(len(record.raw) == 5 for record in records)
    assert "93 captioned images" in capsys.readouterr().out
