"""Speed of decoding in batches, against single images: python benchmarks/decoding.py

64 images, captions of 12 tokens, stored features of 196 × 512, d = e = 512, V = 9586, random
weights that never predict <end>. The matrix products alone are those that decoding computes, with
the same operands. Of the single images, 8 are decoded."""
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measure
from captioning.decoding import decode

B, SINGLE, T = 64, 8, 12
METHODS = {"greedy": {"method": "greedy"}, "beam search, width 3": {"beam_size": 3},
           "diverse beam search, 3 groups of 3": {"method": "diverse_beam_search", "beam_size": 9,
                                                  "groups": 3}}


def one_by_one(function, images):
    for image in images.split(1):
        function(image)


@torch.no_grad()
def tables(args, size, device):
    words = measure.vocabulary(size.V)
    features = torch.rand(B, size.K, size.C, device=device)
    rows = []
    for name in measure.MODELS:
        model = measure.build(name, size, device).eval()
        model.W_o.bias[words.end] = -torch.inf
        for title, options in METHODS.items():
            captions = partial(decode, model, vocabulary=words, max_len=T, **options)
            with measure.Products() as products:
                captions(features)
            functions = {f"{name}, {title}": partial(captions, features),
                         "one image at a time": partial(one_by_one, captions, features[:SINGLE]),
                         "matrix products alone": products.replay}
            for first, a, other, b, *_ in measure.compare(functions, args.repeats, device):
                per_image = b / (SINGLE if "one image" in other else B)
                rows.append([first, B / a, other, 1 / per_image, a / B / per_image])
    columns = ["model", "images/s", "alternative", "images/s", "ratio of times"]
    return [measure.Table("Decoding", columns, rows)]


if __name__ == "__main__":
    measure.run("decoding", __doc__, tables, repeats=2)
