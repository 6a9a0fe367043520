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
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.pretrained.captioner import PretrainedCaptioner
from captioning.pretrained.words import Words

TEXT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Numbers:
    """A tokenizer whose pieces are numbers."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def small():
    """ViT (4 layers) with GPT-2 (3 layers), 128 channels, 112×112 pixels in 64 patches."""
    encoder = transformers.ViTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                                     intermediate_size=256, image_size=112, patch_size=14)
    decoder = transformers.GPT2Config(vocab_size=200, n_embd=128, n_layer=3, n_head=4, n_inner=256,
                                      is_decoder=True, add_cross_attention=True, **TEXT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = 1
    config.pad_token_id = 0
    return transformers.VisionEncoderDecoderModel(config), 112


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


def get_args_parser():
    return measure.get_parser(__doc__)


def main(args):
    device = pick_device(args.device)
    transformers.logging.set_verbosity_error()
    is_quick = measure.sizes(args) == measure.QUICK
    rows = []
    for name, build in {"ViT + GPT-2, small": small, "BLIP-base": blip_base}.items():
        if is_quick and build is blip_base:
            continue
        torch.manual_seed(0)
        network, side = build()
        words = Words(Numbers(), [2])
        model = PretrainedCaptioner(network.to(device), words, torch.tensor([1]))
        image = torch.randn(1, 3, side, side, device=device)
        for T in (10, 20):
            pieces = [3 + number for number in range(T - 1)]
            ids = torch.tensor([[words.start, *words.split(pieces), words.end]], device=device)
            functions = {f"LRP, {name}, T = {T}": partial(model.lrp, image, ids),
                         "autograd": partial(gradients, model, image, ids)}
            rows += measure.compare(functions, args.repeats, device)
            functions = {f"its split alone, {name}, T = {T}":
                         partial(model.lrp, image, ids, pixels=False),
                         "autograd": partial(gradients, model, image, ids)}
            rows += measure.compare(functions, args.repeats, device)
    table = measure.Table("LRP of captioners of transformers", measure.COMPARISON, rows)
    measure.write("pretrained", args, device, [table])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
