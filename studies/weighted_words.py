"""Effect of LRP-inference weights on present and hallucinated objects: python studies/weighted_words.py output/demo

For the object words in a model's own test captions (predictions_test.json): the mean probability p of the word, its
probability p̃ with the weights ω of this word (docs/method.md, section 7), and the parts of its logit that come from the
context ĉ and the hidden state h.
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
from captioning.errors import run_script
from captioning.explanation.lrp_inference import weighted_hidden
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
def measure(model, images, ids):
    """(B, T, 4): the probabilities under p and p̃, and the logit's parts from ĉ and h of the words ids[:, 1:]."""
    trace, words = model.teacher_force(model.encode(images), ids[:, None]), ids[:, None, 1:]
    no_stop_words = torch.zeros(len(model.W_o.weight), dtype=torch.bool)
    weighted = weighted_hidden(model, trace.c_hat, trace.h, words, no_stop_words)
    p = [model.W_o(hidden).softmax(-1).gather(-1, words[..., None]).squeeze(-1) for hidden in (trace.hidden, weighted)]
    parts = [(model.W_o.weight[words] * part).sum(-1) for part in (trace.c_hat, trace.h)]
    return torch.stack(p + parts, -1)[:, 0]


def main(args):
    model, vocabulary = checkpoint.load(Path(args.run) / "checkpoint_last.pth")
    data = CaptionDataset(args.data_folder, args.dataset, "test", image_size=checkpoint.image_size(model))
    boxes = load_boxes(Path(args.data_folder, args.dataset, f"boxes_{args.dataset}.json"))
    captions = list(read_predictions(Path(args.run) / "predictions_test.json", data.names, {}).values())
    words = object_words(captions, data.names, boxes, load_objects(args.data_folder, args.dataset, boxes))
    encoded = [torch.tensor(vocabulary.encode(caption.split(), len(caption))) for caption in captions]
    encoded = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    values = torch.cat([measure(model, data.__getitems__(indices.tolist())["images"], encoded[indices])
                        for indices in torch.arange(len(data)).split(args.batch_size)])
    print(f"{'word':28}{'count':>6}{'p':>8}{'p̃':>8}{'from ĉ':>8}{'from h':>8}")
    for kind in sorted({kind for *_, kind in words}):
        rows = torch.stack([values[i, t] for i, t, word_kind in words if word_kind == kind])
        print(f"{kind:28}{len(rows):6}" + "".join(f"{value:8.2f}" for value in rows.mean(0).tolist()))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
