"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, by the installed package pycocoevalcap.

Each metric takes captions, a sentence an image, and references, a list of sentences an image, and returns what they
have together and each, {"bleu_1": …} and {"bleu_1": […]}. Tokens are those of the PTB tokeniser; Java gives METEOR's
and SPICE's.
"""
from functools import lru_cache

from captioning.errors import InputError
from captioning.metrics.ptb_tokeniser import ptb_tokens


def scores(captions, references, metrics=("bleu", "rouge_l", "cider")):
    """What all captions have together, {"bleu_1": …, "cider": …}."""
    found = {}
    for name in metrics:
        found |= SCORERS[name](captions, references)[0]
    return found


def bleu(captions, references):
    """BLEU-1 to 4 against the reference of the closest length."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
    except ImportError as error:
        raise missing(error) from error
    corpus, each = Bleu(4).compute_score(*_tokenised(captions, references), verbose=0)
    return ({f"bleu_{n}": float(value) for n, value in enumerate(corpus, start=1)},
            {f"bleu_{n}": list(map(float, values)) for n, values in enumerate(each, start=1)})


def rouge_l(captions, references):
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise missing(error) from error
    return _named("rouge_l", *Rouge().compute_score(*_tokenised(captions, references)))


def cider(captions, references):
    """CIDEr-D, as the official tools call CIDEr; document frequencies are of these references."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise missing(error) from error
    return _named("cider", *Cider().compute_score(*_tokenised(captions, references)))


def meteor(captions, references):
    from pycocoevalcap import java
    return _named("meteor", *java.meteor(*_tokenised_by_java(captions, references)))


def spice(captions, references, corenlp):
    """corenlp: folder of Stanford CoreNLP 3.6.0, see spice_jar.py."""
    from pycocoevalcap import spice_jar
    each = spice_jar.spice(*_tokenised_by_java(captions, references), corenlp)
    return _named("spice", sum(each) / len(each), each)


SCORERS = {"bleu": bleu, "meteor": meteor, "rouge_l": rouge_l, "cider": cider}


def missing(error):
    return InputError(f"the caption metrics are missing ({error}): pip install pycocoevalcap")


def _named(name, corpus, each):
    return {name: float(corpus)}, {name: list(map(float, each))}


def _tokenised(captions, references):
    """What the package's scorers take: {number: [reference, …]} and {number: [caption]}."""
    truths = {i: [" ".join(ptb_tokens(text)) for text in sentences] for i, sentences in enumerate(references)}
    return truths, {i: [" ".join(ptb_tokens(caption))] for i, caption in enumerate(captions)}


def _tokenised_by_java(captions, references):
    return _tokenise_once(tuple(captions), tuple(map(tuple, references)))


@lru_cache(maxsize=1)       # METEOR's and SPICE's are the same
def _tokenise_once(captions, references):
    from pycocoevalcap import java
    lines = iter(java.tokenise([*captions, *(text for sentences in references for text in sentences)]))
    return [next(lines) for _ in captions], [[next(lines) for _ in sentences] for sentences in references]
