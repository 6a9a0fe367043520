"""Explanations as text on the console."""
from captioning.report.page import caption_text


def describe(name, arrays, quiet=False):
    """The caption of an image and, unless quiet, one line per word: its probability and, by LRP, the split of its logit
    (docs/method.md, section 4), with a flag for object words that come from language.

    name: of the image; arrays: the contents of explanation.npz.
    """
    words, lines = arrays["words"].tolist(), []
    if not quiet:
        parts = {"image": "lrp_image", "words": "lrp_previous", "<start>": "lrp_start", "rest": "lrp_rest"}
        parts = {title: arrays[key] for title, key in parts.items() if key in arrays}
        width = max(map(len, words)) + 2
        lines = ["  " + "word".ljust(width) + "probability" + "".join(title.rjust(10) for title in parts)]
        for t, word in enumerate(words[1:]):
            numbers = "".join(f"{values[t]:+10.2f}" for values in parts.values())
            flag = "   from language" if "flags" in arrays and arrays["flags"][t] else ""
            lines.append(f"  {word.ljust(width)}{arrays['probabilities'][t]:11.3f}{numbers}{flag}")
    return "\n".join([f"{name}: {caption_text(words)}", *lines])
