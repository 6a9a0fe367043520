"""Tables and figures of configs/hallucination_experiment.sh: python studies/hallucination.py output/hallucination

Reads <folder>/<model>_<seed>/<mode>/metrics_test.json; writes to <folder> table.md with means, paired differences to
the control and their significance; differences.png; and trade_off.png, mean differences of companions and CIDEr.
"""
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning.cli import Parser
from captioning.errors import InputError, run_script
from captioning.files import atomic_path, read_json, write_text

MODES = ("base", "ce", "erase", "lrp", "cider", "lrp_cider")
CONTROL = "ce"
WEIGHT = re.compile(r"erase_mu(\d*\.?\d+)")      # a value of μ
METRICS = {"cider": "CIDEr", "bleu_4": "BLEU-4", "map": "precision", "map_recall": "recall", "map_f1": "F1",
           "chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "companions_invented": "companions invented",
           "companions_named": "companions named", "companions_named_minus_invented": "named − invented"}
TESTED = ("companions_invented", "companions_named", "cider")       # metrics whose differences are tested


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of the runs")
    return parser


def read_runs(folder):
    """{model: {mode: {seed: metrics}}} of the random seeds with a finished control: MODES first, then variants.

    InputError if there is no finished run.
    """
    runs = {}
    for path in sorted(Path(folder).glob(f"*_*/{CONTROL}/metrics_test.json")):
        model, seed = path.parts[-3].rsplit("_", 1)
        names = [other.parent.name for other in sorted(path.parents[1].glob(f"*/{path.name}"))]
        for mode in sorted(names, key=lambda name: MODES.index(name) if name in MODES else len(MODES)):
            metrics = read_json(path.parents[1] / mode / path.name, METRICS)
            runs.setdefault(model, {}).setdefault(mode, {})[seed] = metrics
    if not runs:
        raise InputError(f"{folder} contains no finished runs: run configs/hallucination_experiment.sh first")
    return runs


def mean_and_error(values):
    """Text "mean ± standard error" with three decimals."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def control(mode, modes):
    """The control of a mode: ce, or for a variant such as erase_epochs4 or erase_mask_epochs4 the same variant,
    ce_epochs4, if it was run."""
    parts = mode.split("_")
    variants = ["_".join([CONTROL, *parts[first:]]) for first in range(1, len(parts))]
    return next((variant for variant in variants
                 if modes.get(variant, {}).keys() & modes[mode].keys()), CONTROL)          # with a common seed


def differences(runs, model, mode, metric):
    """Differences of a metric between a mode and its control, one per random seed."""
    of_control = runs[model][control(mode, runs[model])]
    return [metrics[metric] - of_control[seed][metric] for seed, metrics in runs[model][mode].items()
            if seed in of_control]


def sign_test(values):
    """Two-sided p-value of the sign test: how probable so unequal numbers of signs are if both are equally likely."""
    signs = [value > 0 for value in values if value]
    fewer, n = min(sum(signs), len(signs) - sum(signs)), len(signs)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** n)


def paired_t_test(values):
    """Two-sided p-value of the t-test that the mean of n ≥ 2 values is zero.

    With ν = n − 1 degrees of freedom, θ = atan(|t|/√ν) and c = cos² θ, P(|T| < |t|) is sin θ (1 + c/2 + 1·3 c²/(2·4) +
    …) for even ν, and 2/π (θ + sin θ cos θ (1 + 2c/3 + 2·4 c²/(3·5) + …)) for odd ν (Abramowitz and Stegun, 26.7.3–4).
    """
    n, error = len(values), statistics.stdev(values) / len(values) ** 0.5
    if not error:
        return float(not any(values))
    theta, odd = math.atan(abs(statistics.fmean(values)) / error / (n - 1) ** 0.5), (n - 1) % 2
    factor, total = 1.0, 0.0
    for k in range((n - 1) // 2):
        total += factor
        factor *= (2 * k + 1 + odd) / (2 * k + 2 + odd) * math.cos(theta) ** 2
    total *= math.sin(theta)
    return 1 - (2 / math.pi * (theta + math.cos(theta) * total) if odd else total)


def significance_table(runs):
    """Markdown table of the paired differences to the control and their p-values, for models with two seeds or more."""
    lines = ["| model, mode | metric | difference | seeds | paired t-test, p | sign test, p |", "|---" * 6 + "|"]
    for model, modes in runs.items():
        for mode in compared(modes):
            for metric in TESTED:
                values = differences(runs, model, mode, metric)
                if len(values) > 1:
                    lines.append(f"| {model}, {mode} | {METRICS[metric]} | {mean_and_error(values)} | {len(values)} | "
                                 f"{paired_t_test(values):.4f} | {sign_test(values):.4f} |")
    return "\n".join(lines) + "\n"


def label(mode, modes):
    """Name of a mode, with its random seeds if these are not those of the control."""
    return mode if modes[mode].keys() == modes[CONTROL].keys() else f"{mode} (seeds {', '.join(modes[mode])})"


def compared(modes):
    """The modes that are compared with a control."""
    return [mode for mode in modes if mode not in ("base", control(mode, modes))]


def format_table(runs):
    """Markdown tables, one per model: means and standard errors, then paired differences to the control."""
    lines = []
    for model, modes in runs.items():
        lines += ["", f"| {model}, {len(modes[CONTROL])} seeds | " + " | ".join(METRICS.values()) + " |",
                  "|---" * (len(METRICS) + 1) + "|"]
        for mode, seeds in modes.items():
            cells = [mean_and_error([metrics[metric] for metrics in seeds.values()]) for metric in METRICS]
            lines.append(f"| {label(mode, modes)} | " + " | ".join(cells) + " |")
        for mode in compared(modes):
            cells = [mean_and_error(differences(runs, model, mode, metric)) for metric in METRICS]
            lines.append(f"| {label(mode, modes)} − {control(mode, modes)} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:]) + "\n"


def draw(path, runs):
    """Figure of the differences to the control: one dot per random seed, and mean and standard error of each mode."""
    from matplotlib.figure import Figure
    drawn = [mode for mode in MODES if any(mode in compared(modes) for modes in runs.values())]
    shown = {"companions_invented": "companions hallucinated", "chair_i": "CHAIR_i", "cider": "CIDEr"}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for m, model in enumerate(runs):
            for k, mode in enumerate(drawn):
                if mode not in runs[model]:
                    continue
                values = differences(runs, model, mode, metric)
                x, colour = k + 0.26 * (m - (len(runs) - 1) / 2), f"C{m}"
                axes.plot([x] * len(values), values, "o", color=colour, alpha=0.35, markersize=4)
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
                axes.errorbar([x + 0.08], [statistics.fmean(values)], yerr=[error], color=colour, fmt="_", capsize=3,
                              markersize=12, label=model if k == 0 else None)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xticks=range(len(drawn)), xticklabels=drawn, xlim=(-0.5, len(drawn) - 0.5))
        axes.set_title(f"{name}, difference to control", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_trade_off(path, runs):
    """Figure of hallucinated companions against CIDEr: mean differences to the control of each mode and variant, over
    the random seeds that it was run with; one panel per model. A line joins the values of μ."""
    from matplotlib.figure import Figure
    names = sorted({mode for modes in runs.values() for mode in compared(modes)})
    numbers = {mode: number for number, mode in enumerate(names, 1)}
    figure = Figure(figsize=(4.5 * len(runs) + 2, 4), layout="constrained")
    for axes, (model, modes) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        points = {mode: [statistics.fmean(differences(runs, model, mode, metric))
                         for metric in ("companions_invented", "cider")] for mode in compared(modes)}
        curve = sorted(filter(WEIGHT.fullmatch, points), key=lambda mode: float(WEIGHT.fullmatch(mode)[1]))
        if curve:
            axes.plot(*zip(*map(points.get, curve), strict=True), color="C1", linewidth=0.8)
        for mode, (x, y) in points.items():
            axes.plot(x, y, "o", color="C1" if mode.startswith("erase") else "C0", markersize=4)
            axes.annotate(str(numbers[mode]), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8)
        axes.plot(0, 0, "k+")
        axes.margins(0.1)
        axes.set(title=model, xlabel="companions hallucinated, difference", ylabel="CIDEr, difference")
        axes.grid(alpha=0.3)
    for mode, number in numbers.items():
        axes.plot([], [], " ", label=f"{number}  {mode}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, handlelength=0,
                  title="+  control", title_fontsize=8, alignment="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main(args):
    runs, folder = read_runs(args.folder), Path(args.folder)
    text = f"{format_table(runs)}\n{significance_table(runs)}"
    write_text(folder / "table.md", text)
    draw(folder / "differences.png", runs)
    draw_trade_off(folder / "trade_off.png", runs)
    print(f"{text}\n{folder}/table.md {folder}/differences.png {folder}/trade_off.png")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
