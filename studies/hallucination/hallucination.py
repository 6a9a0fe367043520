"""Tables and figure of run.sh: python studies/hallucination/hallucination.py OUT

Reads OUT/<model>_<seed>/<mode>/metrics_test.json. Writes OUT/table.md with means over random seeds
and paired differences to the control, and OUT/trade_off.png, mean differences of hallucination and
CIDEr."""
import re
import sys
from pathlib import Path

import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2]))
from captioning.cli import Parser
from captioning.errors import InputError, run_script
from captioning.files import read_json, write_text
from captioning.report.plots import save

MODES = ("base", "ce", "erase", "lrp", "cider", "lrp_cider")
CONTROL = "ce"
WEIGHT = re.compile(r"erase_mu(\d*\.?\d+)")      # a value of μ
METRICS = {"cider": "CIDEr", "bleu_4": "BLEU-4", "map": "precision", "map_recall": "recall",
           "map_f1": "F1", "chair_i": "CHAIR_i", "chair_s": "CHAIR_s",
           "companions_invented": "companions invented", "companions_named": "companions named",
           "companions_named_minus_invented": "named − invented"}
TESTED = ("companions_invented", "companions_named", "cider")       # differences that are tested


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of the runs")
    return parser


def read_runs(folder, metrics, script="studies/hallucination/run.sh"):
    """{model: {mode: DataFrame (random seeds, metrics)}}: MODES first, then variants.

    Only random seeds whose control is finished; InputError that names `script` if there are none.
    """
    runs = {}
    for of_control in sorted(Path(folder).glob(f"*_*/{CONTROL}/metrics_test.json")):
        model, seed = of_control.parts[-3].rsplit("_", 1)
        for path in sorted(of_control.parents[1].glob("*/metrics_test.json")):
            mode = path.parent.name
            runs.setdefault(model, {}).setdefault(mode, {})[seed] = read_json(path, metrics)
    if not runs:
        raise InputError(f"{folder} contains no finished runs: run {script} first")

    def position(mode):
        return MODES.index(mode) if mode in MODES else len(MODES)
    tables = {}
    for model, modes in runs.items():
        ordered = sorted(modes, key=position)
        tables[model] = {mode: pd.DataFrame(modes[mode]).T.astype(float) for mode in ordered}
    return tables


def control(mode, modes):
    """The control of a mode: "ce", or of a variant such as erase_epochs4 the same variant of the
    control, ce_epochs4, if it was run with a common random seed."""
    parts = mode.split("_")
    for first in range(1, len(parts)):
        variant = "_".join([CONTROL, *parts[first:]])
        if variant in modes and len(modes[variant].index.intersection(modes[mode].index)):
            return variant
    return CONTROL


def compared(modes):
    """The modes that are compared with a control."""
    return [mode for mode in modes if mode not in ("base", control(mode, modes))]


def differences(mode, modes):
    """DataFrame (random seeds, metrics): a mode minus its control, of their common seeds."""
    return (modes[mode] - modes[control(mode, modes)]).dropna(how="all")


def mean_and_error(values, form):
    """Text "mean ± standard error", or the mean alone of one value."""
    error = f" ± {values.sem():{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{error}"


def p_value(values):
    """Text with the two-sided p-value of the t-test that the mean of paired differences is zero."""
    if len(values) < 2:
        return ""
    return f" (p = {stats.ttest_1samp(values, 0).pvalue if values.any() else 1:.4f})"


def markdown(head, rows):
    """A table in Markdown; head and rows are lists of texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_table(model, modes, metrics, form=".3f", scale=1):
    """Means and standard errors of one model's modes, then paired differences to the control.

    metrics: {name in metrics_test.json: title}; form, scale: how numbers are written."""
    def label(mode):
        seeds = modes[mode].index
        is_complete = seeds.equals(modes[CONTROL].index)
        return mode if is_complete else f"{mode} (seeds {', '.join(seeds)})"

    rows = []
    for mode, runs in modes.items():
        cells = [mean_and_error(scale * runs[metric], form) for metric in metrics]
        rows.append([label(mode), *cells])
    for mode in compared(modes):
        changes = scale * differences(mode, modes)
        cells = [mean_and_error(changes[metric], f"+{form}") for metric in metrics]
        for k, metric in enumerate(metrics):
            cells[k] += p_value(changes[metric]) if metric in TESTED else ""
        rows.append([f"{label(mode)} − {control(mode, modes)}", *cells])
    return markdown([f"{model}, {len(modes[CONTROL])} seeds", *metrics.values()], rows)


def draw_trade_off(path, runs):
    """Figure of hallucinated companions against CIDEr, one panel per model: mean differences to the
    control of each mode and variant. A line joins the values of μ."""
    from matplotlib.figure import Figure
    names = sorted({mode for modes in runs.values() for mode in compared(modes)})
    figure = Figure(figsize=(4.5 * len(runs) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (model, modes) in zip(panels, runs.items(), strict=True):
        points = {mode: differences(mode, modes)[["companions_invented", "cider"]].mean()
                  for mode in compared(modes)}
        weights = {float(match[1]): points[match[0]]
                   for match in map(WEIGHT.fullmatch, points) if match}
        if weights:
            axes.plot(*pd.DataFrame(weights).sort_index(axis=1).values, color="C1", linewidth=0.8)
        for mode, point in points.items():
            axes.plot(*point, "o", color="C1" if mode.startswith("erase") else "C0", markersize=4)
            axes.annotate(str(1 + names.index(mode)), point, xytext=(3, 3),
                          textcoords="offset points", fontsize=8)
        axes.plot(0, 0, "k+")
        axes.margins(0.1)
        axes.set(title=model, xlabel="companions hallucinated, difference",
                 ylabel="CIDEr, difference")
        axes.grid(alpha=0.3)
    for number, mode in enumerate(names, 1):
        axes.plot([], [], " ", label=f"{number}  {mode}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8,
                  handlelength=0, title="+  control", title_fontsize=8, alignment="left")
    save(figure, path)


def main(args):
    folder = Path(args.folder)
    runs = read_runs(folder, METRICS)
    text = "\n".join(format_table(model, modes, METRICS) for model, modes in runs.items())
    write_text(folder / "table.md", text)
    draw_trade_off(folder / "trade_off.png", runs)
    print(f"{text}\n{folder}/table.md {folder}/trade_off.png")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
