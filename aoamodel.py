"""AOAModel: multi-head attention with a fully connected predictor (docs/method.md, section 3), and its explanations."""
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from captioning import published
from captioning.explanation import attribution, encoders, lrp_inference
from captioning.explanation.rules import PLAIN, lstm_cell
from captioning.recurrence import Steps, StepWeight


class Context(NamedTuple):
    """What the recurrence and the attention need from the image, computed once."""
    v_mean: torch.Tensor         # (B, d) mean projected region
    gates: torch.Tensor          # (B, 4d) its share of the LSTM's gates, with biases
    k: torch.Tensor              # (B, M, d/M, K) keys, transposed
    u: torch.Tensor              # (B, M, K, d/M) values
    mask: torch.Tensor | None    # (B, K) False at padded regions; None: no padding

    def select(self, images):
        """The Context of these images, indices or a slice."""
        return Context(*(part if part is None else part[images] for part in self))


class AOAModel(nn.Module):
    """Captions images with one LSTM and multi-head attention on attention over K regions.

    vocab_size V, embed_dim e, hidden_dim d (a multiple of num_head M). encoder: a name in encoders.IMAGE_SIZE, an
    nn.Sequential of Conv2d / ReLU / MaxPool2d / AvgPool2d, or None for region features (B, K, feature_dim).
    ValueError if d is not a multiple of M.
    """

    def __init__(self, vocab_size, embed_dim=512, hidden_dim=512, num_head=8, encoder="vgg16", feature_dim=2048,
                 dropout=0.3, attention_dropout=0.1):
        super().__init__()
        e, d = embed_dim, hidden_dim
        if d % num_head:
            raise ValueError(f"hidden_dim {d} must be a multiple of num_head {num_head}")
        self.config = {"vocab_size": vocab_size, "embed_dim": e, "hidden_dim": d, "num_head": num_head,
                       "encoder": encoder, "feature_dim": feature_dim, "dropout": dropout,
                       "attention_dropout": attention_dropout}
        self.encoder = encoders.architecture(encoder) if isinstance(encoder, str) else encoder
        C = feature_dim if encoder is None else encoders.feature_dim(self.encoder)
        self.num_head = num_head
        self.embedding = nn.Embedding(vocab_size, e, padding_idx=0)   # E
        self.W_v = nn.Linear(C, d)
        self.lstm = nn.LSTM(e + d, d, batch_first=True)               # of [E[w]; v̄]
        self.W_Q = nn.Linear(d, d)
        self.W_K = nn.Linear(d, d)
        self.W_U = nn.Linear(d, d)
        self.W_G = nn.Linear(d, d)
        self.W_L = nn.Linear(d, d)
        self.W_o = nn.Linear(d, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)

    # -- the forward pass: encode, start, recurrence, attention, output ------------------------------------------

    def encode(self, images, rule=PLAIN):
        """images (B, 3, H, W) -> features (B, K, C), K row by row; region features (B, K, C) are returned unchanged."""
        return attribution.encode(self, images, rule)

    def start(self, features, rule=PLAIN):
        """features (B, K, C) -> Context. Without an encoder, regions that are all zero are padding."""
        mask = None if self.encoder is not None else (features != 0).any(-1)
        v = rule.rectify(self.W_v(features))                                           # (B, K, d)
        v_mean = rule.stabilise(attribution.region_mean(v, mask))
        k = self.W_K(rule.constant(v)).unflatten(-1, (self.num_head, -1)).permute(0, 2, 3, 1)
        u = rule.stabilise(self.W_U(v)).unflatten(-1, (self.num_head, -1)).transpose(1, 2)
        weight = self.lstm.weight_ih_l0[:, self.config["embed_dim"]:]
        gates = rule.lstm_linear(v_mean, weight, self.config["hidden_dim"])
        return Context(v_mean, gates + self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0, k, u, mask)

    def initial_state(self, B, N=1):
        """h, m, zeros (B, N, d), for N hypotheses per image."""
        return (self.W_o.weight.new_zeros(B, N, self.config["hidden_dim"]),) * 2

    def word_weight(self):
        """The rows of the LSTM's input weight for E[w], (4d, e)."""
        return self.lstm.weight_ih_l0[:, :self.config["embed_dim"]]

    def recur(self, gates, state, linear, rule=PLAIN):
        """One LSTM step of (B, N) hypotheses; gates (B, N, 4d): the share of the input, with biases; linear: the
        product with the LSTM's recurrent weight."""
        h, m = state
        return lstm_cell(gates + linear(h), m, rule)

    def hidden_states(self, embeddings, context, steps, rule):
        """h (S, d), packed, of embeddings (B, N, T, e): step by step, or on GPUs one fused call if the rule permits."""
        B, N, T, _ = embeddings.shape
        if rule.fused and embeddings.is_cuda:
            self.lstm.train(torch.is_grad_enabled())    # cuDNN has derivatives in this mode alone; there is no dropout
            x = torch.cat([embeddings, context.v_mean[:, None, None].expand(B, N, T, -1)], -1)
            return steps.pack(self.lstm(x.flatten(0, 1))[0].unflatten(0, (B, N)))
        d = self.config["hidden_dim"]
        recurrent = StepWeight(self.lstm.weight_hh_l0.to(context.gates.dtype), rule, d)
        gates = rule.lstm_linear(steps.pack(embeddings), self.word_weight(), d) + context.gates[steps.image_of_row]
        state, parts = self.initial_state(B, N), []
        for (b, n), step in zip(steps.sizes, steps.split(recurrent.connect(gates)), strict=True):
            state = self.recur(step, [part[:b, :n] for part in state], recurrent, rule)
            parts.append(state[0].flatten(0, 1))
        return torch.cat(parts)

    def attend(self, h, context, rule=PLAIN):
        """h (B, S, d), any S queries per image -> ĉ (B, S, d), α (B, S, M, K)."""
        q = self.W_Q(rule.constant(h)).unflatten(-1, (self.num_head, -1)).transpose(1, 2)  # (B, M, S, d/M)
        z = q @ context.k / q.shape[-1] ** 0.5                                         # (B, M, S, K)
        if context.mask is not None:
            z = z.masked_fill(~context.mask[:, None, None], -torch.inf)
        alpha = z.softmax(-1)
        c = (self.attention_dropout(rule.constant(alpha)) @ context.u).transpose(1, 2)     # (B, S, M, d/M)
        c = rule.select_heads(rule.stabilise(c)).flatten(2)
        gate = torch.sigmoid(self.W_G(rule.constant(h)))
        return rule.constant(gate) * rule.stabilise(self.W_L(c)), alpha.transpose(1, 2)

    def region_logits(self, features):
        """features (B, K, C) -> logits (B, K, V): the output layer applied to each u_k alone, without the gate."""
        return self.W_o(self.W_L(self.W_U(torch.relu(self.W_v(features)))))

    def output(self, hidden):
        """ĉ + h (..., d) -> logits (..., V)."""
        return self.W_o(self.dropout(hidden))

    def step(self, words, state, context, predict=None):
        """One decoding step: words (B, N) ids -> logits (B, N, V), state, attention (B, N, M, K); predict(ĉ, h) makes
        the logits in place of the output layer alone."""
        gates = F.linear(self.embedding(words), self.word_weight()) + context.gates[:, None]
        state = self.recur(gates, state, partial(F.linear, weight=self.lstm.weight_hh_l0))
        c_hat, alpha = self.attend(state[0], context)
        return predict(c_hat, state[0]) if predict else self.output(c_hat + state[0]), state, alpha

    def teacher_force(self, features, captions, rule=PLAIN, context=None, skip_padding=False):
        """All steps of captions (B, N, T+1), each reading captions[..., t] -> attribution.Trace.

        skip_padding: most steps that predict <pad> are not computed (recurrence.Steps)."""
        context, steps = context or self.start(features, rule), Steps(captions, skip_padding)
        embeddings = rule.leaf(self.embedding(captions[..., :-1]))                     # (B, N, T, e)
        h = self.hidden_states(embeddings, context, steps, rule)                       # (S, d)
        c_hat, alpha = map(steps.from_images, self.attend(steps.by_image(h), context, rule))
        c_hat, h, alpha = map(steps.unpack, (c_hat, h, alpha))                         # (B, N, T, ...)
        return attribution.Trace(embeddings, c_hat, h, rule.stabilise(c_hat + h), alpha, None)

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

    def lrp(self, images, captions, eps=0.01, head=None, **options):
        """Layer-wise relevance propagation (docs/method.md, sections 4 and 5); head: index of the one attention head
        that propagates relevance, all by default. ValueError if there is no such head."""
        return attribution.lrp(self, images, captions, eps=eps, head=head, **options)

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


PUBLISHED_NAMES = {
    "img_encoder.encoder.": "encoder.", "img_projector.": "W_v.", "embedding.": "embedding.",
    "LanguageLSTM.": "lstm.", "decoder_k_proj.": "W_K.", "decoder_v_proj.": "W_U.",
    "decoder_multihead_attention.q_proj.": "W_Q.", "decoder_aoa_linear_gate.": "W_G.",
    "decoder_aoa_linear.": "W_L.", "fc.": "W_o.",
}
