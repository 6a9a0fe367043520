"""Reading captions of other software, in both formats, and references of a COCO captions file."""
import json

import pytest

from captioning.data.predictions import image_ids, read_predictions, read_references
from captioning.errors import InputError

NAMES = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_both_formats_are_equivalent(tmp_path):
    by_name = [{"image": NAMES[1], "caption": "é"}, {"image": NAMES[0], "caption": "a"}]
    by_id = [{"image_id": 73, "caption": "é", "id": 1}, {"image_id": 42, "caption": "a"}]
    first, second = (read_predictions(write(tmp_path / "p.json", content), NAMES, image_ids(NAMES))
                     for content in (by_name, by_id))
    assert first == second == {NAMES[0]: "a", NAMES[1]: "é"} and list(first) == NAMES


def test_ambiguous_image_ids_are_omitted(tmp_path):
    names = ["train_1.jpg", "val_1.jpg", "x2.png", "none.jpg"]
    assert image_ids(names) == {2: "x2.png", None: "none.jpg"}
    path = write(tmp_path / "p.json", [{"image_id": 1, "caption": "a"}])
    with pytest.raises(InputError, match="a caption for 1, which is not among"):
        read_predictions(path, names, image_ids(names))


def test_partial_predictions(tmp_path):
    path = write(tmp_path / "p.json", [{"image_id": 73, "caption": "a"}])
    assert read_predictions(path, NAMES, image_ids(NAMES), partial=True) == {NAMES[1]: "a"}
    message = "lacks captions for 1 of 2 images: .*42.jpg has no caption"
    with pytest.raises(InputError, match=message):
        read_predictions(path, NAMES, image_ids(NAMES))


@pytest.mark.parametrize("content, message", [
    ("[{", "p.json"), ({}, "must contain a list"), ([], "must contain a list"), ([1], "number 0"),
    ([{"image_id": 42, "caption": "a"}, {"image_id": 73}], "number 1"),
    ([{"image_id": "42", "caption": "a"}], "number 0"),
    ([{"image_id": True, "caption": "a"}], "number 0"),
    ([{"image": 42, "caption": "a"}], "number 0"),
    ([{"image": NAMES[0], "caption": None}], "number 0"),
    ([{"image_id": [42], "caption": "a"}], "number 0"),
    ([{"image": [], "caption": "a"}], "number 0"),
    ([{"image_id": None, "caption": "a"}], "number 0"),
    ([{"image_id": 5, "caption": "a"}], "caption for 5, which is not among the 2 images"),
    ([{"image": "x.jpg", "caption": "a"}], "caption for x.jpg, which is not among"),
    ([{"image_id": 42, "caption": "a"}, {"image": NAMES[0], "caption": "a"}],
     "more than one caption for COCO_val"),
    ('[{"image_id": 42, "caption": "\\ud800"}]', "surrogates"),
])
def test_invalid_predictions(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(write(tmp_path / "p.json", content), NAMES, image_ids(NAMES))
    assert "\n" not in str(caught.value)


def coco(**changes):
    return {"images": [{"id": 73, "file_name": NAMES[1]}, {"id": 42, "file_name": NAMES[0]},
                       {"id": 9, "file_name": "x"}],
            "annotations": [{"image_id": 73, "caption": "a"}, {"image_id": 42, "caption": "b"},
                            {"image_id": 73, "caption": "c"}]} | changes


def test_read_references(tmp_path):
    references, ids = read_references(write(tmp_path / "captions.json", coco()))
    assert references == {NAMES[0]: ["b"], NAMES[1]: ["a", "c"]}
    assert ids == {42: NAMES[0], 73: NAMES[1]}


@pytest.mark.parametrize("content, message", [
    ("{", "captions.json"), ([], "images"), ({"images": []}, "annotations"),
    (coco(annotations=[]), "has no captions"),
    (coco(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "same id"),
    (coco(images=[{"id": 42, "file_name": "a"}, {"id": 73, "file_name": "a"}]), "same file name"),
    (coco(annotations=[{"image_id": 5, "caption": "a"}]), "image id 5"),
    (coco(annotations=[{"image_id": 42}]), "caption"),
    (coco(images=[{"id": "42", "file_name": "a"}]), "'id'"),
])
def test_invalid_references(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_references(write(tmp_path / "captions.json", content))
