"""Computes several metrics independently of each other; formats them as a table and writes the scores per image."""
import csv
import io

from captioning.errors import InputError
from captioning.files import write_text


def score_all(captions, references, scorers):
    """Scores N captions with each of the `scorers`, {metric: function}, of which none depends on the others' success.

    A scorer takes N captions and N lists of reference captions and returns ({key: score}, {key: [score of each
    caption]}). Returns these two dicts joined over all scorers, and {metric: error message} of the scorers that failed.
    """
    scores, per_caption, problems = {}, {}, {}
    for metric, scorer in scorers.items():
        try:
            metric_scores, metric_per_caption = scorer(captions, references)
        except InputError as error:
            problems[metric] = str(error)
        except Exception as error:      # of any kind: metrics rely on external tools
            problems[metric] = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            scores |= metric_scores
            per_caption |= metric_per_caption
    return scores, per_caption, problems


def format_table(runs):
    """A text table of {run: {metric: number}}: one row per metric, one column per run."""
    names = list(dict.fromkeys(name for metrics in runs.values() for name in metrics))
    rows = [["", *runs]] + [[name, *(_cell(metrics.get(name)) for metrics in runs.values())] for name in names]
    return align(rows)


def align(rows):
    """The text of rows of cells: the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _cell(value):
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def write_per_image(path, captions, per_caption):
    """Writes {file name: caption} and scores {key: [score of each caption]} as CSV, one row per image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption", *per_caption])
    for (name, caption), *values in zip(captions.items(), *per_caption.values(), strict=True):
        writer.writerow([name, caption, *(value if isinstance(value, str) else f"{value:.6g}" for value in values)])
    write_text(path, text.getvalue())
