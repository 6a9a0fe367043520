"""The tokeniser against the PTB tokeniser itself, on captions of COCO, which pycocoevalcap carries."""
import json
import random
import zipfile

import pytest

from captioning.metrics.ptb_tokeniser import ptb_tokens
from pycocoevalcap import java


@pytest.fixture(scope="module")
def coco_sentences():
    """All 616,767 captions of COCO 2014."""
    found = []
    with zipfile.ZipFile(java.package_file("spice", "spice-1.0.jar")) as jar:
        for part in ("train", "val"):
            with jar.open(f"coco/annotations/captions_{part}2014.json") as file:
                found += [item["caption"] for item in json.load(file)["annotations"]]
    return found


def test_tokens_are_those_of_the_jar_on_coco(coco_sentences):
    sentences = random.Random(0).sample(coco_sentences, 100_000)
    expected = java.tokenise(sentences)
    same = sum(" ".join(ptb_tokens(text)) == tokens for text, tokens in zip(sentences, expected, strict=True))
    print(f"{same} of {len(sentences)} sentences have the jar's tokens")
    assert same >= 99_990


ODD = ["", "   ", ".", "A dog's T-shirt, isn't it?", "cannot gonna wanna", "a\nb\r\nc\u2028d\x85e", "(a) [b] {c}",
       "M&Ms and AT&T, R&B", "Café – naïve… ‘so’ “it” 日本語 🍕",
       "St. Patrick's at 11:05am, 10% off, $5", "dunkin' donuts 'til 5 o'clock",
       "a u.s. flag on a t.v.", "red/blue and/or w/ 1/2", "1,000 x 2.5 3-d 4x4 no. 5", "fish 'n' chips ... !! ?? ;)"]


@pytest.mark.parametrize("text", ODD)
def test_odd_sentences(text):
    assert " ".join(ptb_tokens(text)) == java.tokenise([text])[0]
