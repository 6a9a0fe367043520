"""Time of explanations of captioners of transformers: python benchmarks/pretrained.py

Random weights, captions of 10 and 20 words of one piece each. The alternative is one forward pass
and by autograd one backward pass per word, the gradient of its logit with respect to the pixels."""
import sys
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measure
from captioning.pretrained.captioner import PretrainedCaptioner
from captioning.pretrained.words import Words
from studies.transformer import train


class Numbers:
    """A tokenizer whose pieces are numbers."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def small():
    """The model of studies/transformer: 112×112 pixels in 64 patches."""
    return train.build(measure.vocabulary(200)), train.SIDE


def blip_base():
    """BLIP of the size of its published base model: 384×384 pixels in 576 patches."""
    config = transformers.BlipConfig(vision_config={"image_size": 384}, text_config={
        "bos_token_id": 30522, "sep_token_id": 102, "encoder_hidden_size": 768})
    return transformers.BlipForConditionalGeneration(config), 384


def gradients(model, image, ids):
    """The gradient of each word's logit with respect to the pixels."""
    pixels = image.clone().requires_grad_()
    pieces, _ = model.pieces_of(ids[0])
    for target in model.logits(pixels, pieces).gather(1, pieces[:, None]):
        torch.autograd.grad(target, pixels, retain_graph=True)


def tables(args, size, device):
    transformers.logging.set_verbosity_error()
    models = {"ViT + GPT-2, small": small} | ({} if args.quick else {"BLIP-base": blip_base})
    rows = []
    for name, build in models.items():
        torch.manual_seed(0)
        network, side = build()
        words = Words(Numbers(), [2])
        model = PretrainedCaptioner(network.to(device), words, torch.tensor([1]))
        image = torch.randn(1, 3, side, side, device=device)
        for T in (10, 20):
            pieces = [3 + number for number in range(T - 1)]
            ids = torch.tensor([[words.start, *words.split(pieces), words.end]], device=device)
            for title, pixels in (("LRP", True), ("its split alone", False)):
                functions = {f"{title}, {name}, T = {T}":
                             partial(model.lrp, image, ids, pixels=pixels),
                             "autograd": partial(gradients, model, image, ids)}
                rows += measure.compare(functions, args.repeats, device)
    return [measure.Table("LRP of captioners of transformers", measure.COMPARISON, rows)]


if __name__ == "__main__":
    measure.run("pretrained", __doc__, tables)
