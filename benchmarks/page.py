"""Size of explanations and of their page, and memory and time to write the page:

    python benchmarks/page.py output/explanations --images 5000

The explanations that explain.py wrote to the folder are repeated until there are as many as wanted.
"""
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning.cli import Parser, positive_int
from captioning.errors import InputError, run_script
from captioning.report.explanations import stored_folders, write_index

MB = 2 ** 20


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("folder", help="the --save_path of explain.py")
    parser.add_argument("--images", type=positive_int, default=100, help="number of images in the page")
    return parser


def peak_memory():
    """The largest memory of this process so far in MB (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(args):
    folders = stored_folders(args.folder)
    if not folders:
        raise InputError(f"{args.folder} contains no explanations: run explain.py --save_path {args.folder} first")
    before = peak_memory()
    with tempfile.TemporaryDirectory() as copies:
        for i in range(args.images):
            Path(copies, f"{i:06}").symlink_to(folders[i % len(folders)].resolve(), target_is_directory=True)
        started = time.perf_counter()
        write_index(copies, [])
        seconds = time.perf_counter() - started
        page = Path(copies, "index.html").stat().st_size / MB
    sizes = {name: sum(path.stat().st_size for folder in folders for path in folder.glob(pattern)) / len(folders) / MB
             for name, pattern in (("all files", "*"), ("explanation.npz", "*.npz"), ("PNGs", "*.png"),
                                   ("page.js", "page.js"))}
    print(f"index.html of {args.images} images: {page:.2f} MB, written in {seconds:.1f} s; peak memory "
          f"{peak_memory():.0f} MB, {before:.0f} MB before")
    print("MB per image: " + ", ".join(f"{name} {size:.3f}" for name, size in sizes.items()))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
