"""What the benchmarks share: their script, sizes, timing in turn, and tables."""
import platform
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from aoamodel import AOAModel
from captioning import cli
from captioning.data.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.files import write_text
from gridTDmodel import GridTDModel

MODELS = {"gridtd": GridTDModel, "aoa": AOAModel}


class Sizes(NamedTuple):
    V: int = 9586           # words of the vocabulary
    d: int = 512            # embedding and hidden size
    K: int = 196            # regions
    C: int = 512            # channels
    image: int = 224        # side of the images in pixels


QUICK = Sizes(V=200, d=32, K=16, C=16, image=112)


class Table(NamedTuple):
    """A result: rows of strings and numbers below `columns`."""
    title: str
    columns: list
    rows: list

    def markdown(self):
        """The table in Markdown, numbers with three significant digits."""
        lines = [self.columns, ["---"] * len(self.columns)]
        lines += [[_readable(value) for value in row] for row in self.rows]
        lines = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *lines, ""])


def _readable(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else value


# -- the script of a benchmark -----------------------------------------------------------------


def get_parser(description, repeats=3, flags=None):
    """The flags that all benchmarks share, and `flags`: {flag: how argparse reads it}."""
    parser = cli.Parser(description.split("\n")[0])
    add = parser.add_argument
    add("--repeats", type=cli.positive_int, default=repeats, help="timed runs of each alternative")
    add("--quick", action="store_true", help="tiny sizes, to try it: its numbers mean nothing")
    add("--document", help="Markdown file in which the tables are replaced: docs/benchmarks.md")
    cli.add_device(parser)
    for flag, options in (flags or {}).items():
        add(flag, **options)
    return parser


def run(name, description, tables, repeats=3, flags=None):
    """The script of a benchmark, whose tables a function of its flags, Sizes and device returns."""
    main = partial(print_tables, name, tables)
    run_script(main, get_parser(description, repeats, flags).parse_args())


def print_tables(name, tables, args):
    """Prints the tables; with --document, puts them between its comments, see `replaced`."""
    device = pick_device(args.device)
    results = tables(args, QUICK if args.quick else Sizes(), device)
    text = "\n".join([f"`python benchmarks/{name}.py`; {machine(device)}.\n",
                      *(table.markdown() for table in results)])
    print(text)
    if args.document:
        old = Path(args.document).read_text(encoding="utf-8")
        write_text(args.document, replaced(old, f"{device.type} {name}", text))


def machine(device):
    """What the results depend on, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        path = Path("/proc/cpuinfo")
        name = re.search("model name.*: (.*)", path.read_text() if path.exists() else "")
        processor = name[1] if name else platform.processor()
        hardware = f"{processor}, {torch.get_num_threads()} threads"
    return f"{hardware}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def replaced(document, place, text):
    """`document` with `text` between the comments <!-- place --> and <!-- end -->."""
    pattern = re.compile(rf"(<!-- {place} -->\n).*?(<!-- end -->\n)", re.DOTALL)
    if not pattern.search(document):
        raise InputError(f"--document lacks the lines <!-- {place} --> and <!-- end -->: add them")
    return pattern.sub(lambda match: f"{match[1]}{text}{match[2]}", document)


# -- what is measured --------------------------------------------------------------------------


COMPARISON = ["compared", "seconds", "with", "seconds", "ratio of times", "smallest to largest"]


def compare(functions, repeats, device):
    """Rows of COMPARISON: the first of the functions with each of the others. They run in turn
    after a warm-up run; the ratio is the median of those of the paired runs."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - started
            if repeat:
                seconds[name].append(elapsed)
    first, *others = seconds
    rows = []
    for name in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        rows.append([first, statistics.median(seconds[first]), name,
                     statistics.median(seconds[name]), statistics.median(ratios),
                     f"{min(ratios):.2f} to {max(ratios):.2f}"])
    return rows


class Products(TorchDispatchMode):
    """Context manager that records all matrix products; `replay` repeats them alone."""
    NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::") in self.NAMES:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **kwargs or {})

    def replay(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def build(name, size, device, encoder=None):
    """A model with random weights; without an encoder it reads features (B, K, C)."""
    torch.manual_seed(0)
    model = MODELS[name](size.V, embed_dim=size.d, hidden_dim=size.d, encoder=encoder,
                         feature_dim=size.C)
    if encoder is None:     # features of a CNN: without padding, unlike those of regions
        model.encoder = torch.nn.Sequential()
        model.encode = lambda images: images
    return model.to(device)


def vocabulary(V):
    """A Vocabulary of V words."""
    words = [PAD, *(f"w{i}" for i in range(1, V - 3)), UNK, START, END]
    return Vocabulary({word: i for i, word in enumerate(words)})


def random_captions(shape, words, T, shortest=None):
    """Ids (*shape, T + 1) from <start> to <end>, zero-padded; frequencies follow Zipf's law.

    Lengths are uniformly distributed from `shortest` (default: T) to T tokens."""
    generator = torch.Generator().manual_seed(1)
    count = torch.Size(shape).numel()
    weights = 1 / torch.arange(1, words.unk, dtype=torch.float)
    ids = 1 + weights.multinomial(count * T, replacement=True, generator=generator).view(count, T)
    lengths = torch.randint(shortest or T, T + 1, (count, 1), generator=generator)
    position = torch.arange(1, T + 1)
    ids = ids.masked_fill(position == lengths, words.end)
    ids = ids.masked_fill(position > lengths, words.pad)
    return torch.cat([torch.full((count, 1), words.start), ids], 1).view(*shape, T + 1)
