"""The tokens of captions are those of the original PTB tokeniser, on the captions of COCO that the
package pycocoevalcap contains; those of its Python version are nearly so."""
import json
import random
import zipfile

import pytest

from captioning.errors import InputError
from captioning.metrics.ptb_tokeniser import ptb_tokens
from pycocoevalcap import caption_metrics, java


@pytest.fixture(scope="module")
def coco_captions():
    """All 616,767 captions of COCO 2014."""
    captions = []
    with zipfile.ZipFile(java.package_file("spice", "spice-1.0.jar")) as jar:
        for part in ("train", "val"):
            with jar.open(f"coco/annotations/captions_{part}2014.json") as file:
                captions += [item["caption"] for item in json.load(file)["annotations"]]
    return captions


def test_tokens_equal_those_of_the_original_on_coco(coco_captions, pytestconfig):
    captions = random.Random(0).sample(coco_captions, pytestconfig.getoption("captions"))
    expected = java.tokenise(captions)
    pairs = zip(captions, expected, strict=True)
    same = sum(" ".join(ptb_tokens(text)) == tokens for text, tokens in pairs)
    print(f"{same} of {len(captions)} captions have the same tokens")
    assert same >= len(captions) - 10

    # what the metrics use: Java's tokens, and for captions of plain words no Java
    _, used = caption_metrics._tokenised(captions[:20_000], [[]] * 20_000)
    pairs = zip(used.values(), expected, strict=False)
    # a letter and a full stop that end a line depend on the next line
    assert sum(tokens == text for (tokens,), text in pairs) >= 19_999


UNUSUAL = [
    "", "   ", ".", "A dog's T-shirt, isn't it?", "cannot gonna wanna", "a\nb\r\nc\u2028d\x85e",
    "(a) [b] {c}", "M&Ms and AT&T, R&B", "Café – naïve… ‘so’ “it” 日本語 🍕",
    "St. Patrick's at 11:05am, 10% off, $5", "dunkin' donuts 'til 5 o'clock",
    "a u.s. flag on a t.v.", "red/blue and/or w/ 1/2", "1,000 x 2.5 3-d 4x4 no. 5",
    "fish 'n' chips ... !! ?? ;)", "a man <unk> a horse", "<start> a dog <end>", "a dog</s>",
    "a sign for B&amp;B", "L'Oréal", "s'mores", "spaghetti-o's", "Nov. 5", "एक कुत्ता घास में",
    "cafe\u0301", "dog ❤\ufe0f", "\u200b a", "y'all", "-5", "½ of 5¢ in C#",
    "rock`n`roll", "don`t say o`clock", "the dog`s `bone`", "N'Sync", "d's and n's", "T's J'adore",
    "Hawai'i I'll"]


def test_unusual_captions():
    assert [" ".join(ptb_tokens(text)) for text in UNUSUAL] == java.tokenise(UNUSUAL)


def test_metrics_use_the_official_tokens(monkeypatch):
    cases = {
        "a man <unk> a horse": "a man <unk> a horse", "a dog</s>": "a dog </s>", "B&amp;B": "b&b",
        "एक कुत्ता": "एक कुत्ता", "cafe\u0301": "cafe\u0301", "\u200b a": "a", "...": "",
        "rock`n`roll": "rock n`roll", "Nov. 5": "nov. 5", "a  Dog ": "a dog",
        "I cannot": "i can not"}
    monkeypatch.setattr(caption_metrics, "tokens_of", {})
    truths, results = caption_metrics._tokenised([*cases], [[text] for text in cases])
    assert list(truths.values()) == list(results.values()) == [[text] for text in cases.values()]


def test_without_java_a_warning_says_that_tokens_are_of_the_python_version(monkeypatch, capsys):
    def no_java():
        raise InputError("no working Java runtime was found: install one")

    monkeypatch.setattr(java, "runtime", no_java)
    monkeypatch.setattr(caption_metrics, "tokens_of", {})
    caption_metrics._warn.cache_clear()
    scores = caption_metrics.scores(["a <unk> man, riding", "two."], [["a man riding"], ["Two"]])
    assert scores["bleu_1"] == pytest.approx(0.8)
    warning = "a Python version of the tokeniser, as no working Java"
    assert capsys.readouterr().err.count(warning) == 1
    assert caption_metrics.scores(["a dog"], [["a dog"]], ("rouge_l",)) == {"rouge_l": 1}
    assert not capsys.readouterr().err
