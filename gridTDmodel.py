"""GridTDModel: Ada-LSTM, adaptive attention with an LSTM predictor (docs/method.md, section 2), and its explanations."""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from captioning import published
from captioning.captioner import Captioner
from captioning.explanation import attribution
from captioning.explanation.attribution import Trace, explain
from captioning.explanation.rules import LRP, Gradient, Guided
from captioning.layers import gates_and_candidate, lstm_cell, region_mean


class Inputs(NamedTuple):
    """Weights side by side, so that each LSTM has two products per step: that of the gates, and that of g."""
    W_word: torch.Tensor | None  # of E[w]
    W_state: torch.Tensor        # LSTM1: of [h2; h1]; LSTM2: of [ĉ; h1; h2]
    constant: torch.Tensor       # what does not depend on words and states: biases, LSTM1: and the share of the image


class Context(NamedTuple):
    """What does not depend on the words: computed once for all captions of an image."""
    v: torch.Tensor              # (B, K, d) projected regions
    v_proj: torch.Tensor         # (B, K, A) W_a v + b_a
    mask: torch.Tensor | None    # (B, K) False at padded regions; None: no padding
    lstm1: tuple                 # Inputs of i, f, o and the sentinel's gate (4d rows), and of g (d rows)
    lstm2: tuple                 # Inputs of i, f, o (3d rows), and of g (d rows)


class GridTDModel(Captioner):
    """Captions images with two LSTMs and adaptive attention over K regions.

    vocab_size V, embed_dim e, hidden_dim d, attention_dim A. encoder: a name in encoders.IMAGE_SIZE, an nn.Sequential
    of Conv2d / ReLU / MaxPool2d / AvgPool2d, or None for region features (B, K, feature_dim).
    query_per_region: adds the attention's query as the published checkpoints do (docs/method.md, section 2); A = K.
    """

    def __init__(self, vocab_size, embed_dim=512, hidden_dim=512, attention_dim=196, encoder="vgg16",
                 query_per_region=False, feature_dim=2048, dropout=0.5):
        super().__init__({"vocab_size": vocab_size, "embed_dim": embed_dim, "hidden_dim": hidden_dim,
                          "attention_dim": attention_dim, "encoder": encoder, "query_per_region": query_per_region,
                          "feature_dim": feature_dim, "dropout": dropout})
        e, d, A, C = embed_dim, hidden_dim, attention_dim, self.feature_dim
        self.query_per_region = query_per_region
        self.embedding = nn.Embedding(vocab_size, e, padding_idx=0)   # E
        self.W_v = nn.Linear(C, d)
        self.W_g = nn.Linear(C, e)
        self.lstm1 = nn.LSTMCell(d + 2 * e, d)       # of [h2; g; E[w]]
        self.W_x = nn.Linear(d + 2 * e, d)
        self.W_h = nn.Linear(d, d)
        self.W_a = nn.Linear(d, A)
        self.W_q = nn.Linear(d, A, bias=False)
        self.W_s = nn.Linear(d, A)
        self.w_a = nn.Linear(A, 1, bias=False)
        nn.init.normal_(self.w_a.weight, std=2 / A ** 0.5)     # PyTorch's default keeps attention uniform for epochs
        self.lstm2 = nn.LSTMCell(2 * d, d)           # of [ĉ; h1]
        self.W_o = nn.Linear(d, vocab_size)
        self.dropout = nn.Dropout(dropout)

    # -- the equations of section 2 --------------------------------------------------------------------------------------

    def start(self, features):
        """features (B, K, C) -> Context. Without an encoder, regions that are all zero are padding."""
        mask = self.region_mask(features)
        v = torch.relu(self.W_v(features))                                             # (B, K, d)
        g = torch.relu(self.W_g(region_mean(features, mask)))                          # (B, e)

        lstm1 = []
        for of_x1, of_h1, bias in zip(
                gates_and_candidate(self.lstm1.weight_ih, self.W_x.weight),
                gates_and_candidate(self.lstm1.weight_hh, self.W_h.weight),
                gates_and_candidate(self.lstm1.bias_ih + self.lstm1.bias_hh, self.W_x.bias + self.W_h.bias), strict=True):
            of_h2, of_g, of_word = of_x1.split((of_h1.shape[1], g.shape[1], g.shape[1]), 1)
            lstm1.append(Inputs(of_word, torch.cat([of_h2, of_h1], 1), F.linear(g, of_g, bias)))
        lstm2 = []
        for of_x2, of_h2, bias in zip(
                gates_and_candidate(self.lstm2.weight_ih), gates_and_candidate(self.lstm2.weight_hh),
                gates_and_candidate(self.lstm2.bias_ih + self.lstm2.bias_hh), strict=True):
            lstm2.append(Inputs(None, torch.cat([of_x2, of_h2], 1), bias))
        return Context(v, self.W_a(v), mask, tuple(lstm1), tuple(lstm2))

    def initial_state(self, B, N=1):
        """h1, c1, h2, c2, zeros (B, N, d), for N hypotheses per image."""
        return (self.W_h.weight.new_zeros(B, N, self.W_h.out_features),) * 4

    def read(self, words, context):
        """words (B, …) ids -> the shares of words and image in LSTM1's gates and the sentinel's gate (B, …, 4d), and in
        LSTM1's candidate (B, …, d)."""
        E = self.embedding(words)
        return tuple(F.linear(E, part.W_word) + part.constant.view(-1, *[1] * (words.dim() - 1), part.constant.shape[-1])
                     for part in context.lstm1)

    def recur(self, inputs, state, context):
        """One step of (B, N) hypotheses; inputs: of `read` -> ĉ (B, N, d), state, α (B, N, K), β (B, N, 1)."""
        h1, c1, h2, c2 = state
        x = torch.cat([h2, h1], -1)
        gates, g = (share + F.linear(x, part.W_state) for share, part in zip(inputs, context.lstm1, strict=True))
        i, f, o, sentinel = gates.sigmoid().chunk(4, -1)
        h1, c1 = lstm_cell(i, f, o, g, c1)

        s = sentinel * c1.tanh()
        alpha, beta = self.attend(h1, s, context)
        c = alpha @ context.v                                                          # (B, N, d)
        c_hat = beta * s + (1 - beta) * c

        x = torch.cat([c_hat, h1, h2], -1)
        gates, g = (F.linear(x, part.W_state, part.constant) for part in context.lstm2)
        i, f, o = gates.sigmoid().chunk(3, -1)
        h2, c2 = lstm_cell(i, f, o, g, c2)
        return c_hat, (h1, c1, h2, c2), alpha, beta

    def attend(self, h1, s, context):
        """h1, s (B, N, d) -> α (B, N, K), the regions' weights, and β (B, N, 1), the sentinel's."""
        q = self.W_q(h1)                                                               # (B, N, A)
        q_regions = q[..., None] if self.query_per_region else q[:, :, None]           # (B, N, K, 1) or (B, N, 1, A)
        z = self.w_a((context.v_proj[:, None] + q_regions).tanh()).squeeze(-1)         # (B, N, K)
        if context.mask is not None:
            z = z.masked_fill(~context.mask[:, None], -torch.inf)
        z_s = self.w_a((self.W_s(s) + q).tanh())                                       # (B, N, 1)
        return z.softmax(-1), torch.cat([z, z_s], -1).softmax(-1)[..., -1:]

    def step(self, words, state, context, predict=None):
        """One decoding step: words (B, N) ids -> logits (B, N, V), state, attention (B, N, K); predict(ĉ, h2) makes
        the logits in place of the output layer alone."""
        c_hat, state, alpha, _ = self.recur(self.read(words, context), state, context)
        return predict(c_hat, state[2]) if predict else self.output(c_hat + state[2]), state, alpha

    def teacher_force(self, features, captions, context=None):
        """All steps of captions (B, N, T+1), each reading captions[..., t] -> attribution.Trace."""
        context = context or self.start(features)
        inputs = self.read(captions[..., :-1], context)                                # (B, N, T, 4d), (B, N, T, d)
        state = self.initial_state(*captions.shape[:2])
        steps = []
        for t in range(captions.shape[2] - 1):
            c_hat, state, alpha, beta = self.recur([share[:, :, t] for share in inputs], state, context)
            steps.append((c_hat, state[2], alpha, beta))
        c_hat, h2, alpha, beta = (torch.stack(parts, 2) for parts in zip(*steps, strict=True))
        return Trace(c_hat, h2, c_hat + h2, alpha, beta)

    def region_logits(self, features):
        """features (B, K, C) -> logits (B, K, V): the output layer applied to each v_k alone."""
        return self.W_o(torch.relu(self.W_v(features)))

    # -- explanations of every word captions[:, t + 1] at every step t ---------------------------------------------------
    # Each returns an attribution.Explanation; options: those of attribution.explain.

    def lrp(self, images, captions, eps=0.01, rule=None, **options):
        """Layer-wise relevance propagation (docs/method.md, sections 4 and 5); rule: another one than LRP(eps)."""
        return explain(self, images, captions, rule or LRP(eps), **options).times_inputs()

    def lrp_specific(self, images, captions, steps=None, **options):
        """LRP of each word minus the mean of LRP of the caption's other words (section 4); options: of `lrp`."""
        result = self.lrp(images, captions, steps=steps, weights=attribution.minus_other_words, **options)
        return attribution.without_later_words(result, steps)

    def gradient(self, images, captions, **options):
        """The gradient of each word's logit (section 6)."""
        return explain(self, images, captions, Gradient(), **options).summed()

    def grad_cam(self, images, captions, pixels=True, **options):
        """Grad-CAM at the encoder's output (Selvaraju et al. 2017); pixels (B, T, 1, H, W)."""
        result = explain(self, images, captions, Gradient(), pixels=False, **options)
        return result.class_activation_map() if pixels else result.summed()

    def guided_backprop(self, images, captions, **options):
        """Guided backpropagation (Springenberg et al. 2015)."""
        return explain(self, images, captions, Guided(), **options).summed()

    def guided_grad_cam(self, images, captions, **options):
        """Guided backpropagation ⊙ upsampled Grad-CAM."""
        return self.guided_backprop(images, captions, **options) * self.grad_cam(images, captions, **options)

    def attention(self, images, captions, **options):
        """The attention weights alone, the baseline of all other methods; words, features and pixels are None."""
        return attribution.attention(self, images, captions, **options)

    def load_published(self, state_dict):
        """Loads a state_dict with the names of the published checkpoints (docs/method.md, section 10); InputError if it
        belongs to another model."""
        published.load(self, state_dict, PUBLISHED_NAMES)
        self.query_per_region = self.config["query_per_region"] = True


PUBLISHED_NAMES = {
    "img_encoder.encoder.": "encoder.", "img_projector.": "W_v.", "global_img_feature_proj.": "W_g.",
    "AdaLSTM.lstm_cell.": "lstm1.", "AdaLSTM.x_gate.": "W_x.", "AdaLSTM.h_gate.": "W_h.",
    "AdaAttention.W_v_proj.": "W_a.", "AdaAttention.W_s_proj.": "W_s.", "AdaAttention.W_g_proj.": "W_q.",
    "AdaAttention.w_h.": "w_a.", "LanguageLSTM.": "lstm2.", "embedding.": "embedding.", "fc.": "W_o.",
}
