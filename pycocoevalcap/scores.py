"""Scores of captions against their references, by the installed package pycocoevalcap."""
from captioning.errors import InputError
from captioning.vocabulary import tokenise

METRICS = ("bleu", "rouge_l", "cider")


def scores(captions, references, metrics=METRICS):
    """captions: a sentence an image; references: list of sentences an image -> {"bleu_1": …, "cider": …}.

    Both sides are tokenised as the training captions are: lower case, word characters only.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise InputError(f"the caption metrics are missing ({error}): pip install pycocoevalcap") from error
    results = {i: [" ".join(tokenise(caption))] for i, caption in enumerate(captions)}
    truths = {i: [" ".join(tokenise(sentence)) for sentence in sentences] for i, sentences in enumerate(references)}
    found = {}
    if "bleu" in metrics:
        bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
        found |= {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    for name, scorer in (("rouge_l", Rouge), ("cider", Cider)):
        if name in metrics:
            found[name] = float(scorer().compute_score(truths, results)[0])
    return found
