"""The tokeniser against the original PTB tokeniser, on the captions of COCO that the package
pycocoevalcap contains."""
import json
import random
import zipfile

import pytest

from captioning.metrics.ptb_tokeniser import ptb_tokens
from pycocoevalcap import java


@pytest.fixture(scope="module")
def coco_captions():
    """All 616,767 captions of COCO 2014."""
    captions = []
    with zipfile.ZipFile(java.package_file("spice", "spice-1.0.jar")) as jar:
        for part in ("train", "val"):
            with jar.open(f"coco/annotations/captions_{part}2014.json") as file:
                captions += [item["caption"] for item in json.load(file)["annotations"]]
    return captions


def test_tokens_equal_those_of_the_original_on_coco(coco_captions):
    captions = random.Random(0).sample(coco_captions, 100_000)
    expected = java.tokenise(captions)
    pairs = zip(captions, expected, strict=True)
    same = sum(" ".join(ptb_tokens(text)) == tokens for text, tokens in pairs)
    print(f"{same} of {len(captions)} captions have the same tokens")
    assert same >= 99_990


UNUSUAL = [
    "", "   ", ".", "A dog's T-shirt, isn't it?", "cannot gonna wanna", "a\nb\r\nc\u2028d\x85e",
    "(a) [b] {c}", "M&Ms and AT&T, R&B", "Café – naïve… ‘so’ “it” 日本語 🍕",
    "St. Patrick's at 11:05am, 10% off, $5", "dunkin' donuts 'til 5 o'clock",
    "a u.s. flag on a t.v.", "red/blue and/or w/ 1/2", "1,000 x 2.5 3-d 4x4 no. 5",
    "fish 'n' chips ... !! ?? ;)"]


@pytest.mark.parametrize("text", UNUSUAL)
def test_unusual_captions(text):
    assert " ".join(ptb_tokens(text)) == java.tokenise([text])[0]
