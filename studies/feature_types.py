"""What features of lower precision change: python studies/feature_types.py CHECKPOINT --dataset flickr8k

Captions, and LRP relevance of the regions for each word of these captions, with stored features of 16 bits; with these
rounded to 8 bits, as by `preparedataset.py --feature_type uint8`; and with features that the encoder computes in
bfloat16, as by --amp: here in float32, with weights, inputs and results of each layer rounded to bfloat16.
"""
import copy
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning import checkpoint
from captioning.cli import Parser, positive_int
from captioning.data.cnn_features import quantised
from captioning.data.dataset import CaptionDataset
from captioning.data.feature_store import open_features
from captioning.decoding import decode, trimmed, with_start
from captioning.errors import run_script
from pycocoevalcap.caption_metrics import scores


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("weight", help="checkpoint of a model whose dataset has stored features of a CNN")
    add("--dataset", default="demo", help="name of the data set")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--split", default="val", help="split of the data set")
    add("--images", type=positive_int, default=200, help="number of images")
    add("--batch_size", type=positive_int, default=25, help="images per batch")
    return parser


def correlations(model, features, rounded, captions):
    """(n,) correlation over the regions of the words' relevance with the features and with the rounded ones."""
    maps = [model.lrp(x, captions, pixels=False).features.sum(-1) for x in (features, rounded)]    # (B, T, K)
    maps = [x[captions[:, 1:] != 0] for x in maps]                                     # (n, K)
    maps = [x - x.mean(1, keepdim=True) for x in maps]
    return torch.cosine_similarity(*maps)


@torch.no_grad()
def in_bfloat16(encoder, images):
    """Features (B, K, C) of images (B, 3, S, S) by a Sequential whose weights, inputs and results are in bfloat16."""
    def rounded(x):
        return x.bfloat16().float()
    encoder = rounded(copy.deepcopy(encoder))
    for layer in encoder:
        layer.register_forward_hook(lambda layer, inputs, result: rounded(result))
    return encoder(rounded(images)).flatten(2).mT


def main(args):
    model, vocabulary = checkpoint.load(args.weight)
    data = open_features(args.data_folder, args.dataset, args.split, model)
    pixels = CaptionDataset(args.data_folder, args.dataset, args.split, image_size=checkpoint.image_size(model))
    encoder = model.encoder
    model.encode, model.encoder = (lambda images: images), torch.nn.Sequential()       # images are features already
    captions, values, errors = {}, {}, {}
    count = min(args.images, len(data))
    for batch in tqdm(torch.arange(count).split(args.batch_size), unit="batch"):
        features = data.read_features(batch.tolist())
        parts = quantised(features)
        types = {"float16": features, "uint8": parts["features"] * parts["scales"][:, None, None],
                 "bfloat16": in_bfloat16(encoder, pixels.__getitems__(batch.tolist())["images"])}
        tokens = {name: decode(model, x, vocabulary) for name, x in types.items()}
        words = trimmed(with_start(tokens["float16"], vocabulary))
        for name, x in types.items():
            captions.setdefault(name, []).extend(" ".join(vocabulary.decode(row)) for row in tokens[name].tolist())
            values.setdefault(name, []).append(correlations(model, features, x, words))
            errors.setdefault(name, []).append((x - features).flatten(1).norm(dim=1) / features.flatten(1).norm(dim=1))
    for name, texts in captions.items():
        same = sum(a == b for a, b in zip(captions["float16"], texts, strict=True))
        correlation = torch.cat(values[name])
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores(
            texts, data.references[:count], ("cider", "bleu")).items()))
        print(f"    relative error of the features {torch.cat(errors[name]).mean():.4f}; {same} of {count} captions as "
              f"with float16; correlation of the relevance of {len(correlation)} words: mean {correlation.mean():.5f}, "
              f"1 % quantile {correlation.quantile(0.01):.5f}, smallest {correlation.min():.5f}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
