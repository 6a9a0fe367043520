"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, computed by the installed package pycocoevalcap.

Each metric takes one caption and a list of reference captions per image and returns the score of all captions,
{"bleu_1": …}, and the scores of each caption, {"bleu_1": […]}. Captions are tokenised by the PTB tokeniser: its Java
version for METEOR and SPICE, which run on Java themselves, and captioning.metrics.ptb_tokeniser for the other metrics.
"""
from functools import lru_cache

from captioning.errors import InputError
from captioning.metrics.ptb_tokeniser import ptb_tokens


def scores(captions, references, metrics=("bleu", "rouge_l", "cider")):
    """The scores {"bleu_1": …, "cider": …} of all captions in the given metrics, which are keys of SCORERS."""
    scores_by_key = {}
    for name in metrics:
        scores_by_key |= SCORERS[name](captions, references)[0]
    return scores_by_key


def bleu(captions, references):
    """BLEU-1 to BLEU-4 (Papineni et al. 2002), with the length of the closest reference."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
    except ImportError as error:
        raise missing(error) from error
    corpus, each = Bleu(4).compute_score(*_tokenised(captions, references), verbose=0)
    return ({f"bleu_{n}": float(value) for n, value in enumerate(corpus, start=1)},
            {f"bleu_{n}": list(map(float, values)) for n, values in enumerate(each, start=1)})


def rouge_l(captions, references):
    """ROUGE-L (Lin 2004)."""
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise missing(error) from error
    return _named("rouge_l", *Rouge().compute_score(*_tokenised(captions, references)))


def cider(captions, references):
    """CIDEr-D (Vedantam et al. 2015), "CIDEr" in the official tools, with document frequencies of these references."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise missing(error) from error
    return _named("cider", *Cider().compute_score(*_tokenised(captions, references)))


def meteor(captions, references):
    """METEOR 1.5 (Denkowski and Lavie 2014); requires Java."""
    from pycocoevalcap import java
    return _named("meteor", *java.meteor(*_tokenised_by_java(captions, references)))


def spice(captions, references, corenlp):
    """SPICE (Anderson et al. 2016); requires Java. corenlp: folder of Stanford CoreNLP 3.6.0, see `spice_jar`."""
    from pycocoevalcap import spice_jar
    each = spice_jar.spice(*_tokenised_by_java(captions, references), corenlp)
    return _named("spice", sum(each) / len(each), each)


SCORERS = {"bleu": bleu, "meteor": meteor, "rouge_l": rouge_l, "cider": cider}


def missing(error):
    """The InputError for an ImportError of the package pycocoevalcap."""
    return InputError(f"the caption metrics are not installed ({error}): pip install pycocoevalcap")


def _named(name, corpus, each):
    return {name: float(corpus)}, {name: list(map(float, each))}


def _tokenised(captions, references):
    """The arguments of the package's scorers: {index: [reference, …]} and {index: [caption]}."""
    truths = {i: [" ".join(ptb_tokens(text)) for text in texts] for i, texts in enumerate(references)}
    return truths, {i: [" ".join(ptb_tokens(caption))] for i, caption in enumerate(captions)}


def _tokenised_by_java(captions, references):
    return _tokenise_once(tuple(captions), tuple(map(tuple, references)))


@lru_cache(maxsize=1)       # METEOR and SPICE use the same tokens
def _tokenise_once(captions, references):
    from pycocoevalcap import java
    lines = iter(java.tokenise([*captions, *(text for texts in references for text in texts)]))
    return [next(lines) for _ in captions], [[next(lines) for _ in texts] for texts in references]
