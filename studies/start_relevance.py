"""Where the relevance of <start> comes from in Ada-LSTM: python studies/start_relevance.py models/flickr8k.pth

Relevance is stopped on one recurrent path at a time, and regions are removed and restored in the resulting order of
relevance (docs/experiments.md).
"""
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning import checkpoint, decoding  # noqa: E402
from captioning.cli import Parser, positive_int  # noqa: E402
from captioning.data.feature_store import open_features  # noqa: E402
from captioning.errors import InputError, run_script  # noqa: E402
from captioning.experiments.batch import word_log_p  # noqa: E402
from captioning.explanation.methods import SPLIT  # noqa: E402
from captioning.explanation.rules import PLAIN  # noqa: E402
from captioning.metrics.object_words import stop_words  # noqa: E402
from gridTDmodel import GridTDModel  # noqa: E402

# name: (paths that carry no relevance, whether only from step 0 to step 1)
VARIANTS = {"LRP": ((), False), "without c1 → c1": (("c1",), False), "without h1 → LSTM1": (("h1",), False),
            "without h2 → LSTM1": (("h2",), False), "without c2 → c2": (("c2",), False),
            "without h2 → LSTM2": (("h2_2",), False), "without h1 → LSTM2": (("h1_2",), False),
            "without ĉ → LSTM2": (("c_hat",), False),
            "relative to the state after <start>": (("c1", "h1", "h2", "c2", "h2_2"), True)}
SCORED = ("LRP", "relative to the state after <start>")
FRACTIONS = (0.1, 0.3, 0.5)


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("weight", help="checkpoint of a gridtd model")
    add("--dataset", default="flickr8k", help="name of the data set")
    add("--data_folder", default="data", help="folder of prepared data sets, with stored features")
    add("--split", default="test", choices=["train", "val", "test"], help="split of the data set")
    add("--max_images", type=positive_int, default=24, help="use only the first images")
    return parser


class Stopped(GridTDModel):
    """Ada-LSTM that stops relevance on the paths `stopped`; at_start: only from step 0 to step 1."""
    stopped, at_start, position = (), False, 0

    def teacher_force(self, *args, **options):
        self.position = 0
        return super().teacher_force(*args, **options)

    def recur(self, gates1, gates2, state, context, linear1, linear2, average, rule=PLAIN):
        stopped = self.stopped if not self.at_start or self.position == 1 else ()
        self.position += 1

        def stop(linear, names):
            return lambda x: linear(torch.cat([part.detach() if name in stopped else part
                                               for name, part in zip(names, x.chunk(len(names), -1), strict=True)], -1))
        h1, c1, h2, c2 = state
        c1, c2 = (part.detach() if name in stopped else part for name, part in (("c1", c1), ("c2", c2)))
        return super().recur(gates1, gates2, (h1, c1, h2, c2), context, stop(linear1, ("h2", "h1")),
                             stop(linear2, ("c_hat", "h1_2", "h2_2")), average, rule)


def areas(model, features, captions, rows, steps, relevance):
    """Means over the fractions of regions of the words' log-probabilities: deletion and insertion, (n,) each.

    Regions are removed, that is set to zero, or restored in the order of relevance (n, K)."""
    rank, results = relevance.argsort(1, descending=True).argsort(1), []
    for deletion in (True, False):
        curve = [word_log_p(model, features[rows] * ((rank < round(f * rank.shape[1])) != deletion)[..., None],
                            captions[rows], steps) for f in FRACTIONS]
        results.append(torch.stack(curve).mean(0))
    return results


def main(args):
    torch.set_num_threads(1)
    model, vocabulary = checkpoint.load(args.weight, "cpu")
    if checkpoint.model_type(model) != "gridtd":
        raise InputError(f"{args.weight} is a model without Ada-LSTM: give a checkpoint of --model_type gridtd")
    model.__class__ = Stopped
    data = open_features(args.data_folder, args.dataset, args.split, model)
    count = min(args.max_images, len(data))
    without = stop_words() | {"<end>", "<unk>"}
    is_content = torch.tensor([word not in without for word in vocabulary.words])
    values = {name: [] for name in VARIANTS}
    for start in tqdm(range(0, count, 4), unit="batch"):
        with torch.no_grad():
            features = torch.as_tensor(data.read_features(list(range(start, min(start + 4, count)))))
            captions = decoding.with_start(decoding.decode(model, features, vocabulary, "greedy"), vocabulary)
        rows, steps = (is_content[captions[:, 1:]] & (captions[:, 1:] != 0)).nonzero(as_tuple=True)
        rows, steps = rows[steps > 0], steps[steps > 0]
        for name, (stopped, at_start) in VARIANTS.items():
            model.stopped, model.at_start = stopped, at_start
            explanation = model.lrp(features, captions, pixels=False)
            parts = [getattr(explanation, part)[rows, steps] for part in (*SPLIT, "targets")]
            relevance = explanation.features.sum(-1)[rows, steps]
            if name in SCORED:
                with torch.no_grad():
                    parts += areas(model, features, captions, rows, steps, relevance)
            values[name].append(torch.stack(parts, 1))
    print("| | share of <start> | " + " | ".join((*SPLIT, "logit", "deletion", "insertion")) + " |\n|---|" + "---|" * 8)
    for name, columns in values.items():
        columns = torch.cat(columns)
        share = (columns[:, 1].abs() / columns[:, :4].abs().sum(1)).median().item()
        medians, means = columns[:, :5].median(0).values.tolist(), columns[:, 5:].mean(0).tolist() or [math.nan] * 2
        print(f"| {name} | {share:.0%} | " + " | ".join(f"{x:+.1f}" for x in medians) + " | " +
              " | ".join(f"{x:.2f}" for x in means) + " |")
    print(f"{len(columns)} words")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
