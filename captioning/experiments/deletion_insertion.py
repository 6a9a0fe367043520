"""Deletion and insertion (Petsiuk, Das and Saenko 2018): removing or adding relevant patches."""
import torch

from captioning.experiments.ablation import grey_out, patch_ranks
from captioning.experiments.batch import encode_images, word_log_p
from captioning.experiments.experiment import Experiment, Part, curves
from captioning.report import plots

FRACTIONS = [i / 10 for i in range(11)]


def deletion_insertion(batch, rows, steps):
    """Areas under the curves of a word's log-probability as patches are removed or added.

    Deletion sets patches of 8×8 pixels to the mean colour, the most relevant first; insertion
    restores them in this order in an image of the mean colour. A faithful explanation has a low
    area of deletion and a high area of insertion. Measures: the areas deletion and insertion, and
    the curves' values deletion_0.0, deletion_0.1, …, insertion_1.0."""
    model = batch.study.model
    values = {}
    images = batch.images[rows]
    captions = batch.captions[rows]
    original = batch.log_p[rows, steps]
    blank = word_log_p(model, encode_images(model, torch.zeros_like(images)), captions, steps)

    def log_p_without(hidden):
        return word_log_p(model, encode_images(model, grey_out(images, hidden)), captions, steps)

    for method in batch.study.methods:
        rank = patch_ranks(batch.maps(method, rows, steps))                            # (n, P)
        deletion = [original]
        insertion = [blank]
        for fraction in FRACTIONS[1:-1]:
            is_relevant = rank < round(fraction * rank.shape[1])
            deletion.append(log_p_without(is_relevant))
            insertion.append(log_p_without(~is_relevant))
        both = {"deletion": [*deletion, blank], "insertion": [*insertion, original]}
        for name, curve in both.items():
            values |= {(method, f"{name}_{x}"): y for x, y in zip(FRACTIONS, curve, strict=True)}
            values[method, name] = torch.trapezoid(torch.stack(curve), dx=FRACTIONS[1], dim=0)
    return values


def draw(path, table, values):
    """Both curves over the fraction of patches."""
    panels = {name: curves(table, [f"{name}_{x}" for x in FRACTIONS])
              for name in ("deletion", "insertion")}
    plots.draw_curves(path, panels, FRACTIONS, "fraction of patches",
                      "log-probability of the word")


DELETION_INSERTION = Experiment(
    (Part(lambda batch: batch.later_object_words, deletion_insertion),),
    draw, shown=("deletion", "insertion"))
