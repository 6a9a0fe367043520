"""Compares the metrics of several runs: python studies/compare.py output/demo output/demo_finetuned

Prints the metrics_<split>.json that evaluation.py wrote to the folders of the runs as one table,
and draws them in compare_<split>.png."""
import math
import os
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning.cli import Parser
from captioning.errors import InputError, run_script
from captioning.files import read_json
from captioning.metrics.score_table import format_table
from captioning.report.plots import save
from captioning.runs import record_run

# what metrics_<split>.json contains besides scores: it is in the table, not in the figure
NO_SCORES = ("explained_words", "box_share")


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="folder that evaluation.py wrote to")
    add("--split", choices=["train", "val", "test"], default="test", help="split of the metrics")
    add("--save_path", metavar="FOLDER", help="output folder (default: the runs' common parent)")
    return parser


def draw(path, runs):
    """Draws one panel per score, with its own scale and one bar per run."""
    from matplotlib.figure import Figure
    table = pd.DataFrame(runs).drop(list(NO_SCORES), errors="ignore")   # one column per run
    columns = min(5, len(table))
    rows = math.ceil(len(table) / columns)
    size = 2.4 * columns + 1, 2.1 * rows + 0.3 * len(runs) + 0.3
    figure = Figure(figsize=size, layout="constrained")
    for number, (name, values) in enumerate(table.iterrows(), start=1):
        axis = figure.add_subplot(rows, columns, number)
        bars = axis.bar(range(len(runs)), values, color=[f"C{k}" for k in range(len(runs))])
        axis.bar_label(bars, values.map("{:.3g}".format), fontsize=7)
        axis.set_title(name, fontsize=10)
        axis.set(xticks=[], xlim=(-0.6, len(runs) - 0.4))
        axis.margins(y=0.15)
    figure.legend(bars.patches, runs, loc="outside lower center", fontsize=9)
    save(figure, path)


def main(args):
    folders = [os.path.abspath(folder) for folder in args.runs]
    parent = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    runs = {}
    for folder in folders:
        path = Path(folder, f"metrics_{args.split}.json")
        metrics = read_json(path)
        if not isinstance(metrics, dict) or not metrics or not all(
                type(value) in (int, float) and math.isfinite(value)
                for value in metrics.values()):
            raise InputError(f"{path} must contain an object {{metric: number}}: create it with "
                             "evaluation.py")
        runs[os.path.relpath(folder, parent)] = metrics
    save_path = args.save_path or parent
    record_run(save_path, args, "compare.py")
    path = Path(save_path, f"compare_{args.split}.png")
    draw(path, runs)
    print(f"{format_table(runs)}\n{path}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
