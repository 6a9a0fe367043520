"""GridTDModel: Ada-LSTM, adaptive attention with an LSTM predictor (docs/method.md, section 2)."""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from captioning.captioner import Captioner
from captioning.explanation import attribution
from captioning.explanation.attribution import Trace, explain
from captioning.explanation.rules import LRP, Gradient, Guided
from captioning.layers import lstm_cell, lstm_products, region_mean


class Context(NamedTuple):
    """What does not depend on the words. The LSTMs have two products each: of gates, and of g."""
    v: torch.Tensor              # (B, K, d) projected regions
    v_proj: torch.Tensor         # (B, K, A) W_a v + b_a
    mask: torch.Tensor | None    # (B, K) False at padded regions; None: no padding
    lstm1: list     # (weight of E[w], weight of [h2; h1], share of g and bias); sentinel's gate too
    lstm2: list     # (weight of [ĉ; h1; h2], bias)


class GridTDModel(Captioner):
    """Captions images with two LSTMs and adaptive attention over K regions.

    vocab_size V, embed_dim e, hidden_dim d, attention_dim A. encoder: a name in
    encoders.IMAGE_SIZE, an nn.Sequential of layers that the rules know, or None for region features
    (B, K, feature_dim). query_per_region: adds the attention's query as the published checkpoints
    do (docs/method.md, section 2), which requires A = K.
    """

    def __init__(self, vocab_size, embed_dim=512, hidden_dim=512, attention_dim=196,
                 encoder="vgg16", query_per_region=False, feature_dim=2048, dropout=0.5):
        e, d, A = embed_dim, hidden_dim, attention_dim
        super().__init__({"vocab_size": vocab_size, "embed_dim": e, "hidden_dim": d,
                          "attention_dim": A, "encoder": encoder, "feature_dim": feature_dim,
                          "query_per_region": query_per_region, "dropout": dropout})
        self.query_per_region = query_per_region
        self.embedding = nn.Embedding(vocab_size, e, padding_idx=0)   # E
        self.W_v = nn.Linear(self.feature_dim, d)
        self.W_g = nn.Linear(self.feature_dim, e)
        self.lstm1 = nn.LSTMCell(d + 2 * e, d)       # of [h2; g; E[w]]
        self.W_x = nn.Linear(d + 2 * e, d)
        self.W_h = nn.Linear(d, d)
        self.W_a = nn.Linear(d, A)
        self.W_q = nn.Linear(d, A, bias=False)
        self.W_s = nn.Linear(d, A)
        self.w_a = nn.Linear(A, 1, bias=False)
        # PyTorch's default keeps attention uniform for epochs
        nn.init.normal_(self.w_a.weight, std=2 / A ** 0.5)
        self.lstm2 = nn.LSTMCell(2 * d, d)           # of [ĉ; h1]
        self.W_o = nn.Linear(d, vocab_size)
        self.dropout = nn.Dropout(dropout)

    # -- the equations of section 2 ----------------------------------------------------------------

    def start(self, features):
        """features (B, K, C) -> Context."""
        mask = self.region_mask(features)
        v = torch.relu(self.W_v(features))                                   # (B, K, d)
        g = torch.relu(self.W_g(region_mean(features, mask)))                # (B, e)

        # LSTM1 reads x1 = [h2; g; E[w]], and the sentinel's gate the same
        lstm1 = []
        sentinel = [self.W_x.weight], [self.W_h.weight], [self.W_x.bias + self.W_h.bias]
        for W_x1, W_h1, bias in lstm_products(self.lstm1.parameters(), sentinel):
            W_h2, W_g, W_word = W_x1.split((W_h1.shape[1], g.shape[1], g.shape[1]), 1)
            lstm1.append((W_word, torch.cat([W_h2, W_h1], 1), F.linear(g, W_g, bias)))

        # LSTM2 reads x2 = [ĉ; h1]
        lstm2 = []
        for W_x2, W_h2, bias in lstm_products(self.lstm2.parameters()):
            lstm2.append((torch.cat([W_x2, W_h2], 1), bias))
        return Context(v, self.W_a(v), mask, lstm1, lstm2)

    def initial_state(self, B, N=1):
        """h1, c1, h2, c2, zeros (B, N, d), for N hypotheses per image."""
        return (self.W_h.weight.new_zeros(B, N, self.W_h.out_features),) * 4

    def read(self, words, context):
        """words (B, …) ids -> what they and g add to LSTM1's products, (B, …, 4d), (B, …, d)."""
        E = self.embedding(words)
        ones = (1,) * (words.dim() - 1)     # an image's constant serves all its words
        return [F.linear(E, W_word) + constant.unflatten(0, (-1, *ones))
                for W_word, _, constant in context.lstm1]

    def recur(self, inputs, state, context):
        """One step of N hypotheses per image; inputs: of `read` -> ĉ (B, N, d), state, α, β."""
        h1, c1, h2, c2 = state
        x = torch.cat([h2, h1], -1)
        gates, g = (part + F.linear(x, W_state)
                    for part, (_, W_state, _) in zip(inputs, context.lstm1, strict=True))
        i, f, o, sentinel = gates.sigmoid().chunk(4, -1)
        h1, c1 = lstm_cell(i, f, o, g, c1)

        s = sentinel * c1.tanh()
        alpha, beta = self.attend(h1, s, context)
        c = alpha @ context.v                                                # (B, N, d)
        c_hat = beta * s + (1 - beta) * c

        x = torch.cat([c_hat, h1, h2], -1)
        gates, g = (F.linear(x, *part) for part in context.lstm2)
        i, f, o = gates.sigmoid().chunk(3, -1)
        h2, c2 = lstm_cell(i, f, o, g, c2)
        return c_hat, (h1, c1, h2, c2), alpha, beta

    def attend(self, h1, s, context):
        """h1, s (B, N, d) -> weights α (B, N, K) of the regions, β (B, N, 1) of s."""
        q = self.W_q(h1)                                                     # (B, N, A)
        q_regions = q[..., None] if self.query_per_region else q[:, :, None]
        z = self.w_a((context.v_proj[:, None] + q_regions).tanh()).squeeze(-1)   # (B, N, K)
        if context.mask is not None:
            z = z.masked_fill(~context.mask[:, None], -torch.inf)
        z_s = self.w_a((self.W_s(s) + q).tanh())                             # (B, N, 1)
        return z.softmax(-1), torch.cat([z, z_s], -1).softmax(-1)[..., -1:]

    def step(self, words, state, context, predict=None):
        """One decoding step: words (B, N) ids -> logits (B, N, V), state, attention (B, N, K);
        predict(ĉ, h2) computes the logits in place of output(ĉ + h2)."""
        c_hat, state, alpha, _ = self.recur(self.read(words, context), state, context)
        h2 = state[2]
        return predict(c_hat, h2) if predict else self.output(c_hat + h2), state, alpha

    def teacher_force(self, features, captions, context=None):
        """All steps of captions (B, N, T+1), each reading captions[..., t] -> Trace."""
        context = context or self.start(features)
        inputs = self.read(captions[..., :-1], context)             # of all T words at once
        state = self.initial_state(*captions.shape[:2])
        steps = []
        for t in range(captions.shape[2] - 1):
            c_hat, state, alpha, beta = self.recur([x[:, :, t] for x in inputs], state, context)
            steps.append((c_hat, state[2], alpha, beta))
        c_hat, h2, alpha, beta = (torch.stack(parts, 2) for parts in zip(*steps, strict=True))
        return Trace(c_hat, h2, c_hat + h2, alpha, beta)

    def region_logits(self, features):
        """features (B, K, C) -> logits (B, K, V): the output layer applied to each v_k alone."""
        return self.W_o(torch.relu(self.W_v(features)))

    # -- explanations of every word captions[:, t + 1] at every step t -----------------------------
    # Each returns an attribution.Explanation; options: those of attribution.explain.

    def lrp(self, images, captions, eps=0.01, rule=None, **options):
        """Layer-wise relevance propagation (sections 4, 5); rule: another one than LRP(eps)."""
        return explain(self, images, captions, rule or LRP(eps), **options).times_inputs()

    def lrp_specific(self, images, captions, **options):
        """LRP of each word minus the mean of LRP of the caption's other words (section 4)."""
        return attribution.minus_other_words(self.lrp, images, captions, **options)

    def gradient(self, images, captions, **options):
        """The gradient of each word's logit (section 6)."""
        return explain(self, images, captions, Gradient(), **options).summed()

    def grad_cam(self, images, captions, pixels=True, **options):
        """Grad-CAM at the encoder's output (Selvaraju et al. 2017); pixels (B, T, 1, H, W)."""
        result = explain(self, images, captions, Gradient(), pixels=False, **options)
        return result.class_activation_map(pixels)

    def guided_backprop(self, images, captions, **options):
        """Guided backpropagation (Springenberg et al. 2015)."""
        return explain(self, images, captions, Guided(), **options).summed()

    def guided_grad_cam(self, images, captions, **options):
        """Guided backpropagation ⊙ upsampled Grad-CAM."""
        return (self.guided_backprop(images, captions, **options)
                * self.grad_cam(images, captions, **options))

    def attention(self, images, captions, **options):
        """The attention weights alone; words, features and pixels are None."""
        return attribution.attention(self, images, captions, **options)

    PUBLISHED_NAMES = {     # section 10
        "img_encoder.encoder.": "encoder.", "img_projector.": "W_v.",
        "global_img_feature_proj.": "W_g.", "AdaLSTM.lstm_cell.": "lstm1.",
        "AdaLSTM.x_gate.": "W_x.", "AdaLSTM.h_gate.": "W_h.", "AdaAttention.W_v_proj.": "W_a.",
        "AdaAttention.W_s_proj.": "W_s.", "AdaAttention.W_g_proj.": "W_q.",
        "AdaAttention.w_h.": "w_a.", "LanguageLSTM.": "lstm2.", "embedding.": "embedding.",
        "fc.": "W_o."}
