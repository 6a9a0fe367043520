"""Reading captions of other software, in both formats, and references of a COCO captions file."""
import json

import pytest
from helpers import refused

from captioning.data.predictions import ImageNames, read_predictions, read_references

NAMES = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


PLAIN = [(42, "a"), (73, "é")]


@pytest.mark.parametrize("content", [
    [{"image": NAMES[1], "caption": "é"}, {"image": NAMES[0], "caption": "a"}],
    [{"image_id": 73, "caption": "é", "id": 1}, {"image_id": 42, "caption": "a"}],
    [{"image_id": str(number), "caption": text} for number, text in PLAIN],
    [{"image_id": f"{number:012d}", "caption": text} for number, text in PLAIN],
    [{"image_id": float(number), "caption": text} for number, text in PLAIN],
    [{"image_id": name, "caption": text} for name, (_, text) in zip(NAMES, PLAIN, strict=True)],
    [{"image_id": NAMES[0][:-4], "caption": "a"}, {"image_id": NAMES[1][:-4], "caption": "é"}],
    [{"file_name": name, "caption": text} for name, (_, text) in zip(NAMES, PLAIN, strict=True)],
    [{"image": f"val2014/{name}", "image_id": number, "caption": text}
     for name, (number, text) in zip(NAMES, PLAIN, strict=True)],
    [{"image_id": number, "caption": [text]} for number, text in PLAIN],
    {"annotations": [{"image_id": number, "caption": text} for number, text in PLAIN]},
    {str(number): text for number, text in PLAIN}, {name: [text] for name, (_, text) in
                                                    zip(NAMES, PLAIN, strict=True)},
    "\ufeff" + json.dumps([{"image_id": number, "caption": text} for number, text in PLAIN]),
    '[{"image_id": 42, "caption": "a", "score": NaN}, {"image_id": 73, "caption": "é"}]',
    '{"image_id": 42, "caption": "a"}\n\n{"image_id": 73, "caption": "é"}\n'], ids=str)
def test_formats_are_equivalent(tmp_path, content):
    path = write(tmp_path / "p.json", content)
    for images in (None, ImageNames(NAMES), ImageNames(NAMES, {"42": NAMES[0], "73": NAMES[1]})):
        found = read_predictions(path, NAMES, images)
        assert found == {NAMES[0]: "a", NAMES[1]: "é"} and list(found) == NAMES
    assert read_predictions(path, NAMES[:1], others=True) == {NAMES[0]: "a"}


def test_ambiguous_images_are_not_found(tmp_path):
    names = ["train_1.jpg", "val_1.jpg", "x2.png", "a/7.jpg", "b/7.jpg", "none.jpg"]
    images = ImageNames(names)
    assert [images.find(key) for key in (2, "x2", "b/7.jpg")] == ["x2.png", "x2.png", "b/7.jpg"]
    assert [images.find(key) for key in (1, 7, "7.jpg", "8.png", "none_2.jpg")] == [None] * 5
    images = ImageNames(["1.jpg", "0001.jpg", "25.jpg", "None.jpg"])
    assert [images.find(key) for key in ("0001", 1, "COCO_train2014_000000000025.jpg")] == [
        "0001.jpg", "1.jpg", "25.jpg"]
    assert images.find("photo_25.jpg") is images.find("dog.jpg") is None
    path = write(tmp_path / "p.json", [{"image_id": 1, "caption": "a"}])
    with refused("a caption for 1, which is not among"):
        read_predictions(path, names)
    path = write(tmp_path / "p.json", [{"image": "x2.png", "image_id": "val_1", "caption": "a"}])
    with refused("x2.png and val_1, which are different images"):
        read_predictions(path, names)


def test_partial_predictions(tmp_path):
    path = write(tmp_path / "p.json", [{"image_id": 73, "caption": "a"}])
    assert read_predictions(path, NAMES, partial=True) == {NAMES[1]: "a"}
    message = "lacks captions for 1 of 2 images: .*42.jpg has no caption"
    with refused(message):
        read_predictions(path, NAMES)


@pytest.mark.parametrize("content, message", [
    ("[{", "p.json"), ({}, "must contain a list"), ([], "must contain a list"), ([1], "number 0"),
    ({NAMES[0]: "a", NAMES[1]: 5}, "number 1"), ({NAMES[0]: ["a", "b"]}, "number 0"),
    ('{"image_id": 42, "caption": "a"}\n{"image_id": 42', "p.json is damaged"),
    ([{"image_id": 42, "caption": "a"}, {"image_id": 73}], "number 1"),
    ([{"image_id": True, "caption": "a"}], "number 0"),
    ([{"image_id": 4.5, "caption": "a"}], "number 0"),
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
    with refused(message):
        read_predictions(write(tmp_path / "p.json", content), NAMES)


def coco(**changes):
    return {"images": [{"id": 73, "file_name": NAMES[1]}, {"id": 42, "file_name": NAMES[0]},
                       {"id": 9, "file_name": "x"}],
            "annotations": [{"image_id": 73, "caption": "a"}, {"image_id": 42, "caption": "b"},
                            {"image_id": 73, "caption": "c"}]} | changes


def test_read_references(tmp_path):
    references, images = read_references(write(tmp_path / "captions.json", coco()))
    assert references == {NAMES[0]: ["b"], NAMES[1]: ["a", "c"]}
    assert [images.find(key) for key in (42, "73", NAMES[0], 9)] == [*NAMES, NAMES[0], "x"]


def test_an_image_without_references_is_not_scored(tmp_path):
    references, images = read_references(write(tmp_path / "captions.json", coco()))
    content = {"42": "a", "73": "b", "9": "c"}
    assert read_predictions(write(tmp_path / "p.json", content), list(references), images) == {
        NAMES[0]: "a", NAMES[1]: "b"}


IMAGES, TEXTS = coco()["images"], coco()["annotations"]
RELATIVES = {
    "without file names": coco(images=[{"id": image["id"]} for image in IMAGES]),
    "ids as text": {"images": [image | {"id": str(image["id"])} for image in IMAGES],
                    "annotations": [text | {"image_id": str(text["image_id"])} for text in TEXTS]},
    "folders": coco(images=[image | {"file_name": f"val2014/{image['file_name']}"}
                            for image in IMAGES]),
    "precanned captions": coco(annotations=TEXTS + [
        {"image_id": i, "caption": "Quality issues are too severe", flag: True}
        for i in (42, 73) for flag in ("is_precanned", "is_rejected")]),
    "TextCaps": {"data": [{"image_id": f"{i:016d}", "caption_str": text,
                           "image_path": f"train/{name}"}
                          for i, name, text in ((73, NAMES[1], "a"), (42, NAMES[0], "b"),
                                                (73, NAMES[1], "c"))]}}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_coco_captions_files(tmp_path, name):
    """Their scores with the same predictions are the same: captions meet the same references."""
    references, images = read_references(write(tmp_path / "captions.json", RELATIVES[name]))
    for content in ({"42": "x", "73": "y"}, {NAMES[0]: "x", NAMES[1]: "y"}):
        found = read_predictions(write(tmp_path / "p.json", content), list(references), images)
        pairs = [(caption, references[name]) for name, caption in found.items()]
        assert sorted(pairs) == [("x", ["b"]), ("y", ["a", "c"])]


@pytest.mark.parametrize("content, message", [
    ("{", "captions.json"), ([], "images"), ({"images": []}, "annotations"),
    (coco(annotations=[]), "has no captions"),
    (coco(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "same id"),
    (coco(images=[{"id": 42, "file_name": "a"}, {"id": 73, "file_name": "a"}]), "same file name"),
    (coco(annotations=[{"image_id": 5, "caption": "a"}]), "image id 5"),
    (coco(annotations=[{"image_id": 42}]), "caption"),
    (coco(images=[{"id": None, "file_name": "a"}]), "'id'"),
    (coco(images=[{"id": 42, "file_name": 5}]), "'file_name'"), ({"data": [{}]}, "'caption_str'"),
])
def test_invalid_references(tmp_path, content, message):
    with refused(message):
        read_references(write(tmp_path / "captions.json", content))
