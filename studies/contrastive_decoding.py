"""Contrastive decoding of the demo data: python studies/contrastive_decoding.py output/demo/checkpoint_best.pth

Against hallucinated objects, without training: each word is predicted from (1 + α) log p(word | image) − α log p(word |
no image). Leng et al. (2024) use a noisy image in place of none.
"""
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning.cli import Parser, non_negative, positive_int  # noqa: E402
from captioning.decoding import decode  # noqa: E402
from captioning.errors import run_script  # noqa: E402
from studies.grounded_decoding import make_report  # noqa: E402


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("weight", help="checkpoint of a model of the demo data")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--alpha", type=non_negative, nargs="+", default=[0, 0.5, 1], help="strengths α; 0: ordinary decoding")
    add("--max_images", type=positive_int, help="use only the first test images (default: all)")
    return parser


class Contrasted:
    """A captioning model as captioning.decoding uses it, which computes every step with and without the image."""

    def __init__(self, model, alpha):
        self.model, self.alpha = model, alpha

    def start(self, features):
        # regions of zeros would count as padding; the smallest positive number does not, and changes no sum
        blank = torch.full_like(features, torch.finfo(features.dtype).tiny)
        return features, self.model.start(features), self.model.start(blank)

    def initial_state(self, B, N):
        return self.model.initial_state(B, N) * 2

    def step(self, words, state, context, predict=None):
        half = len(state) // 2
        logits, own, _ = self.model.step(words, state[:half], context[1], predict)
        blank_logits, blank, _ = self.model.step(words, state[half:], context[2], predict)
        log_p = (1 + self.alpha) * logits.log_softmax(-1) - self.alpha * blank_logits.log_softmax(-1)
        return log_p, (*own, *blank), None


def contrasted(model, *inputs, alpha, **options):
    """As captioning.decoding.decode."""
    return decode(Contrasted(model, alpha), *inputs, **options)


def main(args):
    _, report = make_report(args.weight, args.data_folder, args.max_images)
    for alpha in args.alpha:
        report(f"α = {alpha:g}", partial(contrasted, alpha=alpha))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
