"""Speed of decoding in batches compared with single images and with its matrix products: python benchmarks/decoding.py

64 images, captions of 12 tokens, stored features of 196 × 512, d = e = 512, V = 9586, random weights that never predict
<end>. The matrix products alone are those that decoding computes, with the same operands. Of the single images, 8 are
decoded.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import (
    COMPARISON,
    MODELS,
    Products,
    Table,
    build,
    compare,
    get_parser,
    profile,
    sizes,
    vocabulary,
    write,
)
from captioning.decoding import decode
from captioning.device import pick_device
from captioning.errors import run_script

B, SINGLE, T = 64, 8, 12
METHODS = {"greedy": {"method": "greedy"}, "beam search, width 3": {"beam_size": 3},
           "diverse beam search, 3 groups of 3": {"method": "diverse_beam_search", "beam_size": 9, "groups": 3}}


def get_args_parser():
    return get_parser(__doc__, repeats=2)


@torch.no_grad()
def main(args):
    device, size = pick_device(args.device), sizes(args)
    words, features = vocabulary(size.V), torch.rand(B, size.K, size.C, device=device)
    rows, notes = [], []
    for name in MODELS:
        model = build(name, size, device).eval()
        model.W_o.bias[words.end] = -torch.inf
        for title, options in METHODS.items():
            def whole(model=model, options=options):
                return decode(model, features, words, max_len=T, **options)

            def single(model=model, options=options):
                for image in features[:SINGLE].split(1):
                    decode(model, image, words, max_len=T, **options)
            with Products() as products:
                whole()
            functions = {f"{name}, {title}": whole, "one image at a time": single,
                         "matrix products alone": products.replay}
            for first, a, other, b, ratio, spread in compare(functions, args.repeats, device):
                if other.startswith("one"):
                    low, high = (float(value) * SINGLE / B for value in spread.split(" to "))
                    b, ratio, spread = b * B / SINGLE, ratio * SINGLE / B, f"{low:.2f} to {high:.2f}"
                rows.append([first, B / a, other, B / b, ratio, spread])
        notes.append(f"{name}, {title}: {profile(whole, device)}")
    columns = ["model", "images/s", "alternative", "images/s", *COMPARISON[4:]]
    write("decoding", args, device, [Table("Decoding", columns, rows, f"Time by operation: {'; '.join(notes)}.")])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
