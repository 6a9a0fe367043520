"""What 8-bit features change: python studies/feature_types.py CHECKPOINT --dataset flickr8k

Captions, and LRP relevance of the regions for each word of these captions, with stored features of 16 bits and with the
same rounded to 8 bits as `preparedataset.py --feature_type uint8` does.
"""
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning import checkpoint
from captioning.cli import Parser, positive_int
from captioning.data.cnn_features import quantised
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


def main(args):
    model, vocabulary = checkpoint.load(args.weight)
    data = open_features(args.data_folder, args.dataset, args.split, model)
    model.encode, model.encoder = (lambda images: images), torch.nn.Sequential()       # images are features already
    captions, values = {"float16": [], "uint8": []}, []
    count = min(args.images, len(data))
    for batch in tqdm(torch.arange(count).split(args.batch_size), unit="batch"):
        features = data.read_features(batch.tolist())
        parts = quantised(features)
        rounded = parts["features"] * parts["scales"][:, None, None]
        tokens = {name: decode(model, x, vocabulary) for name, x in (("float16", features), ("uint8", rounded))}
        for name, ids in tokens.items():
            captions[name] += [" ".join(vocabulary.decode(row)) for row in ids.tolist()]
        values.append(correlations(model, features, rounded, trimmed(with_start(tokens["float16"], vocabulary))))
    for name, texts in captions.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores(
            texts, data.references[:count], ("cider", "bleu")).items()))
    same = sum(a == b for a, b in zip(*captions.values(), strict=True))
    values = torch.cat(values)
    print(f"{same} of {count} captions are the same; correlation of the relevance of {len(values)} words: mean "
          f"{values.mean():.5f}, 1 % quantile {values.quantile(0.01):.5f}, smallest {values.min():.5f}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
