"""Reading Karpathy's and COCO's annotations: contents, splits, boxes, and error messages."""
import json
import re
from functools import reduce
from operator import getitem

import pytest
from helpers import refused

from captioning.data import annotations
from captioning.data.annotations import read_coco, read_karpathy
from captioning.data.boxes import read_boxes


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def karpathy():
    """Content of a valid file in Karpathy's format with one image per split name."""
    return {"images": [
        {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A Dog.",
                                                               "tokens": ["a", "dog"]}]},
        {"filename": "2.jpg", "split": "restval", "filepath": "val2014",
         "sentences": [{"raw": "It's a cat!"}]},
        {"filename": "3.jpg", "split": "val", "sentences": [{"tokens": ["a", "T-shirt"]},
                                                            {"raw": "  …  "}]},
        {"filename": "4.jpg", "split": "test", "sentences": [{"raw": "Two\nbirds", "tokens": []}]}]}


def coco(ids=range(1, 24), count=2):
    """Content of a COCO captions file with `count` captions per image."""
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 20} for i in ids]
    captions = [{"image_id": i, "caption": f"Caption {n} of {i}."} for n in range(count)
                for i in ids]
    return {"images": images, "annotations": captions}


def write_coco(folder, train=range(1, 24), val=range(100, 103), year=2017):
    write(folder / f"captions_train{year}.json", coco(train))
    write(folder / f"captions_val{year}.json", coco(val))
    return folder


def instances():
    """Content of a COCO instances file."""
    return {"images": [{"id": 100, "file_name": f"{100:012d}.jpg", "width": 40, "height": 20},
                       {"id": 101, "file_name": f"{101:012d}.jpg", "width": 10, "height": 448},
                       {"id": 999, "file_name": "elsewhere.jpg", "width": 10, "height": 10}],
            "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
            "annotations": [{"image_id": 100, "category_id": 18, "bbox": [1.5, 2, 10.25, 5],
                             "iscrowd": 0},
                            {"image_id": 100, "category_id": 18, "bbox": [0, 0, 4, 4]},
                            {"image_id": 100, "category_id": 3, "bbox": [0, 0, 40, 20],
                             "iscrowd": 1},
                            {"image_id": 999, "category_id": 3, "bbox": [0, 0, 4, 4]}]}


def test_read_karpathy(tmp_path):
    records = read_karpathy(write(tmp_path / "k.json", karpathy()))
    assert [record.split for record in records] == ["train", "train", "val", "test"]
    assert [record.path for record in records] == ["1.jpg", "val2014/2.jpg", "3.jpg", "4.jpg"]
    assert [record.name for record in records] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert [record.tokens for record in records] == [
        [["a", "dog"]], [["it", "s", "a", "cat"]], [["a", "t", "shirt"]], [["two", "birds"]]]
    assert records[2].raw == ["a T-shirt"], "captions without words are omitted"


def test_read_coco_splits_images_by_id(tmp_path):
    shuffled = [*range(23, 0, -1)]
    records = read_coco(write_coco(tmp_path, shuffled), 2017)
    names = {split: [record.name for record in records if record.split == split]
             for split in annotations.SPLITS}
    # 22 = 23 · 110 / 115
    assert [len(split_names) for split_names in names.values()] == [22, 1, 3]
    assert names["train"] == [f"{i:012d}.jpg" for i in range(1, 23)]
    assert names["val"] == [f"{23:012d}.jpg"]
    assert records[0].path == "train2017/000000000001.jpg"
    assert records[-1].path == "val2017/000000000102.jpg"
    assert records[0].raw == ["Caption 0 of 1.", "Caption 1 of 1."]
    assert records[0].tokens == [["caption", "0", "of", "1"], ["caption", "1", "of", "1"]]


IMAGES = karpathy()["images"]


@pytest.mark.parametrize("content", [
    IMAGES,                                     # no "images" around it
    *([*IMAGES[:2], IMAGES[2] | {"split": split}, IMAGES[3]] for split in ("validation", "dev")),
    [IMAGES[0], IMAGES[1] | {"sentences": ["It's a cat!"]}, *IMAGES[2:]],
    [IMAGES[0] | {"filepath": None, "sentences": [{"raw": None, "tokens": ["a", "dog"]}]},
     *IMAGES[1:]]])
def test_relatives_of_karpathy_s_format(tmp_path, content):
    expected = read_karpathy(write(tmp_path / "k.json", karpathy()))
    found = read_karpathy(write(tmp_path / "k.json", content))
    for record, other in zip(found, expected, strict=True):
        assert (record.name, record.path, record.split) == (other.name, other.path, other.split)
        assert record.tokens == other.tokens


def test_without_a_validation_split_training_images_form_it(tmp_path, capsys):
    content = karpathy()
    del content["images"][2]
    records = read_karpathy(write(tmp_path / "k.json", content))
    assert [record.split for record in records] == ["train", "val", "test"]
    assert "1 of its 2 training images" in capsys.readouterr().out


def test_equal_names_in_two_folders(tmp_path):
    content = karpathy()
    content["images"][1]["filename"] = "1.jpg"
    records = read_karpathy(write(tmp_path / "k.json", content))
    assert [record.name for record in records] == ["1.jpg", "val2014/1.jpg", "3.jpg", "4.jpg"]
    assert records[1].path == "val2014/1.jpg"


def test_words_keep_their_combining_marks(tmp_path):
    """Most vowels of Hindi are such marks, and so are decomposed accents."""
    content = karpathy()
    words = ["एक", "लड़का", "पिज़्ज़ा", "cafe\u0301"]
    content["images"][0]["sentences"] = [{"raw": "x", "tokens": words}, " ".join(words)]
    assert read_karpathy(write(tmp_path / "k.json", content))[0].tokens == [words, words]


@pytest.mark.parametrize(("count", "expected"), [(118_287, [110_000, 5_000]),
                                                 (115_000, [110_000, 5_000]),
                                                 (114_999, [109_999, 5_000]), (112, [107, 5])])
def test_coco_split_sizes(count, expected):
    train, val = expected
    assert annotations.splits_of(count) == ["train"] * train + ["val"] * val


def test_boxes_have_layout_of_cocovalentities(tmp_path):
    records = read_coco(write_coco(tmp_path), 2017)
    write(tmp_path / "instances_val2017.json", instances())
    boxes = read_boxes(tmp_path, records)
    assert boxes == {
        f"{100:012d}.jpg": {"categories": {"dog": 18}, "bbox": {"18": [[1.5, 2, 11.75, 7],
                                                                       [0, 0, 4, 4]]},
                            "shape": [40, 20], "resize_ratio": [5.6, 11.2]},
        f"{101:012d}.jpg": {"categories": {}, "bbox": {}, "shape": [10, 448],
                            "resize_ratio": [22.4, 0.5]}}


def test_boxes_without_area_are_left_out_and_counted(tmp_path, capsys):
    content = instances()
    content["annotations"] += [{"image_id": 100, "category_id": 3, "bbox": box}
                               for box in ([1, 2, 0, 5], [1, 2, 5, 0], [1.004, 2, 0.0001, 5])]
    records = read_coco(write_coco(tmp_path), 2017)
    write(tmp_path / "instances_val2017.json", content)
    assert read_boxes(tmp_path, records)[f"{100:012d}.jpg"]["categories"] == {"dog": 18}
    assert "instances_val2017.json: 3 boxes without area left out" in capsys.readouterr().out


KARPATHY = [
    (("images",), KeyError, "no key 'images'"),
    (("images",), 5, "list of images"),
    (("images",), [], "train split"),
    (("images", 0), 7, "number 0 of its images"),
    (("images", 3), KeyError, "test split"),
    (("images", 1, "filename"), KeyError, "'filename'"),
    (("images", 1, "filename"), "../secret.jpg", "../secret.jpg"),
    (("images", 1, "filename"), "/etc/passwd", "/etc/passwd"),
    (("images", 1, "filename"), "C:\\x.jpg", "lies outside the image folder"),
    (("images", 1, "filename"), "a\nb.jpg", "not printable"),
    (("images", 2, "filename"), "1.jpg", "'1.jpg' twice"),
    (("images", 1, "filepath"), "..", "lies outside the image folder"),
    (("images", 1, "filepath"), 5, "'filepath'"),
    (("images", 1, "split"), "training", "'training'"),
    (("images", 1, "sentences"), KeyError, "'sentences'"),
    (("images", 1, "sentences"), [], "no caption with words for '2.jpg'"),
    (("images", 1, "sentences"), [5], "number 0 of its sentences of '2.jpg'"),
    (("images", 1, "sentences", 0, "raw"), 5, "'raw'"),
    (("images", 1, "sentences", 0, "raw"), "\ud800", "surrogates"),
    (("images", 1, "sentences", 0, "raw"), KeyError, "no caption with words for '2.jpg'"),
    (("images", 0, "sentences", 0, "tokens"), "a dog", "'tokens'"),
    (("images", 0, "sentences", 0, "tokens"), [1, 2], "k.json is damaged")]
COCO = [
    (("annotations",), KeyError, "no key 'annotations'"),
    (("annotations", 0, "image_id"), 5555, "image id 5555"),
    (("annotations", 0, "image_id"), True, "'image_id'"),
    (("annotations", 0, "caption"), None, "'caption'"),
    (("images", 0, "id"), 7.5, "'id'"),
    (("images", 0, "id"), 2, "the same id"),
    (("images", 0, "file_name"), f"{2:012d}.jpg", "twice"),
    (("images", 0, "file_name"), "..", "lies outside the image folder"),
    (("annotations",), [], "no caption with words")]
INSTANCES = [
    (("categories",), KeyError, "no key 'categories'"),
    (("categories", 0, "name"), 5, "'name'"),
    (("images", 0, "width"), 0, "0×20 pixels"),
    (("images", 0, "width"), 10**400, "too large"),
    (("images", 0, "height"), "20", "'height'"),
    (("annotations", 0, "category_id"), 77, "image id 100"),
    (("annotations", 0, "bbox"), [1, 2, 3], "instances_val2017.json is damaged"),
    (("annotations", 0, "bbox"), [1, 2, -3, 4], "width, height in pixels"),
    (("annotations", 0, "bbox"), [1, 2, float("nan"), 4], "instances_val2017.json is damaged"),
    (("annotations", 0, "bbox"), [1, 2, 10**400, 4], "too large"),
    (("annotations", 0, "bbox"), [1, 2, "3", 4], "instances_val2017.json is damaged")]


FILES = {"k.json": (karpathy, KARPATHY), "captions_train2017.json": (coco, COCO),
         "instances_val2017.json": (instances, INSTANCES)}


@pytest.mark.parametrize(("file", "path", "new", "message"), [
    (file, *case) for file, (_, cases) in FILES.items() for case in cases])
def test_invalid_file(tmp_path, file, path, new, message):
    """The item at `path` is another one, or is missing if `new` is KeyError."""
    content = FILES[file][0]()
    *parents, last = path
    container = reduce(getitem, parents, content)
    if new is KeyError:
        del container[last]
    else:
        container[last] = new
    write(write_coco(tmp_path) / file, content)
    with refused(re.escape(message)):
        if file == "k.json":
            read_karpathy(tmp_path / file)
        read_boxes(tmp_path, read_coco(tmp_path, 2017))
