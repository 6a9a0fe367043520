"""Memory and open files of long runs (docs/reliability.md): python studies/memory.py

Generates images, trains a small model for 10,000 steps with 8 workers, captions and explains 5,000 images, and plots
memory and open files. Linux only. A run whose samples are in --save_path is not repeated.
"""
import csv
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning.cli import Parser, positive_int  # noqa: E402
from captioning.errors import InputError, run_script  # noqa: E402
from captioning.files import atomic_path  # noqa: E402

ROOT = Path(__file__).parents[1]
EPOCHS = 10


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=positive_int, default=5000, help="images to caption and to explain")
    add("--steps", type=positive_int, default=1000, help=f"training steps in each of {EPOCHS} epochs")
    add("--save_path", default="output/memory", help="folder for data, outputs and samples")
    add("--figure", default=str(ROOT / "docs/figures/memory.png"), help="the plot")
    return parser


def commands(args):
    """{script: (flags, pattern of the progress bar, which may contain the epoch, steps or images in all)}"""
    folder = args.save_path
    data = ["--dataset", "demo", "--data_folder", f"{folder}/data", "--device", "cpu"]
    decoding = ["--weight", f"{folder}/model/checkpoint_best.pth", "--decoding", "greedy", "--max_len", "4"]
    sizes = ["--encoder", "small", "--embed_dim", "8", "--hidden_dim", "8", "--attention_dim", "8", "--batch_size", "1"]
    return {"train.py": ([*data, *sizes, "--captions_per_step", "1", "--epochs", str(EPOCHS), "--patience", str(EPOCHS),
                          "--workers", "8", "--save_path", f"{folder}/model"], r"epoch (\d+): ", EPOCHS * args.steps),
            "evaluation.py": ([*data, *decoding, "--metrics", "cider", "--save_path", f"{folder}/evaluation"],
                              r"captioning()", args.images),
            "explain.py": ([*data, *decoding, "--methods", "lrp", "--quiet", "--save_path", f"{folder}/explanations"],
                           r"explaining()", args.images)}


def measure(script, flags, pattern, total, log):
    """Runs a script, with output to the file `log` -> one sample per second: (steps or images done, MB, open files)."""
    rows = []
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, ROOT / script, *flags], stdout=output, stderr=output,
                                   start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(1)
                share = share_done(log.read_text()[-1000:], pattern)
                if share is not None:
                    rows.append((round(share * total), *use(process.pid)))
        finally:
            process.terminate()
    if process.returncode:
        raise InputError(f"{script} ended with status {process.returncode}: see {log}")
    return [row for row in rows if row[2]]      # without that of a process that has just ended


def share_done(text, pattern):
    """The share of the run that the last progress bar in `text` states; None without one."""
    bars = re.findall(pattern + r"[^\r\n]*?(\d+)/(\d+) \[", text)
    if not bars:
        return None
    epoch, done, total = bars[-1]
    return (int(epoch) - 1 + int(done) / int(total)) / EPOCHS if epoch else int(done) / int(total)


def use(session):
    """MB of memory, counting what processes share once, and open files of all processes in a session."""
    kilobytes = files = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                kilobytes += int(re.search(r"^Pss: +(\d+)", (folder / "smaps_rollup").read_text(), re.M)[1])
                files += len(list((folder / "fd").iterdir()))
        except (OSError, TypeError):    # the process has ended
            continue
    return kilobytes / 1000, files


def draw(path, runs):
    """Figure of {script: samples}: memory (left axis) and open files (right axis)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (script, rows) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        counts, megabytes, files = zip(*rows, strict=True)
        right = axes.twinx()
        lines = [*axes.plot(counts, megabytes, color="C0", label="memory in MB"),
                 *right.plot(counts, files, color="C1", linewidth=0.8, label="open files")]
        axes.set(title=script, xlabel="step" if script == "train.py" else "image", ylim=(0, 1.3 * max(megabytes)))
        right.set_ylim(0, 2 * max(files))
        axes.legend(handles=lines, fontsize=8, loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main(args):
    folder, runs = Path(args.save_path), {}
    if not (folder / "data/demo/test_demo.hdf5").exists():
        sizes = [str(args.steps), "10", str(args.images)]
        subprocess.run([sys.executable, ROOT / "preparedataset.py", "--image_size", "48", "--demo_size", *sizes,
                        "--output_folder", folder / "data"], check=True)
    for script, (flags, pattern, total) in commands(args).items():
        path = folder / f"{script}.csv"
        if not path.exists():
            rows = measure(script, flags, pattern, total, folder / f"{script}.log")
            with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
                csv.writer(file).writerows(rows)
        rows = runs[script] = [tuple(map(float, row)) for row in csv.reader(path.open())]
        fifths = ([row for row in rows if low <= row[0] / total < low + 0.2] for low in (0.2, 0.8))
        early, late = (f"{median(row[1] for row in fifth):.0f} MB, {median(row[2] for row in fifth):.0f} open files"
                       for fifth in fifths)
        print(f"{script}: median of the second fifth of the {total:,}: {early}; of the last fifth: {late}", flush=True)
    files = list((folder / "explanations").glob("*/*"))
    print(f"{len(files)} files of explanations, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB; index.html "
          f"{(folder / 'explanations/index.html').stat().st_size / 1e6:.1f} MB")
    draw(args.figure, runs)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
