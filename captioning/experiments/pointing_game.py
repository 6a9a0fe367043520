"""The pointing game (Zhang et al. 2016): does the most relevant pixel lie on the object?"""
from captioning.experiments.batch import Batch
from captioning.experiments.correctness import rows_and_columns
from captioning.experiments.experiment import Experiment, Part, bars


def pointing_game(batch, rows, steps):
    """Whether the most relevant pixel lies in a box of the word's object, 0 or 1 (measure hit).

    A map without positive relevance counts as a miss. Baseline, as method box: the share of the
    image that the object's boxes cover."""
    values = {}
    in_rows, in_columns = rows_and_columns(batch.boxes(rows, steps), *batch.images.shape[-2:])
    inside = (in_rows[..., None] & in_columns[..., None, :]).any(1)                    # (n, H, W)
    for method in batch.study.methods:
        maximum, position = batch.maps(method, rows, steps).flatten(1).max(1)
        hit = inside.flatten(1).gather(1, position[:, None]).squeeze(1) & (maximum > 0)
        values[method, "hit"] = hit.to(batch.images.dtype)
    values["box", "hit"] = inside.to(batch.images.dtype).mean((1, 2))
    return values


POINTING_GAME = Experiment(
    (Part(Batch.words_with_box, pointing_game),),
    bars({"hit": "most relevant pixel inside the box"}), shown=("hit",), needs_boxes=True)
