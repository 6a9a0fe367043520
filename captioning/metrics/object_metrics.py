"""Metrics of the objects that captions name: CHAIR, and precision and recall of frequent object words."""
from captioning.data.vocabulary import tokenise


def chair_scores(captions, references, entries, objects):
    """CHAIR of captions, with their pictures' references and box entries (or None), a list item an image.

    {"chair_i": share of object words whose object is not there, "chair_s": share of captions with such a word,
    "object_precision": 1 − chair_i} and, if some objects are biased, object_precision of those and of all others, as
    far as captions name any, and "companions_invented", the share of pictures with the first of a pair and without its
    companion whose caption names the companion.
    """
    right, biased, per_caption, invented = [], [], [], []
    for there, categories in named_and_present(captions, references, entries, objects):
        right += [category in there for category in categories]
        biased += [category in objects.biased for category in categories]
        per_caption.append(all(category in there for category in categories))
        invented += [companion in categories for category, companion in objects.pairs.items()
                     if category in there and companion not in there]
    found = {"chair_i": 1 - _share(right), "chair_s": 1 - _share(per_caption), "object_precision": _share(right)}
    if objects.biased:
        for name, wanted in (("biased", True), ("unbiased", False)):
            chosen = [ok for ok, b in zip(right, biased, strict=True) if b == wanted]
            found |= {f"object_precision_{name}": _share(chosen)} if chosen else {}
    return found | ({"companions_invented": _share(invented)} if invented else {})


def named_and_present(captions, references, entries, objects):
    """For each caption the categories in its picture and those that it names, as often as it does."""
    for caption, sentences, entry in zip(captions, references, entries, strict=True):
        named = [category for _, category in objects.named(tokenise(caption))]
        yield objects.present(entry, sentences), named


def frequent_word_scores(captions, references, words):
    """{"map", "map_recall", "map_f1"}: means over `words` of precision, recall and F1 of "the caption has the word"
    against "a reference has it" (method.md, section 9). Precision is of words that are predicted at all, recall of
    words that references have, F1 of both."""
    predicted = [set(tokenise(caption)) for caption in captions]
    true = [set().union(*(tokenise(text) for text in sentences)) for sentences in references]
    precision, recall, f1 = [], [], []
    for word in dict.fromkeys(words):
        both = sum(word in said and word in there for said, there in zip(predicted, true, strict=True))
        said, there = sum(word in some for some in predicted), sum(word in some for some in true)
        precision += [both / said] if said else []
        recall += [both / there] if there else []
        f1 += [2 * both / (said + there)] if said + there else []
    means = zip(("map", "map_recall", "map_f1"), (precision, recall, f1), strict=True)
    return {name: sum(values) / len(values) for name, values in means if values}


def _share(values):
    return sum(values) / len(values) if values else 1.0
