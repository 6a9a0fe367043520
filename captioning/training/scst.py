"""Self-critical sequence training (Rennie et al. 2017) with CIDEr-D, of p or of LRP-inference's p̃ (method.md, 7)."""
import torch
from torch.nn import functional as F

from captioning import decoding
from captioning.errors import InputError
from captioning.explanation.lrp_inference import weighted_hidden


class SCST:
    """The loss −(reward − baseline) · log-probability of sampled captions, averaged over each caption's tokens.

    reward: reward.CiderD. baseline: "greedy", the reward of the caption decoded greedily from p, or "mean", that of the
    image's other samples (Luo 2020), of which there must be two at least. max_len: tokens a caption, <end> included.
    stop: bool (V,), draws and trains with p̃, whose weights stay 1 at these words; None: with p.
    """
    PATIENCE = 50       # steps without any difference in reward

    def __init__(self, vocabulary, reward, max_len, samples=1, baseline="greedy", stop=None):
        self.vocabulary, self.reward, self.max_len, self.samples = vocabulary, reward, max_len, samples
        self.greedy, self.stop, self.idle = baseline == "greedy", stop, 0

    def __call__(self, model, features, captions):
        """features (B, K, C), captions (B, R, L) from <start> on, the references -> (loss, summed reward, samples)."""
        context = model.start(features)
        drawn = self.draw(model, context).tokens                                       # (B, S, T)
        rewards = self.reward(drawn, captions[..., 1:]).to(features.device, torch.float32)
        if self.greedy:
            drawn, advantage = drawn[:, 1:], rewards[:, 1:] - rewards[:, :1]
            rewards = rewards[:, 1:]
        else:
            advantage = (rewards - rewards.mean(1, keepdim=True)) * self.samples / (self.samples - 1)
        self.check(advantage)
        log_p = self.log_probabilities(model, features, drawn, context)                # (B, N, T), 0 at padding
        per_caption = log_p.sum(-1) / (drawn != 0).sum(-1)
        return -(advantage * per_caption).mean(), rewards.sum(), torch.tensor(rewards.numel(), device=rewards.device)

    def draw(self, model, context):
        """decoding.Decoded samples of each image, behind its greedy caption if that is the baseline."""
        def predict(c_hat, h):
            logits = model.output(c_hat + h)
            if self.stop is None:
                return logits
            weighted = model.output(weighted_hidden(model, c_hat, h, logits.argmax(-1), self.stop))
            if self.greedy:
                weighted[:, 0] = logits[:, 0]
            return weighted

        with torch.no_grad():
            return decoding.sample(model, context, self.vocabulary, self.max_len, samples=self.samples + self.greedy,
                                   greedy_first=self.greedy, predict=predict)

    def log_probabilities(self, model, features, drawn, context):
        captions = torch.cat([torch.full_like(drawn[..., :1], self.vocabulary.start), drawn], -1)
        trace = model.teacher_force(features, captions, context=context)
        hidden = trace.hidden
        if self.stop is not None:
            with torch.no_grad():
                words = model.output(hidden).argmax(-1)
            hidden = weighted_hidden(model, trace.c_hat, trace.h, words, self.stop)
        logits = decoding.without_special(model.output(hidden).float(), self.vocabulary)
        log_p = -F.cross_entropy(logits.flatten(0, -2), drawn.flatten(), reduction="none", ignore_index=0)
        return log_p.view(drawn.shape)

    def check(self, advantage):
        """InputError when for many steps no caption's reward differed from its baseline: nothing is learnt."""
        self.idle = 0 if (advantage != 0).any() else self.idle + 1
        if self.idle >= self.PATIENCE:
            raise InputError(f"the reward has been constant for {self.idle} steps, so nothing is learnt: lower "
                             "--decoder_lr, start from an earlier checkpoint, or raise --samples")
