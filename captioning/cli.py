"""What the scripts' command lines share: number types with ranges, common flags, printing of
settings."""
import argparse
import math
import random

import numpy as np
import torch

from captioning.decoding import DECODING_METHODS
from captioning.errors import one_line
from captioning.files import shortened

RENAMED = {     # flags of earlier versions, which checkpoints may record
    "captions_per_step": "captions_per_epoch", "keep_weight": "erase_keep_weight",
    "evidence": "erase_evidence", "own_evidence": "erase_own_evidence"}


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one sentence with exit status 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        for flag in message.replace("=", " ").split():
            name = flag.removeprefix("--").removeprefix("no-")
            if flag.startswith("--") and name in RENAMED:
                message = f"{flag} is no flag any more: give {flag.replace(name, RENAMED[name])}"
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows choices once, beside their flag, and each default once: not where there is none, or
    where the help text names it."""

    def add_usage(self, usage, actions, groups, prefix=None):
        names = [" ".join([*action.option_strings[:1], action.metavar or action.dest.upper()])
                 for action in actions if action.required]
        super().add_usage(" ".join(["%(prog)s", *names, "[flags]"]), actions, groups, prefix)

    def _format_args(self, action, default_metavar):
        if action.choices and action.nargs == "+":
            return self._metavar_formatter(action, default_metavar)(1)[0] + " …"
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action):
        has_default = action.default not in (None, []) and action.default is not False
        if has_default and "default" not in action.help:
            return super()._get_help_string(action)
        return action.help


def number(kind, low, high=math.inf, low_included=True):
    """An argparse type: a finite `kind` (int or float) from low to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        is_above = low <= value if low_included else low < value
        if not (is_above and value <= high and abs(value) != math.inf):
            name = "whole number" if kind is int else "number"
            above = "at least" if low_included else "above"
            limit = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{shortened(text, 40)!r} must be a {name} {above} "
                                             f"{low}{limit}")
        return value
    return convert


MOST = 10 ** 9      # of anything that is counted
SMALL_MODEL = 12_000_000    # parameters; models/photographs.pth has somewhat fewer
THREADS = torch.get_num_threads()       # PyTorch's choice
positive_int = number(int, 1, MOST)
natural = number(int, 0, MOST)
positive = number(float, 0, low_included=False)
non_negative = number(float, 0)
fraction = number(float, 0, 1)


def add_device(group):
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="device to compute on")


def add_threads(group):
    group.add_argument("--threads", type=number(int, 1, 1024), help="threads of the CPU (default: "
        "1 for small models and for measures of explanations, else of PyTorch's choice)")


def set_threads(threads, model):
    """Sets PyTorch's threads to --threads. Without it, a small model gets one: its layers take less
    time than starting threads does, above all beside other programs."""
    size = sum(parameter.numel() for parameter in model.parameters())
    torch.set_num_threads(threads or (1 if size < SMALL_MODEL else THREADS))


def add_seed(group):
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1, help="random seed")


def add_workers(group):
    group.add_argument("--workers", type=number(int, 0, 256), default=2,
        help="processes that read images")


def add_decoding(parser):
    """Adds the flags that `decoding_options` reads."""
    add = parser.add_argument_group("decoding").add_argument
    add("--decoding", choices=DECODING_METHODS, default="beam_search", help="decoding method")
    add("--beam_size", type=number(int, 1, 1000), default=3, help="beam width")
    add("--diversity", type=non_negative, default=0.5, help="diverse_beam_search: penalty for a "
        "word that an earlier group chose at that step")
    add("--length_penalty", type=number(float, 0, 10), default=0.0, help="beam search: compare "
        "hypotheses by log-probability / length**length_penalty")
    add("--block_trigrams", action="store_true", help="never generate the same three consecutive "
        "words twice")
    add("--temperature", type=positive, default=1.0, help="sample: divides the logits; below 1 "
        "more probable words are preferred")
    add("--top_k", type=natural, default=0, help="sample: only from the k most probable words (0: "
        "all)")
    add("--top_p", type=number(float, 0, 1, low_included=False), default=1.0,
        help="sample: only from the fewest words whose probabilities sum to p")
    add("--max_len", type=number(int, 1, 1000), default=50, help="maximum number of words per "
        "caption")
    add("--grounded", action="store_true", help="caption again without object words that come from "
        "language rather than the image; requires evaluation.py --calibrate before")


def decoding_options(args):
    """The options of captioning.decoding.decode that the flags give to the decoding method."""
    names = {"greedy": (), "beam_search": ("beam_size", "length_penalty"),
             "diverse_beam_search": ("beam_size", "length_penalty", "diversity"),
             "sample": ("temperature", "top_k", "top_p")}[args.decoding]
    names = "max_len", "block_trigrams", *names
    return {"method": args.decoding} | {name: getattr(args, name) for name in names}


def set_seed(seed):
    """Seeds the random number generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def print_settings(args, parser, device):
    """Prints the flags that differ from their defaults, and what was chosen without them.

    All flags are in the settings.json of the output folder."""
    chosen = vars(args) | {"device": device}
    shown = []
    for name, value in chosen.items():
        is_default = value is None or value == parser.get_default(name)
        if not is_default or value and name in ("weight", "dataset", "save_path"):
            values = value if isinstance(value, list) else [value]
            shown.append(" ".join([f"--{name}", *map(str, values)]))
    print(f"settings: {' '.join(shown)}", flush=True)
