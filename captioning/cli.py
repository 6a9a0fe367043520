"""What every script's command line shares: number types with ranges, --device and --seed, settings printed first."""
import argparse
import math
import random

import numpy as np
import torch


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one sentence with exit status 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def number(kind, low, high=math.inf, low_included=True):
    """An argparse type: `kind` (int or float) within [low, high], or (low, high] if not low_included."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((low <= value if low_included else low < value) and value <= high):
            above = "at least" if low_included else "above"
            limit = "" if high == math.inf else f" and at most {high}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} must be a {name} {above} {low}{limit}")
        return value
    return convert


positive_int = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, low_included=False)
non_negative = number(float, 0)
fraction = number(float, 0, 1)


def add_device(parser):
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")


def add_seed(parser):
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1, help="of every random choice")


def set_seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def print_settings(args):
    print("settings: " + " ".join(f"--{name} {value}" for name, value in vars(args).items()), flush=True)
