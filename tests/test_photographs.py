"""configs/photographs.py: Flickr8k and photographs of COCO in one file of annotations."""
from pathlib import Path

import pytest
from helpers import call

from captioning.data.annotations import read_karpathy
from captioning.data.flickr8k import LISTS, TOKENS
from captioning.files import write_json
from configs import photographs

SHORT, LONGEST, LONG = "a dog runs", "dog " * 14 + "runs", "dog " * 15 + "runs"
TEXTS = {SHORT: [SHORT], LONGEST: [LONGEST, LONG], LONG: [LONG]}        # of images in turn


@pytest.fixture
def arguments(tmp_path):
    """Of a set with two images in each split of Flickr8k and six photographs of COCO."""
    texts = [*TEXTS.values()] * 2
    flickr8k, coco = tmp_path / "all/flickr8k", tmp_path / "all/coco/val2017"
    for folder in (flickr8k / "images", flickr8k / "text", coco):
        folder.mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(6)]
    lines = [f"{name}#{number}\t{text}\n" for name, captions in zip(names, texts, strict=True)
             for number, text in enumerate(captions)]
    (flickr8k / "text" / TOKENS).write_text("".join(lines))
    for i, name in enumerate(LISTS.values()):
        (flickr8k / "text" / name).write_text("\n".join(names[2 * i:2 * i + 2]))
    # ids in another order than in the file
    write_json(tmp_path / "captions.json", {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (10, 30, 20, 60, 50, 40)],
        "annotations": [{"image_id": 10 * i, "caption": text}
                        for i, captions in enumerate(texts, start=1) for text in captions]})
    return [flickr8k / "text", flickr8k / "images", tmp_path / "captions.json", coco,
            tmp_path / "out.json"]


def test_flickr8k_and_coco_in_one_file(arguments, monkeypatch, capsys):
    monkeypatch.setattr(photographs, "VALIDATION", 2)
    call(photographs, *arguments)
    # the last line, which configs/train_photographs.sh gives to preparedataset.py
    root = Path(capsys.readouterr().out.splitlines()[-1])
    assert root == arguments[1].parents[1]
    records = {record.name: record for record in read_karpathy(arguments[-1])}
    assert {name: (record.split, record.path) for name, record in records.items()} == {
        "0.jpg": ("train", "flickr8k/images/0.jpg"), "1.jpg": ("train", "flickr8k/images/1.jpg"),
        "4.jpg": ("test", "flickr8k/images/4.jpg"), "5.jpg": ("test", "flickr8k/images/5.jpg"),
        **{f"{i:012d}.jpg": ("val" if i > 40 else "train", f"coco/val2017/{i:012d}.jpg")
           for i in range(10, 70, 10)}}

    # captions of up to 15 words, but for images that have no others, and for the other splits
    captions = {name: record.raw for name, record in records.items()}
    assert captions["0.jpg"] == [SHORT] and captions["1.jpg"] == [LONGEST]
    assert captions["4.jpg"] == [LONGEST, LONG] and captions["5.jpg"] == [LONG]
    assert [captions[f"{i:012d}.jpg"] for i in range(10, 70, 10)] == [
        [SHORT], [LONGEST], [LONG], [SHORT], [LONGEST, LONG], [LONG]]


def test_the_script_gives_as_many_arguments():
    text = Path(photographs.__file__).with_name("train_photographs.sh").read_text("utf-8")
    call = text.split("python -m configs.photographs")[1].split("|")[0].replace("\\\n", " ").split()
    parser = photographs.get_args_parser()
    assert len(call) == sum(not action.option_strings for action in parser._actions)
