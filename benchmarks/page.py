"""Sizes and times of explanations and their page: python benchmarks/page.py output/explanations --images 5000

Measures the size of explanations and of their page, and the memory and time to write the page. The explanations that
explain.py wrote to the folder are repeated until there are as many as wanted. If Chromium is installed, it shows the
images one after the other, and the memory of its processes is measured.
"""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning.cli import Parser, positive_int
from captioning.errors import InputError, run_script
from captioning.report.explanations import stored_folders, write_index
from studies.memory import use

MB = 2 ** 20
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WALK = """<script>
addEventListener("load", async () => {
  for (let i = 0; i <= COUNT; i++) {
    document.title = i
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }))
    do await new Promise(resolve => setTimeout(resolve, 20)); while (!current().methods)
  }
})
</script>"""


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folder", help="the --save_path of explain.py")
    parser.add_argument("--images", type=positive_int, default=100, help="number of images in the page")
    parser.add_argument("--shown", type=positive_int, nargs="+", default=[10, 200, 1000], help="the browser shows the "
                        "images one after the other; its largest memory is printed for each of these stages")
    return parser


def peak_memory():
    """The largest memory of this process so far in MB (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def browser_memory(page, counts):
    """Shows images of `page` in Chromium, one after the other -> the largest number of MB that its processes hold
    until it has shown counts[0] images, then until counts[1], and so on; measured each second, on Linux."""
    walk = page.with_name("walk.html")
    script = WALK.replace("COUNT", str(counts[-1]))
    walk.write_text(page.read_text(encoding="utf-8").replace("<header>", script + "<header>", 1), encoding="utf-8")
    largest = [0] * len(counts)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
             "--remote-debugging-port=0", walk.as_uri()], start_new_session=True, stderr=subprocess.DEVNULL)
        port, shown = Path(profile, "DevToolsActivePort"), 0
        while browser.poll() is None and shown < counts[-1]:
            time.sleep(1)
            stage = next(i for i, count in enumerate(counts) if shown < count)
            shown = images_shown(port) if port.exists() else 0
            largest[stage] = max(largest[stage], use(browser.pid)[0])
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
    return largest


def images_shown(port):
    """The number in the title of Chromium's page, 0 without one; port: the file in which Chromium states its port."""
    with urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
        titles = [page["title"] for page in json.load(answer)]      # Chromium has pages of its own
    return max((int(title) for title in titles if title.isdecimal()), default=0)


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
        counts = sorted(args.shown)
        browser = browser_memory(Path(copies, "index.html"), counts) if CHROMIUM else []
    sizes = {name: sum(path.stat().st_size for folder in folders for path in folder.glob(pattern)) / len(folders) / MB
             for name, pattern in (("all files", "*"), ("explanation.npz", "*.npz"), ("PNGs", "*.png"),
                                   ("entry.html", "entry.html"))}
    print(f"index.html of {args.images} images: {page:.2f} MB, written in {seconds:.1f} s; peak memory "
          f"{peak_memory():.0f} MB, {before:.0f} MB before")
    for first, last, memory in zip([0, *counts], counts, browser, strict=False):
        print(f"Chromium, showing images {first + 1} to {last} of {args.images}: at most {memory:.0f} MB")
    print("MB per image: " + ", ".join(f"{name} {size:.3f}" for name, size in sizes.items()))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
