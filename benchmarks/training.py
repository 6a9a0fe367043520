"""Speed of a training step compared with plain code and with a Transformer: python benchmarks/training.py

16 images with five captions of 6 to 20 tokens, stored features of 196 × 512, d = e = 512, V = 9586, random weights;
forward and backward pass, clipping and Adam. The Transformer is nn.TransformerDecoder of the same width, 8 heads and 2
layers. "Step by step" is the same model as tutorials write it: one step after the other, with every layer in every
step. Both alternatives repeat the features for each caption.
"""
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import (
    COMPARISON,
    Table,
    build,
    compare,
    get_parser,
    profile,
    random_captions,
    sizes,
    vocabulary,
    write,
)
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.explanation.rules import PLAIN, lstm_cell
from captioning.training.loop import make_optimizer, train_step
from captioning.training.losses import teacher_forced_loss, word_loss
from captioning.training.parts import WHOLE, Loss

B, N, SHORTEST, T = 16, 5, 6, 20


def gridtd_by_steps(model, features, captions):
    """Logits (B, T, V) of Ada-LSTM for captions (B, T+1), one step after the other, every layer in every step."""
    v = torch.relu(model.W_v(features))                                                # (B, K, d)
    g = torch.relu(model.W_g(features.mean(1)))
    h1, c1, h2, c2 = (v.new_zeros(len(v), v.shape[2]) for _ in range(4))
    logits = []
    for t in range(captions.shape[1] - 1):
        x1 = torch.cat([h2, g, model.embedding(captions[:, t])], 1)
        gate = torch.sigmoid(model.W_x(x1) + model.W_h(h1))
        h1, c1 = model.lstm1(x1, (h1, c1))
        s = gate * torch.tanh(c1)
        q = model.W_q(h1)
        z = model.w_a(torch.tanh(model.W_a(v) + q[:, None])).squeeze(2)                # (B, K)
        z_s = model.w_a(torch.tanh(model.W_s(s) + q))
        c = (z.softmax(1)[..., None] * v).sum(1)
        beta = torch.cat([z, z_s], 1).softmax(1)[:, -1:]
        c_hat = beta * s + (1 - beta) * c
        h2, c2 = model.lstm2(torch.cat([c_hat, h1], 1), (h2, c2))
        logits.append(model.W_o(model.dropout(c_hat + h2)))
    return torch.stack(logits, 1)


def aoa_by_steps(model, features, captions):
    """The same for MH-FC."""
    v = torch.relu(model.W_v(features))
    k, u = (layer(v).unflatten(2, (model.num_head, -1)).transpose(1, 2) for layer in (model.W_K, model.W_U))
    h = m = v.new_zeros(len(v), v.shape[2])
    lstm, logits = model.lstm, []
    for t in range(captions.shape[1] - 1):
        x = torch.cat([model.embedding(captions[:, t]), v.mean(1)], 1)
        gates = F.linear(x, lstm.weight_ih_l0, lstm.bias_ih_l0) + F.linear(h, lstm.weight_hh_l0, lstm.bias_hh_l0)
        h, m = lstm_cell(gates, m, PLAIN)
        q = model.W_Q(h).view(len(h), model.num_head, 1, -1)
        alpha = model.attention_dropout((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))   # (B, M, 1, K)
        c_hat = torch.sigmoid(model.W_G(h)) * model.W_L((alpha @ u).flatten(1))
        logits.append(model.W_o(model.dropout(c_hat + h)))
    return torch.stack(logits, 1)


class Transformer(nn.Module):
    """A captioning Transformer of two layers."""

    def __init__(self, size):
        super().__init__()
        self.encoder, self.embedding = nn.Sequential(), nn.Embedding(size.V, size.d)
        self.position, self.W_v = nn.Parameter(torch.zeros(T, size.d)), nn.Linear(size.C, size.d)
        layer = nn.TransformerDecoderLayer(size.d, 8, 4 * size.d, batch_first=True)
        self.decoder, self.W_o = nn.TransformerDecoder(layer, 2), nn.Linear(size.d, size.V)

    def encode(self, images):
        return images


def transformer_logits(model, features, captions):
    x = model.embedding(captions[:, :-1]) + model.position[:captions.shape[1] - 1]
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
    return model.W_o(model.decoder(x, torch.relu(model.W_v(features)), tgt_mask=mask, tgt_is_causal=True))


def repeated(logits):
    """The loss function of a model whose logits(model, features, captions) take one caption for each features."""
    def loss_function(model, features, captions, epoch, part):
        features = features.repeat_interleave(captions.shape[1], 0)
        captions = captions.flatten(0, 1)
        return word_loss(logits(model, features, captions).flatten(0, 1), captions[:, 1:].flatten())
    return loss_function


def step(model, loss, features, captions, device):
    """A function that runs one training step."""
    optimizer, scaler = make_optimizer(model, device, 1e-12), torch.amp.GradScaler(device.type, enabled=False)
    parts = [(WHOLE, {"images": features, "captions": captions})]
    return lambda: train_step(Loss(model, loss), parts, 0, optimizer, scaler, device, 0.1)


def main(args):
    device, size = pick_device(args.device), sizes(args)
    words = vocabulary(size.V)
    features, captions = torch.rand(B, size.K, size.C, device=device), random_captions((B, N), words, T, SHORTEST)
    captions = captions.to(device)
    rows, notes = [], []
    for name, logits in (("gridtd", gridtd_by_steps), ("aoa", aoa_by_steps)):
        model = build(name, size, device)
        model.eval()
        expected = logits(model, features.repeat_interleave(N, 0), captions.flatten(0, 1)).view(B, N, T, -1)
        mask = captions[..., 1:, None] != 0
        torch.testing.assert_close(model(features, captions) * mask, expected * mask, rtol=1e-3, atol=1e-3)
        model.train()
        alternatives = {name: (model, teacher_forced_loss(words)),
                        "step by step": (build(name, size, device).train(), repeated(logits)),
                        "Transformer": (Transformer(size).to(device), repeated(transformer_logits))}
        functions = {key: step(*pair, features, captions, device) for key, pair in alternatives.items()}
        rows += compare(functions, args.repeats, device)
        notes.append(f"{name}: {profile(functions[name], device)}")
    tokens = int((captions[..., 1:] != 0).sum())
    rows = [[first, tokens / a, other, tokens / b, *ratios] for first, a, other, b, *ratios in rows]
    columns = ["model", "tokens/s", "alternative", "tokens/s", *COMPARISON[4:]]
    note = f"Time by operation: {'; '.join(notes)}."
    write("training", args, device, [Table("Training step", columns, rows, note)])


def get_args_parser():
    return get_parser(__doc__)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
