"""Contrastive decoding as a remedy for hallucinated objects that needs no training (docs/experiments.md): each word is
predicted from (1 + α) log p(word | image) − α log p(word | no image), as in Leng et al. (2024), for models of the demo.

    python studies/contrastive_decoding.py output/hallucination/gridtd_1/base/checkpoint_last.pth \
        --data_folder data/hallucination
"""
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from captioning import checkpoint  # noqa: E402
from captioning.data.boxes import load_boxes  # noqa: E402
from captioning.data.dataset import CaptionDataset  # noqa: E402
from captioning.decoding import decode  # noqa: E402
from captioning.metrics.object_metrics import chair_scores  # noqa: E402
from captioning.metrics.object_words import load_objects  # noqa: E402
from pycocoevalcap.caption_metrics import SCORERS  # noqa: E402

COLUMNS = ("cider", "companions_invented", "companions_named", "chair_i")


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


def main(args):
    torch.set_num_threads(1)
    folder = Path(args.data_folder, "demo")
    boxes = load_boxes(folder / "boxes_demo.json")
    objects = load_objects(args.data_folder, "demo", boxes)
    print("| checkpoint | α | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    for weight in args.weights:
        model, vocabulary = checkpoint.load(weight, "cpu")
        data = CaptionDataset(args.data_folder, "demo", "test", image_size=checkpoint.image_size(model))
        names = data.names[:args.max_images]
        references, entries = data.references[:len(names)], [boxes.get(name) for name in names]
        for alpha in args.alpha:
            captions = []
            for i in tqdm(range(0, len(names), 50), desc=f"α = {alpha:g}", leave=False):
                images = data.__getitems__(list(range(i, min(i + 50, len(names)))))["images"]
                with torch.no_grad():
                    tokens = decode(Contrasted(model, alpha), model.encode(images), vocabulary, max_len=30)
                captions += [" ".join(vocabulary.decode(ids)) for ids in tokens.tolist()]
            scores = chair_scores(captions, references, entries, objects) | SCORERS["cider"](captions, references)[0]
            numbers = [weight, f"{alpha:g}", *(f"{scores[key]:.3f}" for key in COLUMNS)]
            print("| " + " | ".join(numbers) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", help="checkpoints of models of the demo data")
    parser.add_argument("--data_folder", default="data", help="folder of prepared data sets")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0, 0.5, 1], help="strengths α; 0: ordinary decoding")
    parser.add_argument("--max_images", type=int, help="use only the first test images (default: all)")
    main(parser.parse_args())
