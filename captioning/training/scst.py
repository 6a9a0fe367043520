"""Self-critical sequence training (Rennie et al. 2017) with CIDEr-D (docs/method.md, section 7)."""
import torch
from torch.nn import functional as F

from captioning import decoding, processes
from captioning.device import without_gradient
from captioning.errors import InputError
from captioning.explanation.lrp_inference import weighted_hidden
from captioning.recurrence import word_rows
from captioning.training.losses import count_words
from captioning.training.parts import WHOLE


class SCST:
    """The loss −(reward − baseline) · log-probability of sampled captions, per token of the mean reference.

    reward(captions, references) -> (B, S): a reward.CiderD. max_len: maximum number of tokens per caption, <end>
    included. samples: sampled captions per image. baseline: "greedy", the reward of the greedy caption, decoded from p;
    or "mean", the mean reward of the image's other samples (Luo 2020), which needs two samples or more. stop: bool
    (V,), words whose LRP-inference weights stay 1: captions are sampled from p̃ and p̃ is trained; None: p is.
    """
    PATIENCE = 50       # consecutive steps with a constant reward before training is stopped

    def __init__(self, vocabulary, reward, max_len, samples=1, baseline="greedy", stop=None):
        self.vocabulary, self.reward, self.max_len, self.samples = vocabulary, reward, max_len, samples
        self.has_greedy_baseline, self.stop, self.constant_passes = baseline == "greedy", stop, 0

    def __call__(self, model, features, captions, epoch, part=WHOLE):
        """features (B, K, C) of the part, references captions (B, R, L) of the whole batch, from <start> on -> (loss,
        summed reward, samples)."""
        context = model.start(features)
        tokens = self.sample_captions(model, context, part).tokens                              # (B, S, T)
        rewards = self.reward(tokens, captions[part.images, :, 1:]).cpu().float()    # in this order: MPS has no float64
        if self.has_greedy_baseline:
            tokens, advantage = tokens[:, 1:], rewards[:, 1:] - rewards[:, :1]
            rewards = rewards[:, 1:]
        else:
            advantage = (rewards - rewards.mean(1, keepdim=True)) * self.samples / (self.samples - 1)
        self.check(advantage, epoch, part.passes)
        log_p = self.log_probabilities(model, features, tokens, context)               # (B, N, T), 0 at padding
        length = count_words(captions) / (captions[..., 1] != 0).sum()      # the same for all parts and samples
        loss = -(advantage.to(features.device) * log_p.sum(-1)).sum() / (length * len(captions) * self.samples)
        return loss, rewards.sum().to(features.device), torch.tensor(rewards.numel(), device=features.device)

    def sample_captions(self, model, context, part=WHOLE):
        """decoding.Decoded samples of each image, preceded by its greedy caption if that is the baseline."""
        def predict(c_hat, h):
            logits = model.output(c_hat + h)
            if self.stop is None:
                return logits
            weighted = model.output(weighted_hidden(model, c_hat, h, logits.argmax(-1), self.stop))
            if self.has_greedy_baseline:
                weighted[:, 0] = logits[:, 0]
            return weighted

        with without_gradient():
            return decoding.sample(model, context, self.vocabulary, self.max_len, predict=predict,
                                   samples=self.samples + self.has_greedy_baseline, draw=part.exponential,
                                   greedy_first=self.has_greedy_baseline)

    def log_probabilities(self, model, features, tokens, context):
        """Log-probabilities (B, N, T) of tokens (B, N, T) after <start>, teacher-forced; 0 at padding."""
        captions = torch.cat([torch.full_like(tokens[..., :1], self.vocabulary.start), tokens], -1)
        trace = model.teacher_force(features, captions, context=context, skip_padding=True)
        rows = word_rows(captions)
        c_hat, h, hidden = (part.flatten(0, -2)[rows] for part in (trace.c_hat, trace.h, trace.hidden))
        if self.stop is not None:
            with without_gradient():
                words = model.output(hidden).argmax(-1)
            hidden = weighted_hidden(model, c_hat, h, words, self.stop)
        logits = decoding.without_special(model.output(hidden).float(), self.vocabulary)
        log_p = -F.cross_entropy(logits, tokens.flatten()[rows], reduction="none", ignore_index=0)
        of_tokens = log_p.new_zeros(tokens.numel())
        of_tokens[rows] = log_p
        return of_tokens.view(tokens.shape)

    def check(self, advantage, epoch, passes):
        """InputError if no caption's reward, in any process, has differed from its baseline for PATIENCE steps of
        `passes` passes each: the gradient is zero."""
        self.constant_passes = 0 if processes.any_of((advantage != 0).any().item()) else self.constant_passes + 1
        if self.constant_passes >= self.PATIENCE * passes:
            raise InputError(f"the reward has been constant for {self.PATIENCE} steps in epoch {epoch + 1}, so "
                             "the model does not learn: lower --decoder_lr, start from an earlier checkpoint, or raise "
                             "--samples")
