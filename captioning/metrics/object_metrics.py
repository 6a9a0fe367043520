"""Metrics of the objects that captions name: CHAIR, and precision of frequent object words."""
from captioning.data.vocabulary import tokenise


def chair(captions, references, entries, objects):
    """CHAIR (Rohrbach et al. 2018) as a caption metric: scores of all captions, and for each
    caption the objects that it names and those of them that are not present.

    references: a list per caption; entries: the boxes of each image or None; without boxes the
    references alone decide which objects are present. The scores are {"chair_i": share of named
    objects that are not in the image, "chair_s": share of captions that name such an object,
    "object_precision": 1 − chair_i}.

    If `objects` has biased categories, also "object_precision_biased" and
    "object_precision_unbiased"; "companions_invented": among the images that show the first
    category of a pair without its companion, the share whose caption names the companion;
    "companions_named": among the images that show a companion, the share whose caption names it;
    "companions_named_minus_invented". A share is omitted if there is nothing to count.
    """
    is_correct = {True: [], False: []}      # of the named objects, by whether they are biased
    companions_invented = []
    companions_named = []
    per_caption = {"objects": [], "chair_s": [], "invented_objects": []}
    for named, present in named_and_present_categories(captions, references, entries, objects):
        invented = sorted(set(named) - present)
        per_caption["objects"].append("; ".join(named))
        per_caption["chair_s"].append(bool(invented))
        per_caption["invented_objects"].append("; ".join(invented))
        for category in named:
            is_correct[category in objects.biased].append(category in present)
        for category, companion in objects.pairs.items():
            if category in present and companion not in present:
                companions_invented.append(companion in named)
        companions_named += [companion in named for companion in objects.biased & present]

    precision = _mean(is_correct[True] + is_correct[False]) if any(is_correct.values()) else 1.0
    scores = {"chair_i": 1 - precision, "chair_s": _mean(per_caption["chair_s"]),
              "object_precision": precision}
    if objects.biased:
        shares = {"object_precision_biased": is_correct[True],
                  "object_precision_unbiased": is_correct[False],
                  "companions_invented": companions_invented, "companions_named": companions_named}
        scores |= {name: _mean(values) for name, values in shares.items() if values}
    if companions_invented and companions_named:
        difference = scores["companions_named"] - scores["companions_invented"]
        scores["companions_named_minus_invented"] = difference
    return scores, per_caption


def named_and_present_categories(captions, references, entries, objects):
    """Yields for each caption the list of the categories that it names, and the set of those
    present in its image."""
    for caption, texts, entry in zip(captions, references, entries, strict=True):
        named = [category for _, category in objects.named(tokenise(caption))]
        yield named, objects.present(entry, texts)


def frequent_word_scores(captions, references, words):
    """Means over `words` of precision, recall and F1 of a word occurring in a caption
    (docs/method.md, section 9).

    A prediction is correct if a reference caption of the image contains the word. Returns {"map":
    mean precision of the words that occur in captions, "map_recall": mean recall of those that
    occur in references, "map_f1": mean F1 of those that occur in either}, without the means of no
    words.
    """
    predicted = [set(tokenise(caption)) for caption in captions]
    true = [set().union(*map(tokenise, texts)) for texts in references]
    scores = {"map": [], "map_recall": [], "map_f1": []}
    for word in dict.fromkeys(words):
        in_captions = sum(word in words_of for words_of in predicted)
        in_references = sum(word in words_of for words_of in true)
        in_both = sum(word in p & t for p, t in zip(predicted, true, strict=True))
        if in_captions:
            scores["map"].append(in_both / in_captions)
        if in_references:
            scores["map_recall"].append(in_both / in_references)
        if in_captions or in_references:
            scores["map_f1"].append(2 * in_both / (in_captions + in_references))
    return {name: _mean(values) for name, values in scores.items() if values}


def _mean(values):
    return sum(values) / len(values)
