"""GridTDModel: Ada-LSTM, adaptive attention with an LSTM predictor (docs/method.md, section 2), and its explanations.
"""
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from captioning import published
from captioning.explanation import attribution, encoders, lrp_inference
from captioning.explanation.rules import PLAIN, lstm_cell
from captioning.recurrence import AdditiveScores, StepRegions, Steps, StepWeight


class Weights(NamedTuple):
    """The weights of the recurrence, side by side, so that each step has one product per LSTM."""
    word: torch.Tensor           # (5d, e) of E[w]: LSTM1's gates i, f, g, o and the sentinel's gate
    first: torch.Tensor          # (5d, 2d) of [h2; h1]: the same gates
    second: torch.Tensor         # (4d, 3d) of [ĉ; h1; h2]: LSTM2's gates
    bias: torch.Tensor           # (4d,) of LSTM2's gates


class Context(NamedTuple):
    """What the recurrence and the attention need from the image and the weights, computed once."""
    v: torch.Tensor              # (B, K, d) projected regions
    v_proj: torch.Tensor         # (B, K, A) W_a v + b_a
    gates: torch.Tensor          # (B, 5d) the global feature's share of LSTM1's and the sentinel's gates, with biases
    mask: torch.Tensor | None    # (B, K) False at padded regions; None: no padding
    weights: Weights

    def select(self, images):
        """The Context of these images, indices or a slice."""
        *parts, weights = self
        return Context(*(part if part is None else part[images] for part in parts), weights)


class GridTDModel(nn.Module):
    """Captions images with two LSTMs and adaptive attention over K regions.

    vocab_size V, embed_dim e, hidden_dim d, attention_dim A. encoder: a name in encoders.IMAGE_SIZE, an nn.Sequential
    of Conv2d / ReLU / MaxPool2d / AvgPool2d, or None for region features (B, K, feature_dim).
    query_per_region: adds the attention's query as the published checkpoints do (docs/method.md, section 2); A = K.
    """

    def __init__(self, vocab_size, embed_dim=512, hidden_dim=512, attention_dim=196, encoder="vgg16",
                 query_per_region=False, feature_dim=2048, dropout=0.5):
        super().__init__()
        e, d, A = embed_dim, hidden_dim, attention_dim
        self.config = {"vocab_size": vocab_size, "embed_dim": e, "hidden_dim": d, "attention_dim": A,
                       "encoder": encoder, "query_per_region": query_per_region, "feature_dim": feature_dim,
                       "dropout": dropout}
        self.encoder = encoders.architecture(encoder) if isinstance(encoder, str) else encoder
        C = feature_dim if encoder is None else encoders.feature_dim(self.encoder)
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

    # -- the forward pass: encode, start, step by step, output ---------------------------------------------------

    def encode(self, images, rule=PLAIN):
        """images (B, 3, H, W) -> features (B, K, C), K row by row; region features (B, K, C) are returned unchanged."""
        return attribution.encode(self, images, rule)

    def start(self, features, rule=PLAIN):
        """features (B, K, C) -> Context. Without an encoder, regions that are all zero are padding."""
        mask = None if self.encoder is not None else (features != 0).any(-1)
        d, e = self.config["hidden_dim"], self.config["embed_dim"]
        v = rule.rectify(self.W_v(features))                                           # (B, K, d)
        f_mean = rule.stabilise(attribution.region_mean(features, mask))               # (B, C)
        g = rule.rectify(self.W_g(f_mean))                                             # (B, e)
        lstm1, lstm2, W_x, W_h = self.lstm1, self.lstm2, self.W_x, self.W_h
        of_h2, of_g, of_word = torch.cat([lstm1.weight_ih, W_x.weight]).split((d, e, e), 1)
        # sums of parameters: gradients of sums of concatenations would share memory, and several passes add to them
        bias = torch.cat([lstm1.bias_ih + lstm1.bias_hh, W_x.bias + W_h.bias])
        of_h1 = torch.cat([lstm1.weight_hh, W_h.weight])
        # in the number format of v, so that mixed precision converts the weights once and not at every step
        weights = Weights(*(x.to(v.dtype) for x in (
            of_word, torch.cat([of_h2, of_h1], 1), torch.cat([lstm2.weight_ih, lstm2.weight_hh], 1),
            lstm2.bias_ih + lstm2.bias_hh)))
        return Context(v, self.W_a(v), rule.lstm_linear(g, of_g, d) + bias, mask, weights)

    def initial_state(self, B, N=1):
        """h1, c1, h2, c2, zeros (B, N, d), for N hypotheses per image."""
        return (self.W_h.weight.new_zeros(B, N, self.config["hidden_dim"]),) * 4

    def recur(self, gates1, gates2, state, context, linear1, linear2, average, rule=PLAIN):
        """One step for (B, N) hypotheses -> ĉ (B, N, d), state, α (B, N, K), β (B, N, 1); `output` takes ĉ + h2.

        gates1 (B, N, 5d), gates2 (4d,) or (B, N, 4d): the gates' terms that do not depend on the state; linear1,
        linear2, average: the products with Weights.first, Weights.second and v; state: four tensors (B, N, d)."""
        h1, c1, h2, c2 = state
        d = h1.shape[-1]
        gates, sentinel_gate = (gates1 + linear1(torch.cat([h2, h1], -1))).split((4 * d, d), -1)
        h1, c1 = lstm_cell(gates, c1, rule)
        s = rule.constant(sentinel_gate.sigmoid()) * rule.tanh(c1)
        alpha, beta = self.attend(rule.constant(h1), rule.constant(s), context)
        c = rule.stabilise(average(rule.constant(alpha)))                                  # (B, N, d)
        c_hat = rule.stabilise(rule.constant(beta) * s + rule.constant(1 - beta) * c)
        h2, c2 = lstm_cell(gates2 + linear2(torch.cat([c_hat, h1, h2], -1)), c2, rule)
        return c_hat, (h1, c1, h2, c2), alpha, beta

    def attend(self, h1, s, context):
        """h1, s (B, N, d) -> α (B, N, K), the regions' weights, and β (B, N, 1), the sentinel's."""
        q = self.W_q(h1)                                                               # (B, N, A)
        q_regions = q[..., None] if self.query_per_region else q[:, :, None]           # (B, N, K, 1) or (B, N, 1, A)
        z = AdditiveScores.apply(context.v_proj, q_regions, self.w_a.weight[0])        # (B, N, K)
        if context.mask is not None:
            z = z.masked_fill(~context.mask[:, None], -torch.inf)
        z_s = self.w_a(torch.tanh(self.W_s(s) + q))                                    # (B, N, 1)
        return z.softmax(-1), torch.cat([z, z_s], -1).softmax(-1)[..., -1:]

    def region_logits(self, features):
        """features (B, K, C) -> logits (B, K, V): the output layer applied to each v_k alone."""
        return self.W_o(torch.relu(self.W_v(features)))

    def output(self, hidden):
        """ĉ + h2 (..., d) -> logits (..., V)."""
        return self.W_o(self.dropout(hidden))

    def step(self, words, state, context, predict=None):
        """One decoding step: words (B, N) ids -> logits (B, N, V), state, attention (B, N, K); predict(ĉ, h2) makes
        the logits in place of the output layer alone."""
        weights = context.weights
        gates = F.linear(self.embedding(words), weights.word) + context.gates[:, None]
        c_hat, state, alpha, _ = self.recur(gates, weights.bias, state, context,
                                            *(partial(F.linear, weight=w) for w in (weights.first, weights.second)),
                                            lambda alpha: alpha @ context.v)
        return predict(c_hat, state[2]) if predict else self.output(c_hat + state[2]), state, alpha

    def teacher_force(self, features, captions, rule=PLAIN, context=None, skip_padding=False):
        """All steps of captions (B, N, T+1), each reading captions[..., t] -> attribution.Trace.

        skip_padding: most steps that predict <pad> are not computed (recurrence.Steps)."""
        context, steps = context or self.start(features, rule), Steps(captions, skip_padding)
        weights, d = context.weights, self.config["hidden_dim"]
        first, second = (StepWeight(weight, rule, d) for weight in (weights.first, weights.second))
        embeddings = rule.leaf(self.embedding(captions[..., :-1]))                     # (B, N, T, e)
        gates1 = rule.lstm_linear(steps.pack(embeddings), weights.word, d) + context.gates[steps.image_of_row]
        gates1, gates2 = first.connect(gates1), second.connect(weights.bias.expand(len(gates1), -1))
        regions = StepRegions(context.v, steps)
        context, state, parts = context.select(steps.images), self.initial_state(*captions.shape[:2]), []
        for (b, n), step1, step2 in zip(steps.sizes, steps.split(gates1), steps.split(gates2), strict=True):
            state = tuple(part[:b, :n] for part in state)
            c_hat, state, alpha, beta = self.recur(step1, step2, state, context.select(slice(b)), first, second,
                                                   regions, rule)
            parts.append((c_hat, state[2], alpha, beta))
        c_hat, h, alpha, beta = (steps.unpack(torch.cat([part.flatten(0, 1) for part in column]))
                                 for column in zip(*parts, strict=True))
        return attribution.Trace(embeddings, c_hat, h, rule.stabilise(c_hat + h), alpha, beta)

    def forward(self, images, captions):
        """Logits (B, T, V) or (B, N, T, V), teacher-forced on captions[..., :-1].

        images (B, 3, H, W) or region features (B, K, C); captions (B, T+1), or (B, N, T+1) for N per image: ids from
        <start> on, zero-padded."""
        return attribution.forward(self, images, captions)

    def lrp_inference(self, images, captions, stop_words, eps=0.01):
        """Logits p and weighted logits p̃ (docs/method.md, section 7), each of the shape that `forward` returns.

        stop_words: set of ids, special tokens included, whose weights stay 1."""
        return lrp_inference.lrp_inference(self, images, captions, stop_words, eps)

    # -- explanations of every word captions[:, t + 1] at every step t ------------------------------------------
    # Each returns an attribution.Explanation. Options: contrast, a word's id or ids (B, T), explains why each word and
    # not that one; steps (B, S), explains the words at these steps alone; chunk, words at once through the encoder;
    # pixels=False stops at the encoder's output.

    def lrp(self, images, captions, eps=0.01, **options):
        """Layer-wise relevance propagation (docs/method.md, sections 4 and 5)."""
        return attribution.lrp(self, images, captions, eps=eps, **options)

    def lrp_specific(self, images, captions, **options):
        """LRP of each word minus the mean of LRP of the caption's other words (section 4); options: of `lrp`."""
        return attribution.lrp_specific(self, images, captions, **options)

    def gradient(self, images, captions, **options):
        """The gradient of each word's logit (section 6)."""
        return attribution.gradient(self, images, captions, **options)

    def grad_cam(self, images, captions, **options):
        """Grad-CAM at the encoder's output (Selvaraju et al. 2017); pixels (B, T, 1, H, W)."""
        return attribution.grad_cam(self, images, captions, **options)

    def guided_backprop(self, images, captions, **options):
        """Guided backpropagation (Springenberg et al. 2015)."""
        return attribution.guided_backprop(self, images, captions, **options)

    def guided_grad_cam(self, images, captions, **options):
        """Guided backpropagation ⊙ upsampled Grad-CAM."""
        return attribution.guided_grad_cam(self, images, captions, **options)

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
