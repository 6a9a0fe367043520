"""Trains a small ViT with GPT-2 of `transformers` on the demo's scenes, from random weights:
python studies/transformer/train.py --seed 1 --save_path output/transformer_1"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from captioning import cli
from captioning.data.dataset import CaptionDataset
from captioning.data.images import read_image
from captioning.errors import run_script
from captioning.files import make_folder

SIDE = 112          # of images, in pixels
PATCH = 14
BATCH = 32
LEARNING_RATE = 1e-3


def build(vocabulary):
    """ViT (4 layers) and GPT-2 (3 layers), 128 channels each, for the words of the data set."""
    encoder = ViTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                        intermediate_size=256, image_size=SIDE, patch_size=PATCH)
    decoder = GPT2Config(vocab_size=len(vocabulary), n_embd=128, n_layer=3, n_head=4, n_inner=256,
                         n_positions=64, bos_token_id=vocabulary.start, eos_token_id=vocabulary.end,
                         pad_token_id=0, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = vocabulary.start
    config.eos_token_id = vocabulary.end
    config.pad_token_id = 0
    return VisionEncoderDecoderModel(config)


def tokenizer(vocabulary):
    """The data set's words, with its ids."""
    words = Tokenizer(models.WordLevel(vocabulary.wordmap, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<start>", eos_token="<end>",
                                   pad_token="<pad>", unk_token="<unk>")


def main(args):
    cli.set_seed(args.seed)
    data = CaptionDataset(args.data_folder, "demo", "train")
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    scenes = [processor(read_image(Path(data.image_folder, path)), return_tensors="np",
                        input_data_format="channels_first")["pixel_values"][0].astype(np.float16)
              for path in data.paths]
    scenes = torch.from_numpy(np.stack(scenes))
    captions = data.captions.long()                                                    # (N, n, L)
    model = build(data.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    steps = args.epochs * math.ceil(len(scenes) / BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)

    model.train()
    for epoch in range(args.epochs):
        total = 0
        for indices in torch.randperm(len(scenes)).split(BATCH):
            choice = torch.randint(captions.shape[1], (len(indices),))
            words = captions[indices, choice]
            words = words[:, :int((words != 0).sum(1).max())]
            images = scenes[indices].float()
            logits = model(pixel_values=images, decoder_input_ids=words[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(indices)
        print(f"epoch {epoch + 1} of {args.epochs}: loss {total / len(scenes):.3f}", flush=True)

    folder = make_folder(args.save_path)
    model.save_pretrained(folder)
    tokenizer(data.vocabulary).save_pretrained(folder)
    processor.save_pretrained(folder)


def get_args_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data_folder", default="data", help="folder of the prepared demo")
    parser.add_argument("--epochs", type=cli.positive_int, default=30, help="epochs")
    parser.add_argument("--save_path", required=True, help="output folder")
    cli.add_seed(parser)
    return parser


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
