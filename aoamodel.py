"""AOAModel: MH-FC, multi-head attention and a fully connected predictor (docs/method.md, 3)."""
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from captioning.captioner import Captioner
from captioning.errors import InputError
from captioning.explanation import attribution
from captioning.explanation.attribution import Trace, explain
from captioning.explanation.rules import LRP, Gradient, Guided
from captioning.layers import region_mean


class Context(NamedTuple):
    """What does not depend on the words: computed once for all captions of an image."""
    v_mean: torch.Tensor         # (B, d) mean projected region
    k: torch.Tensor              # (B, M, K, d/M) keys of the M heads
    u: torch.Tensor              # (B, M, K, d/M) their values
    mask: torch.Tensor | None    # (B, K) False at padded regions; None: no padding


class AOAModel(Captioner):
    """Captions images with one LSTM and multi-head attention over K regions.

    vocab_size V, embed_dim e, hidden_dim d, num_head M. encoder: a name in encoders.IMAGE_SIZE, an
    nn.Sequential of layers that the rules know, or None for region features (B, K, feature_dim).
    InputError if d is not a multiple of M.
    """

    def __init__(self, vocab_size, embed_dim=512, hidden_dim=512, num_head=8, encoder="vgg16",
                 feature_dim=2048, dropout=0.3, attention_dropout=0.1):
        e, d = embed_dim, hidden_dim
        if d % num_head:
            raise InputError(f"hidden_dim {d} is not a multiple of num_head {num_head}: change one "
                             "of them")
        super().__init__({"vocab_size": vocab_size, "embed_dim": e, "hidden_dim": d,
                          "num_head": num_head, "encoder": encoder, "feature_dim": feature_dim,
                          "dropout": dropout, "attention_dropout": attention_dropout})
        self.num_head = num_head
        self.embedding = nn.Embedding(vocab_size, e, padding_idx=0)   # E
        self.W_v = nn.Linear(self.feature_dim, d)
        self.lstm = nn.LSTM(e + d, d, batch_first=True)               # of [E[w]; v̄]
        self.W_Q = nn.Linear(d, d)
        self.W_K = nn.Linear(d, d)
        self.W_U = nn.Linear(d, d)
        self.W_G = nn.Linear(d, d)
        self.W_L = nn.Linear(d, d)
        self.W_o = nn.Linear(d, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)

    # -- the equations of section 3 ----------------------------------------------------------------

    def start(self, features):
        """features (B, K, C) -> Context."""
        mask = self.region_mask(features)
        v = torch.relu(self.W_v(features))                                   # (B, K, d)
        keys, values = self.heads(self.W_K(v)), self.heads(self.W_U(v))
        return Context(region_mean(v, mask), keys, values, mask)

    def heads(self, x):
        """(B, S, d) -> (B, M, S, d/M)"""
        return x.unflatten(-1, (self.num_head, -1)).transpose(1, 2)

    def initial_state(self, B, N=1):
        """h, m, zeros (B, N, d), for N hypotheses per image."""
        return (self.W_o.weight.new_zeros(B, N, self.W_o.in_features),) * 2

    def read(self, words, state, context):
        """The LSTM reads words (B, N, T) ids of N hypotheses per image -> h (B, N, T, d), state."""
        B, N, T = words.shape
        v_mean = context.v_mean[:, None, None].expand(B, N, T, -1)
        x = torch.cat([self.embedding(words), v_mean], -1).flatten(0, 1)     # (BN, T, e + d)
        with torch.autocast("cpu", enabled=False):      # many CPUs have no LSTM in bfloat16
            h, state = self.lstm(x, tuple(part.reshape(1, B * N, -1) for part in state))
        return h.unflatten(0, (B, N)), tuple(part.view(B, N, -1) for part in state)

    def attend(self, h, context):
        """h (B, S, d), any S queries per image -> ĉ (B, S, d), α (B, S, M, K)."""
        q = self.heads(self.W_Q(h))                                          # (B, M, S, d/M)
        z = q @ context.k.mT / q.shape[-1] ** 0.5                            # (B, M, S, K)
        if context.mask is not None:
            z = z.masked_fill(~context.mask[:, None, None], -torch.inf)
        alpha = z.softmax(-1)
        c = (self.attention_dropout(alpha) @ context.u).transpose(1, 2)      # (B, S, M, d/M)
        c = c.flatten(2)
        return self.W_G(h).sigmoid() * self.W_L(c), alpha.transpose(1, 2)

    def step(self, words, state, context, predict=None):
        """One decoding step: words (B, N) ids -> logits (B, N, V), state, attention (B, N, M, K);
        predict(ĉ, h) makes the logits in place of the output layer alone."""
        h, state = self.read(words[..., None], state, context)
        h = h.squeeze(2)
        c_hat, alpha = self.attend(h, context)
        return predict(c_hat, h) if predict else self.output(c_hat + h), state, alpha

    def teacher_force(self, features, captions, context=None):
        """All steps of captions (B, N, T+1), each reading captions[..., t] -> Trace."""
        context = context or self.start(features)
        B, N, T = captions[..., 1:].shape
        h, _ = self.read(captions[..., :-1], self.initial_state(B, N), context)
        c_hat, alpha = self.attend(h.flatten(1, 2), context)
        c_hat = c_hat.unflatten(1, (N, T))
        return Trace(c_hat, h, c_hat + h, alpha.unflatten(1, (N, T)))

    def region_logits(self, features):
        """features (B, K, C) -> logits (B, K, V): the output layer applied to each u_k alone."""
        return self.W_o(self.W_L(self.W_U(torch.relu(self.W_v(features)))))

    # -- explanations of every word captions[:, t + 1] at every step t -----------------------------
    # Each returns an attribution.Explanation; options: those of attribution.explain.

    def lrp(self, images, captions, eps=0.01, rule=None, head=None, **options):
        """Layer-wise relevance propagation (sections 4, 5); rule: another one than LRP(eps).

        head: index of the one attention head that propagates relevance, all by default. ValueError
        if there is no such head."""
        with nullcontext() if head is None else self.only_head(head):
            return explain(self, images, captions, rule or LRP(eps), **options).times_inputs()

    def only_head(self, head):
        """A context in which the outputs of all other heads are constants."""
        if not 0 <= head < self.num_head:
            raise ValueError(f"head {head} is not one of this model's 0 … {self.num_head - 1}")
        entry = torch.arange(self.W_L.in_features, device=self.W_L.weight.device)
        is_chosen = entry // (self.W_L.in_features // self.num_head) == head
        return self.W_L.register_forward_pre_hook(
            lambda _, inputs: torch.where(is_chosen, inputs[0], inputs[0].detach()))

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
        "img_encoder.encoder.": "encoder.", "img_projector.": "W_v.", "embedding.": "embedding.",
        "LanguageLSTM.": "lstm.", "decoder_k_proj.": "W_K.", "decoder_v_proj.": "W_U.",
        "decoder_multihead_attention.q_proj.": "W_Q.", "decoder_aoa_linear_gate.": "W_G.",
        "decoder_aoa_linear.": "W_L.", "fc.": "W_o."}
