"""Runs the benchmarks and writes their tables into docs/benchmarks.md: python benchmarks/all.py

About half an hour on one core. The text of docs/benchmarks.md outside the two comments that enclose the tables is kept.
"""
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import get_parser, read
from captioning.errors import InputError, run_script
from captioning.files import write_text

ROOT = Path(__file__).parents[1]
BENCHMARKS = {"training": "Training", "decoding": "Decoding", "explain": "Explanations", "finetune": "Fine-tuning",
              "growth": "Growth", "coco_size": "A data set of COCO's size"}
START, END = "<!-- written by benchmarks/all.py -->\n", "<!-- end of what benchmarks/all.py writes -->\n"


def get_args_parser():
    parser = get_parser(__doc__, repeats=None)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS),
                        help="benchmarks to run; the tables of the others are those of their last run")
    parser.add_argument("--document", default=str(ROOT / "docs" / "benchmarks.md"), help="file with the tables")
    return parser


def document(text, sections):
    """`text` with the sections between the two comments; InputError if it lacks them."""
    pattern = re.compile(re.escape(START) + ".*" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise InputError(f"--document lacks the lines {START.strip()} and {END.strip()}: add them around the tables")
    return pattern.sub(lambda _: START + "\n" + "\n".join(sections) + END, text)


def main(args):
    flags = ["--save_path", args.save_path, "--device", args.device] + ["--quick"] * args.quick
    flags += ["--repeats", str(args.repeats)] if args.repeats else []
    for name in args.only:
        extra = ["--figure", str(Path(args.document).parent / "figures" / "growth.png")] if name == "growth" else []
        if subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags, *extra]).returncode:
            raise InputError(f"benchmarks/{name}.py failed: see its message above")
    sections = []
    for name, title in BENCHMARKS.items():
        if Path(args.save_path, f"{name}.json").exists():
            tables, machine = read(args.save_path, name)
            sections += [f"## {title}\n\n`python benchmarks/{name}.py`; {machine}.\n",
                         *(table.markdown() for table in tables)]
    write_text(args.document, document(Path(args.document).read_text(encoding="utf-8"), sections))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
