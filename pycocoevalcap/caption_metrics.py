"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, by the installed package pycocoevalcap.

Each metric takes one caption and a list of reference captions per image and returns the score of
all captions, {"bleu_1": …}, and the scores of each caption, {"bleu_1": […]}. Captions are tokenised
by the PTB tokeniser: its Java version for METEOR and SPICE, which run on Java themselves, and
captioning.metrics.ptb_tokeniser for the other metrics."""
import importlib

from captioning.errors import InputError
from captioning.metrics.ptb_tokeniser import ptb_tokens


def scores(captions, references, metrics=("bleu", "rouge_l", "cider")):
    """The scores {"bleu_1": …, "cider": …} of all captions in the given metrics, keys of SCORERS.
    """
    scores_by_key = {}
    for name in metrics:
        scores_by_key |= SCORERS[name](captions, references)[0]
    return scores_by_key


def bleu(captions, references):
    """BLEU-1 to BLEU-4 (Papineni et al. 2002), with the length of the closest reference."""
    scorer = _installed("bleu.bleu").Bleu(4)
    corpus, each = scorer.compute_score(*_tokenised(captions, references), verbose=0)
    keys = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
    return dict(zip(keys, map(float, corpus), strict=True)), dict(zip(keys, each, strict=True))


def rouge_l(captions, references):
    """ROUGE-L (Lin 2004)."""
    scorer = _installed("rouge.rouge").Rouge()
    return _named("rouge_l", *scorer.compute_score(*_tokenised(captions, references)))


def cider(captions, references):
    """CIDEr-D (Vedantam et al. 2015), "CIDEr" in the official tools, with document frequencies of
    these references."""
    scorer = _installed("cider.cider").Cider()
    return _named("cider", *scorer.compute_score(*_tokenised(captions, references)))


def meteor(captions, references):
    """METEOR 1.5 (Denkowski and Lavie 2014); requires Java."""
    from pycocoevalcap import java
    return _named("meteor", *java.meteor(*_tokenised_by_java(captions, references)))


def spice(captions, references, corenlp):
    """SPICE (Anderson et al. 2016); requires Java. corenlp: folder of Stanford CoreNLP 3.6.0."""
    from pycocoevalcap import spice_jar
    each = spice_jar.spice(*_tokenised_by_java(captions, references), corenlp)
    return _named("spice", sum(each) / len(each), each)


SCORERS = {"bleu": bleu, "meteor": meteor, "rouge_l": rouge_l, "cider": cider}


def _installed(module):
    """A module of the installed package, which training machines may lack."""
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise InputError(f"the caption metrics are not installed ({error}): pip install "
                         "pycocoevalcap") from error


def _named(name, corpus, each):
    return {name: float(corpus)}, {name: list(map(float, each))}


def _tokenised(captions, references):
    """The arguments of the package's scorers: {index: [reference, …]} and {index: [caption]}."""
    truths = {}
    results = {}
    for i, (caption, texts) in enumerate(zip(captions, references, strict=True)):
        truths[i] = [" ".join(ptb_tokens(text)) for text in texts]
        results[i] = [" ".join(ptb_tokens(caption))]
    return truths, results


def _tokenised_by_java(captions, references):
    from pycocoevalcap import java
    lines = java.tokenise([*captions, *(text for texts in references for text in texts)])
    rest = iter(lines[len(captions):])
    return lines[:len(captions)], [[next(rest) for _ in texts] for texts in references]
