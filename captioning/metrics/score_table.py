"""Computes metrics independently of each other; writes them as a table and for each image."""
import pandas as pd

from captioning.errors import InputError
from captioning.files import write_text


def score_all(captions, references, scorers):
    """Scores captions with each of the `scorers`, {metric: function}, of which none depends on the
    others' success.

    A scorer takes N captions and N lists of reference captions and returns ({key: score}, {key:
    [score of each caption]}). Returns these two dicts joined over all scorers, and {metric: error
    message} of the scorers that failed.
    """
    scores = {}
    per_caption = {}
    problems = {}
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
    def cell(value):
        return f"{value:.4f}" if isinstance(value, float) else str(value)
    columns = {run: pd.Series(metrics, dtype=object).map(cell) for run, metrics in runs.items()}
    return pd.DataFrame(columns).fillna("").to_string()


def write_per_image(path, captions, per_caption):
    """Writes {file name: caption} and scores {key: [score of each caption]}, one row per image."""
    columns = {"image": list(captions), "caption": list(captions.values()), **per_caption}
    table = pd.DataFrame(columns).astype({name: float for name, values in per_caption.items()
                                          if not isinstance(values[0], str)})
    write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
