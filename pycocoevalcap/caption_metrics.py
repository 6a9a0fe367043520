"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, by the installed package pycocoevalcap.

Each metric takes one caption and a list of reference captions per image and returns the score of
all captions, {"bleu_1": …}, and the scores of each caption, {"bleu_1": […]}. Captions are tokenised
by the official PTB tokeniser, a Java program, or without Java by captioning.metrics.ptb_tokeniser,
which a warning says.
"""
import importlib
import re
import sys
from functools import cache

from captioning.errors import InputError
from captioning.metrics.ptb_tokeniser import ptb_tokens
from pycocoevalcap import java

# captions of whole words, which need no tokeniser: it splits none but these
PLAIN = re.compile(r"(?!.*\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b)[a-z ]*", re.IGNORECASE)
tokens_of = {}      # the tokens of other captions: every validation has the same references


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
    truths, results = _tokenised(captions, references)
    return _named("meteor", *java.meteor([text for text, in results.values()],
                                         list(truths.values())))


def spice(captions, references, corenlp):
    """SPICE (Anderson et al. 2016); requires Java. corenlp: folder of Stanford CoreNLP 3.6.0."""
    from pycocoevalcap import spice_jar
    truths, results = _tokenised(captions, references)
    each = spice_jar.spice([text for text, in results.values()], list(truths.values()), corenlp)
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
    """The arguments of the package's scorers: {index: [reference, …]} and {index: [caption]}, each
    text as its tokens joined by spaces."""
    new = {text for texts in [captions, *references] for text in texts
           if text not in tokens_of and not PLAIN.fullmatch(text)}
    if new:
        tokens_of.update(zip(new, _tokenise(list(new)), strict=True))

    def tokens(text):
        return tokens_of[text] if text in tokens_of else " ".join(text.lower().split())
    truths = {i: list(map(tokens, texts)) for i, texts in enumerate(references)}
    return truths, {i: [tokens(caption)] for i, caption in enumerate(captions)}


def _tokenise(texts):
    try:
        return java.tokenise(texts)
    except InputError as error:
        _warn(f"captions are split by a Python version of the tokeniser, as {error}")
        return [" ".join(ptb_tokens(text)) for text in texts]


@cache      # once for each message
def _warn(message):
    print(f"warning: {message}", file=sys.stderr)
