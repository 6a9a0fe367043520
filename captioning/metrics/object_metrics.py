"""Metrics of the objects that captions name: CHAIR, and precision and recall of frequent object words."""
from captioning.data.vocabulary import tokenise


def chair_scores(captions, references, entries, objects):
    """CHAIR (Rohrbach et al. 2018) of N captions, from N lists of reference captions and N box entries or None.

    Returns {"chair_i": share of named objects that are not in the image, "chair_s": share of captions that name such an
    object, "object_precision": 1 − chair_i}. If `objects` has biased categories, also "object_precision_biased" and
    "object_precision_unbiased", each if captions name such categories; "companions_invented": among the images that
    show the first category of a pair without its companion, the share whose caption names the companion;
    "companions_named": among the images that show a companion, the share whose caption names it; and
    "companions_named_minus_invented", the difference of the two.
    """
    is_correct, is_biased, captions_correct, invented, found = [], [], [], [], []
    for named, present in named_and_present_categories(captions, references, entries, objects):
        is_correct += [category in present for category in named]
        is_biased += [category in objects.biased for category in named]
        captions_correct.append(all(category in present for category in named))
        invented += [companion in named for category, companion in objects.pairs.items()
                     if category in present and companion not in present]
        found += [companion in named for companion in objects.biased & present]
    precision = _share(is_correct)
    scores = {"chair_i": 1 - precision, "chair_s": 1 - _share(captions_correct), "object_precision": precision}
    if objects.biased:
        for name, wanted in (("biased", True), ("unbiased", False)):
            selected = [correct for correct, biased in zip(is_correct, is_biased, strict=True) if biased == wanted]
            scores |= {f"object_precision_{name}": _share(selected)} if selected else {}
    shares = {"companions_invented": _share(invented)} if invented else {}
    shares |= {"companions_named": _share(found)} if found else {}
    if invented and found:
        shares["companions_named_minus_invented"] = shares["companions_named"] - shares["companions_invented"]
    return scores | shares


def named_and_present_categories(captions, references, entries, objects):
    """Yields for each caption (list of the categories that it names, set of the categories present in its image)."""
    for caption, image_references, entry in zip(captions, references, entries, strict=True):
        named = [category for _, category in objects.named(tokenise(caption))]
        yield named, objects.present(entry, image_references)


def frequent_word_scores(captions, references, words):
    """Means over `words` of precision, recall and F1 of a word occurring in a caption (docs/method.md, section 9).

    A prediction is correct if a reference caption of the image contains the word. Returns {"map": mean precision of the
    words that occur in captions, "map_recall": mean recall of those that occur in references, "map_f1": mean F1 of
    those that occur in either}, without the means of no words.
    """
    predicted = [set(tokenise(caption)) for caption in captions]
    true = [set().union(*(tokenise(text) for text in texts)) for texts in references]
    precision, recall, f1 = [], [], []
    for word in dict.fromkeys(words):
        true_positives = sum(word in p and word in t for p, t in zip(predicted, true, strict=True))
        in_captions, in_references = sum(word in p for p in predicted), sum(word in t for t in true)
        precision += [true_positives / in_captions] if in_captions else []
        recall += [true_positives / in_references] if in_references else []
        f1 += [2 * true_positives / (in_captions + in_references)] if in_captions + in_references else []
    means = zip(("map", "map_recall", "map_f1"), (precision, recall, f1), strict=True)
    return {name: sum(values) / len(values) for name, values in means if values}


def _share(values):
    return sum(values) / len(values) if values else 1.0
