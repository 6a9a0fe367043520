"""Object words and CHAIR, counted by hand."""
import json
import random
import sys

import pytest
from helpers import refused

from captioning.data.boxes import load_boxes
from captioning.data.vocabulary import tokenise
from captioning.metrics import object_words
from captioning.metrics.object_metrics import chair
from captioning.metrics.object_words import (
    COCO_OBJECTS,
    Objects,
    load_objects,
    plural,
    read_synonyms,
)

BOX = [[0, 0, 10, 10]]
DOG_AND_BALL = Objects({"dog": "dog", "ball": "ball", "cat": "cat"}, pairs=[("dog", "ball")],
                       exact=True)


def entry(*categories):
    return {"categories": {name: i for i, name in enumerate(categories)},
            "bbox": {str(i): BOX for i in range(len(categories))}, "shape": [100, 50]}


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "coco2017").mkdir()
    categories = ("person", "dining table", "dog", "hot dog", "bus", "teddy bear", "bear",
                  "wine glass", "cat")
    return load_objects(tmp_path, "coco2017", {"a.jpg": entry(*categories)})


def test_plural():
    words = {"dog": "dogs", "bus": "buses", "couch": "couches", "baby": "babies", "toy": "toys",
             "wine glass": "wine glasses", "toothbrush": "toothbrushes", "knife": "knives",
             "mouse": "mice", "woman": "women"}
    assert {word: plural(word) for word in words} == words


@pytest.mark.parametrize("caption, expected", [
    ("a dog and two cats", [(1, "dog"), (4, "cat")]),
    ("a man eats a hot dog", [(1, "person"), (5, "hot dog")]),             # no dog
    ("two hot dogs", [(2, "hot dog")]),
    ("a teddy bear", [(2, "teddy bear")]),
    ("a dining table and a table", [(2, "dining table"), (5, "dining table")]),
    ("women and children on buses", [(0, "person"), (2, "person"), (4, "bus")]),
    ("babies and ladies", [(0, "person"), (2, "person")]),
    ("wine glasses", [(1, "wine glass")]),
    ("wineglasses on a train track", [(0, "wine glass")]),
    ("cattle though no image shows any", [(0, "cow")]),
    ("dogged", []),
    ("", []),
    ("a football player runs on the field", [(2, "person")]),
    ("two basketball players on a basketball court", [(2, "person")]),
    ("boys at a volleyball net", [(0, "person")]),
    ("a man throws a football", [(1, "person"), (4, "sports ball")]),
    ("a power plant and a plant", [(5, "potted plant")]), ("a bat flies in a cave", []),
    ("a boy with a bat", [(1, "person"), (4, "baseball bat")]),
    ("a blow drier", [(2, "hair drier")]), ("street lights", [(1, "traffic light")])])
def test_objects_named_by_a_caption(coco, caption, expected):
    assert coco.named(tokenise(caption)) == expected


def named_by_definition(phrases, words):
    """From left to right, the longest phrase at a word; those of "none" name no object."""
    named, t = [], 0
    while t < len(words):
        lengths = [n for n in range(1, len(words) - t + 1) if " ".join(words[t:t + n]) in phrases]
        length = max(lengths, default=0)
        category = phrases.get(" ".join(words[t:t + length]), "none")
        named += [(t + length - 1, category)] if category != "none" else []
        t += max(length, 1)
    return named


def test_objects_named_by_random_captions():
    generator = random.Random(0)

    def text(longest):
        return generator.choices("abcd", k=generator.randint(1, longest))
    for _ in range(1000):
        phrases = {" ".join(text(4)): generator.choice(["dog", "cat", "none"])
                   for _ in range(generator.randint(0, 6))}
        words = text(12)
        assert Objects(phrases).named(words) == named_by_definition(phrases, words)


def test_a_missing_package_is_reported_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inflect", None)       # importing it raises ImportError
    object_words._inflect_engine.cache_clear()
    plural.cache_clear()
    message = "object words require inflect .*: pip install inflect$"
    with refused(message):
        load_objects(tmp_path, "coco2017", {}).named(["dog"])


# -- files -------------------------------------------------------------------------------------


def test_the_synonyms_cover_the_80_categories_of_coco_and_no_word_belongs_to_two():
    lists = read_synonyms(COCO_OBJECTS)
    words = [word for category, others in lists.items() for word in [category, *others]]
    assert len(lists.keys() - {"none"}) == 80 and len(words) == len(set(words))


def test_categories_of_boxes_may_have_capitals(tmp_path):
    content = {"1.jpg": entry("person", "dog")}
    capitals = {"1.jpg": content["1.jpg"] | {"categories": {"Person": 0, "Dog": 1}}}
    scores = []
    for name, boxes in (("a.json", content), ("b.json", capitals)):
        (tmp_path / name).write_text(json.dumps(boxes))
        read = load_boxes(tmp_path / name)
        objects = load_objects(tmp_path, "coco2017", read)
        scores.append(chair(["a man and a cat"], [["x"]], [read["1.jpg"]], objects))
    assert scores[0] == scores[1] and scores[0][0]["chair_i"] == 1 / 2


def test_synonyms_from_a_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("dog, puppy , police dog\n\nplate\nnone, home plate\n")
    objects = load_objects(tmp_path, "coco2017", {"a.jpg": entry("dog", "cat")}, path)
    words = tokenise("puppies and police dogs with two cats at the home plate with plates")
    # only the categories of the boxes, because the file does not list all of them
    assert objects.named(words) == [(0, "dog"), (3, "dog"), (6, "cat")]
    path.write_text("dog, puppy\nball\ndog, hound\n")      # lines of one category count as one
    assert read_synonyms(path) == {"dog": ["puppy", "hound"], "ball": []}


def test_a_category_that_coco_does_not_have_is_named_by_its_own_name(tmp_path):
    objects = load_objects(tmp_path, "mine", {"a.jpg": entry("dog", "red panda")})
    named = objects.named(tokenise("puppies, red pandas, cats"))
    assert named == [(0, "dog"), (2, "red panda")]


@pytest.mark.parametrize("content", [None, b"", b" , \n", b"dog, !!\n", b"\xff\xfe\x00"])
def test_invalid_synonyms(tmp_path, content):
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with refused("words.txt"):
        read_synonyms(tmp_path / "words.txt")


def test_words_of_the_demo_data_set_are_read_from_its_file(tmp_path):
    (tmp_path / "demo").mkdir()
    content = {"words": {"puppy": "dog", "ball": "ball"}, "pairs": [["dog", "ball"]]}
    (tmp_path / "demo" / "objects_demo.json").write_text(json.dumps(content))
    objects = load_objects(tmp_path, "demo", {"x.png": entry("cat")})
    named = objects.named(["a", "puppy", "a", "dog", "a", "cat", "a", "ball"])
    assert named == [(1, "dog"), (7, "ball")]
    assert objects.exact and objects.biased == {"ball"}


@pytest.mark.parametrize("content", [
    "[]", "{}", '{"words": [], "pairs": []}', '{"words": {"a": 1}, "pairs": []}', "{not json",
    '{"words": {"?": "a"}, "pairs": []}', '{"words": {}, "pairs": ["ab"]}'])
def test_invalid_objects_file(tmp_path, content):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "objects_demo.json").write_text(content)
    with refused():
        load_objects(tmp_path, "demo", {})


def test_boxes_of_coco_instances(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": "a.jpg", "width": 20, "height": 10}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0}]}))
    boxes = load_boxes(tmp_path / "instances.json")["a.jpg"]
    assert boxes["categories"] == {"dog": 3} and boxes["bbox"] == {"3": [[1, 2, 4, 6]]}


@pytest.mark.parametrize("content", [
    [], {"a.jpg": []}, {"a.jpg": {"categories": {"dog": 1}, "bbox": {}, "shape": [10, 10]}},
    {"a.jpg": {"categories": {"dog": 1}, "bbox": {"1": [[1, 2, 3]]}, "shape": [10, 10]}},
    {"a.jpg": {"categories": {}, "bbox": {}, "shape": [0, 10]}},
    {"a.jpg": {"categories": {}, "bbox": {}}}])
def test_invalid_boxes(tmp_path, content):
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with refused():
        load_boxes(tmp_path / "boxes.json")


def test_boxes_without_area_are_left_out_and_counted(tmp_path, capsys):
    content = {"a.jpg": entry("dog", "cat"), "b.jpg": entry()}
    content["a.jpg"]["bbox"] = {"0": [[1, 2, 1, 4], [0, 0, 2, 2], [0, 0, 2, 0]],
                                "1": [[3, 3, 3, 3]]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    boxes = load_boxes(tmp_path / "boxes.json")
    assert boxes.keys() == {"a.jpg", "b.jpg"} and boxes["a.jpg"]["categories"].keys() == {"dog"}
    assert boxes["a.jpg"]["bbox"]["0"] == [[0, 0, 2, 2]]
    assert "boxes.json: 3 boxes without area left out" in capsys.readouterr().out


# -- CHAIR -------------------------------------------------------------------------------------


def test_chair_by_hand(coco):
    captions = ["a dog and a cat", "a man", "A bus.", "nothing here"]
    references = [["a dog"], ["grass"], ["many buses"], ["sky"]]
    entries = [entry("dog"), entry("person"), None, entry("dog")]
    scores, per_caption = chair(captions, references, entries, coco)
    # of dog, cat, man and bus only the cat is not present; a reference names the bus
    assert scores == {"chair_i": 1 / 4, "chair_s": 1 / 4, "object_precision": 3 / 4}
    assert per_caption == {"objects": ["dog; cat", "person", "bus", ""],
                           "chair_s": [True, False, False, False],
                           "invented_objects": ["cat", "", "", ""]}


def test_references_are_ignored_if_boxes_are_exact():
    objects = Objects({"bus": "bus"}, exact=True)
    assert chair(["a bus"], [["a bus"]], [entry("dog")], objects)[0]["chair_i"] == 1
    assert chair(["a bus"], [["a dog"]], [entry("bus")], objects)[0]["chair_i"] == 0


def test_biased_objects_are_counted_separately():
    captions = ["a dog with a ball", "a dog with a ball", "a cat"]
    entries = [entry("dog", "ball"), entry("dog"), entry("dog")]
    scores, _ = chair(captions, [[""]] * 3, entries, DOG_AND_BALL)
    assert scores["object_precision_biased"] == 1 / 2
    assert scores["object_precision_unbiased"] == 2 / 3
    assert scores["object_precision"] == pytest.approx(3 / 5)
    assert scores["chair_s"] == pytest.approx(2 / 3)


def test_companions_are_counted_where_present_and_where_missing():
    captions = ["a dog with a ball", "a dog", "a dog with a ball", "a ball", "a dog"]
    entries = [entry("dog", "ball"), entry("dog", "ball"), entry("dog"), entry("ball"),
               entry("dog")]
    scores, _ = chair(captions, [[""]] * 5, entries, DOG_AND_BALL)
    assert scores["companions_invented"] == 1 / 2 and scores["companions_named"] == 2 / 3
    assert scores["companions_named_minus_invented"] == pytest.approx(1 / 6)
    without_missing, _ = chair(captions[:2], [[""]] * 2, entries[:2], DOG_AND_BALL)
    assert without_missing["companions_named"] == 1 / 2
    assert not {"companions_invented", "companions_named_minus_invented"} & without_missing.keys()


def test_objects_that_no_caption_names_have_no_precision():
    scores, _ = chair(["a dog"], [[""]], [entry("dog")], DOG_AND_BALL)
    assert "object_precision_biased" not in scores and scores["object_precision_unbiased"] == 1
    assert chair(["nothing"], [[""]], [entry()], DOG_AND_BALL)[0]["chair_i"] == 0
