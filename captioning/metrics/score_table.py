"""Scores of captions by metrics that know nothing of each other; their table, and each picture's scores as CSV."""
import csv
import io

from captioning.errors import InputError
from captioning.files import write_text


def score_all(captions, references, scorers):
    """({key: score}, {key: [score of each caption]}, {metric: why it is missing}) of `scorers`, {metric: function of
    captions and references that returns the first two}."""
    totals, each, problems = {}, {}, {}
    for metric, scorer in scorers.items():
        try:
            total, single = scorer(captions, references)
        except InputError as error:
            problems[metric] = str(error)
        except Exception as error:      # whatever happens in one metric's tools, the others' results stay
            problems[metric] = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            totals |= total
            each |= single
    return totals, each, problems


def format_table(runs):
    """A table, as text, of {run: {metric: number}}."""
    names = list(dict.fromkeys(name for metrics in runs.values() for name in metrics))
    rows = [["", *runs]] + [[name, *(_cell(metrics.get(name)) for metrics in runs.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _cell(value):
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def write_per_image(path, captions, each):
    """CSV of captions {file name: text} and their scores {key: [number of each caption]}."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption", *each])
    for (name, caption), *values in zip(captions.items(), *each.values(), strict=True):
        writer.writerow([name, caption, *(value if isinstance(value, str) else f"{value:.6g}" for value in values)])
    write_text(path, text.getvalue())
