"""A training step against tutorials' code and a Transformer: python benchmarks/training.py

16 images with five captions of 6 to 20 tokens, stored features of 196 × 512, d = e = 512, V = 9586;
forward and backward pass, clipping and Adam. "Step by step" is the model as tutorials write it,
with every layer in every step; it and the Transformer (nn.TransformerDecoder of the same width, 8
heads, 2 layers) repeat the features for each caption."""
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measure
from captioning.training.loop import make_optimizer

B, N, SHORTEST, T = 16, 5, 6, 20


def gridtd_by_steps(model, features, captions):
    """Logits (B, T, V) of Ada-LSTM for captions (B, T+1), every layer in every step."""
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
    k, u = (layer(v).unflatten(2, (model.num_head, -1)).transpose(1, 2)
            for layer in (model.W_K, model.W_U))
    state = None
    logits = []
    for t in range(captions.shape[1] - 1):
        x = torch.cat([model.embedding(captions[:, t]), v.mean(1)], 1)
        h, state = model.lstm(x[:, None], state)
        q = model.W_Q(h).view(len(h), model.num_head, 1, -1)
        alpha = model.attention_dropout((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        h = h[:, 0]
        c_hat = torch.sigmoid(model.W_G(h)) * model.W_L((alpha @ u).flatten(1))
        logits.append(model.W_o(model.dropout(c_hat + h)))
    return torch.stack(logits, 1)


class Transformer(nn.Module):
    """A captioning Transformer of two layers."""

    def __init__(self, size):
        super().__init__()
        self.encoder = nn.Sequential()
        self.embedding = nn.Embedding(size.V, size.d)
        self.position = nn.Parameter(torch.zeros(T, size.d))
        self.W_v = nn.Linear(size.C, size.d)
        layer = nn.TransformerDecoderLayer(size.d, 8, 4 * size.d, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.W_o = nn.Linear(size.d, size.V)


def transformer_logits(model, features, captions):
    x = model.embedding(captions[:, :-1]) + model.position[:captions.shape[1] - 1]
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
    hidden = model.decoder(x, torch.relu(model.W_v(features)), tgt_mask=mask, tgt_is_causal=True)
    return model.W_o(hidden)


def repeated(logits):
    """A function of captions (B, N, T+1), of one for captions (B, T+1)."""
    def of_all(model, features, captions):
        return logits(model, features.repeat_interleave(N, 0), captions.flatten(0, 1))
    return of_all


def step(model, logits, features, captions, device):
    """A function that runs one training step."""
    optimizer = make_optimizer(model, device, 1e-12)
    targets = captions[..., 1:].flatten()
    rows = targets.nonzero().squeeze(1)

    def run():
        optimizer.zero_grad(set_to_none=True)
        scores = logits(model, features, captions).flatten(0, -2)
        F.cross_entropy(scores[rows], targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return run


def tables(args, size, device):
    words = measure.vocabulary(size.V)
    features = torch.rand(B, size.K, size.C, device=device)
    captions = measure.random_captions((B, N), words, T, SHORTEST).to(device)
    rows = []

    def at_once(model, *inputs):
        return model.output(model.teacher_force(*inputs).hidden)

    for name, logits in (("gridtd", gridtd_by_steps), ("aoa", aoa_by_steps)):
        alternatives = {
            name: (measure.build(name, size, device), at_once),
            "step by step": (measure.build(name, size, device), repeated(logits)),
            "Transformer": (Transformer(size).to(device), repeated(transformer_logits))}
        functions = {key: step(*pair, features, captions, device)
                     for key, pair in alternatives.items()}
        rows += measure.compare(functions, args.repeats, device)
    return [measure.Table("Training step", measure.COMPARISON, rows)]


if __name__ == "__main__":
    measure.run("training", __doc__, tables)
