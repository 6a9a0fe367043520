"""Effect of LRP-inference weights on present and hallucinated objects: python studies/weighted_words.py output/demo

For the object words in a model's own test captions (predictions_test.json): the mean probability p of the word; its
probability p̃ with the weights ω of this word (docs/method.md, section 7); two controls, softmax(z/T) of the logits z
with the temperature T that gives all object words the same mean probability as p̃, and p̃ with the entries of each ω
in random order; and the parts of the logit that come from the context ĉ and the hidden state h.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from captioning import checkpoint
from captioning.cli import Parser, positive_int
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.predictions import read_predictions
from captioning.errors import InputError, run_script
from captioning.explanation.lrp_inference import weights
from captioning.metrics.object_words import load_objects


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="folder with checkpoint_last.pth and the files that evaluation.py wrote for the test split")
    add("--dataset", default="demo", help="name of the data set")
    add("--data_folder", default="data", help="folder of prepared data sets")
    add("--batch_size", type=positive_int, default=50, help="images per batch")
    return parser


def object_words(captions, names, boxes, objects):
    """[(index of the image, step, kind)] of the object words in the captions."""
    return [(i, t, ("companion" if category in objects.biased else "other object")
             + (", present" if category in boxes[name]["categories"] else ", hallucinated"))
            for i, (caption, name) in enumerate(zip(captions, names, strict=True))
            for t, category in objects.named(caption.split())]


@torch.no_grad()
def measure(model, images, ids, generator):
    """Of the words ids[:, 1:]: (B, T, 5) the probabilities under p, p̃ and permuted weights and the logit's parts from
    ĉ and h; and their logits z (B, T, V)."""
    trace, words = model.teacher_force(model.encode(images), ids[:, None]), ids[:, None, 1:]
    no_stop_words = torch.zeros(len(model.W_o.weight), dtype=torch.bool)
    omegas = weights(model, trace.c_hat, trace.h, words, no_stop_words)
    order = torch.rand(omegas[0].shape, generator=generator).argsort(-1)
    hidden = [trace.hidden] + [c * trace.c_hat + h * trace.h
                               for c, h in (omegas, (omega.gather(-1, order) for omega in omegas))]
    p = [model.W_o(x).softmax(-1).gather(-1, words[..., None]).squeeze(-1) for x in hidden]
    parts = [(model.W_o.weight[words] * part).sum(-1) for part in (trace.c_hat, trace.h)]
    return torch.stack(p + parts, -1)[:, 0], model.W_o(trace.hidden)[:, 0]


def at_temperature(logits, ids, mean):
    """(n,) the probabilities softmax(z/T) of words ids (n,) with the T at which their mean is `mean`; logits z (n, V).

    1/T is found by bisection: where most words are the most probable ones, the mean grows with it."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        p = (logits * middle).softmax(-1).gather(-1, ids[:, None])[:, 0]
        low, high = (middle, high) if p.mean() < mean else (low, middle)
    return p


def main(args):
    model, vocabulary = checkpoint.load(Path(args.run) / "checkpoint_last.pth")
    data = CaptionDataset(args.data_folder, args.dataset, "test", image_size=checkpoint.image_size(model))
    boxes = load_boxes(Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    captions = list(read_predictions(Path(args.run) / "predictions_test.json", data.names, {}).values())
    words = object_words(captions, data.names, boxes, load_objects(args.data_folder, args.dataset, boxes))
    if not words:
        raise InputError(f"no caption in {args.run}/predictions_test.json names an object of the data set: train the "
                         "model for longer")
    encoded = [torch.tensor(vocabulary.encode(caption.split(), len(caption))) for caption in captions]
    encoded = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    image, step = torch.tensor([word[:2] for word in words]).T
    generator, values, logits = torch.Generator().manual_seed(1), [], []
    for indices in torch.arange(len(data)).split(args.batch_size):
        of_all, z = measure(model, data.__getitems__(indices.tolist())["images"], encoded[indices], generator)
        in_batch = (image >= indices[0]) & (image <= indices[-1])
        values.append(of_all[image[in_batch] - indices[0], step[in_batch]])
        logits.append(z[image[in_batch] - indices[0], step[in_batch]])
    values, logits = torch.cat(values), torch.cat(logits)                              # (n, 5), (n, V)
    sharpened = at_temperature(logits, encoded[image, step + 1], values[:, 1].mean())
    values = torch.cat([values[:, :2], sharpened[:, None], values[:, 2:]], 1)
    columns = ("p", "p̃", "p at T", "permuted", "from ĉ", "from h")
    print(f"{'word':28}{'count':>6}" + "".join(f"{name:>10}" for name in columns))
    for kind in sorted({kind for *_, kind in words}):
        rows = values[torch.tensor([word_kind == kind for *_, word_kind in words])]
        print(f"{kind:28}{len(rows):6}" + "".join(f"{value:10.2f}" for value in rows.mean(0).tolist()))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
