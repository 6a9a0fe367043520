"""Memory and open files of long runs: python studies/memory/memory.py

Generates images, trains a small model for 10,000 steps with 8 workers, and captions and explains
5,000 images. Linux only. A run whose samples are in --save_path is not repeated."""
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))
from captioning.cli import Parser, positive_int
from captioning.errors import InputError, run_script

ROOT = Path(__file__).parents[2]
EPOCHS = 10


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=positive_int, default=5000, help="images to caption and to explain")
    add("--steps", type=positive_int, default=1000, help="training steps in each epoch")
    add("--save_path", default="output/memory", help="folder for data, outputs and samples")
    return parser


def commands(folder):
    """The measured commands."""
    data = f"--dataset demo --data_folder {folder}/data --device cpu"
    decoding = f"--weight {folder}/model/checkpoint_best.pth --decoding greedy --max_len 4"
    sizes = "--embed_dim 8 --hidden_dim 8 --attention_dim 8 --batch_size 1 --captions_per_epoch 1"
    return [f"train.py {data} --encoder small {sizes} --epochs {EPOCHS} --patience {EPOCHS} "
            f"--workers 8 --save_path {folder}/model",
            f"evaluation.py {data} {decoding} --metrics cider --save_path {folder}/evaluation",
            f"explain.py {data} {decoding} --methods lrp --quiet --save_path {folder}/explanations"]


def use(session):
    """MB of memory, counting shared memory once, and open files of all processes in a session."""
    kilobytes = files = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                smaps = (process / "smaps_rollup").read_text()
                kilobytes += int(re.search(r"^Pss: +(\d+)", smaps, re.M)[1])
                files += len(list((process / "fd").iterdir()))
        except (OSError, TypeError):    # the process has ended
            continue
    return kilobytes / 1000, files


def measure(command, log):
    """Runs a command, with output to `log` -> DataFrame with one row per second."""
    rows = []
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=output,
                                   stderr=output, start_new_session=True)
        try:
            while process.poll() is None:
                rows.append(use(process.pid))
                time.sleep(1)
        finally:
            process.terminate()
    if process.returncode:
        raise InputError(f"{command} ended with status {process.returncode}: see {log}")
    return pd.DataFrame(rows, columns=["MB", "open files"])


def main(args):
    folder = Path(args.save_path).resolve()
    if not (folder / "data/demo/test_demo.hdf5").exists():
        sizes = [str(args.steps), "10", str(args.images)]
        subprocess.run([sys.executable, "preparedataset.py", "--image_size", "48", "--demo_size",
                        *sizes, "--output_folder", folder / "data"], cwd=ROOT, check=True)
    for command in commands(folder):
        name = command.split()[0]
        path = folder / f"{name}.csv"
        if not path.exists():
            measure(command, folder / f"{name}.log").to_csv(path, index=False)
        table = pd.read_csv(path)
        n = len(table)
        for part, rows in (("second", table[n // 5:2 * n // 5]), ("last", table[4 * n // 5:])):
            print(f"{name}: median of the {part} fifth of the time {rows['MB'].median():.0f} MB, "
                  f"{rows['open files'].median():.0f} open files", flush=True)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
