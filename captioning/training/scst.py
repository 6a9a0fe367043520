"""Self-critical sequence training (Rennie et al. 2017) with CIDEr-D (docs/method.md, section 7)."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from captioning import decoding, processes
from captioning.data.vocabulary import Vocabulary
from captioning.device import without_gradient
from captioning.errors import InputError
from captioning.explanation.lrp_inference import weighted_hidden
from captioning.training.losses import word_rows


@dataclass
class SCST:
    """−(reward − baseline) · log-probability of sampled captions, per word of the mean reference.

    A loss as losses.py describes it, with the references as captions. baseline: "greedy", the
    reward of the greedy caption, decoded from p; or "mean", the mean reward of the image's other
    samples (Luo 2020), which needs two samples or more. stop: bool (V,), words whose LRP-inference
    weights stay 1: captions are sampled from p̃ and p̃ is trained; None: p is."""
    vocabulary: Vocabulary
    reward: Callable            # (captions, references) -> (B, S): a reward.CiderD
    max_len: int                # maximum number of words per caption, <end> included
    samples: int = 1            # sampled captions per image
    baseline: str = "greedy"
    stop: torch.Tensor | None = None
    measure = "reward"
    PATIENCE = 50               # steps with a constant reward before training is stopped
    learned_at = None           # the last step with a reward that differed from its baseline

    def counts(self, batch):
        """Words of each image's mean reference, summed over the images."""
        captions = batch["captions"]
        words = (captions[..., 1:] != 0).sum((1, 2))
        references = (captions != 0).any(-1).sum(1)     # the others are padding
        return (words / references).sum()[None]

    def __call__(self, model, features, batch, counts):
        references = batch["captions"]
        context = model.start(features)
        tokens = self.sample_captions(model, context, batch["seeds"]).tokens           # (B, S, T)
        # in this order, as MPS has no float64
        rewards = self.reward(tokens, references[..., 1:]).cpu().float()
        if self.baseline == "greedy":
            advantage = rewards[:, 1:] - rewards[:, :1]
            tokens = tokens[:, 1:]
            rewards = rewards[:, 1:]
        else:
            others = self.samples / (self.samples - 1)
            advantage = (rewards - rewards.mean(1, keepdim=True)) * others
        self.check(advantage, batch)

        log_p = self.log_probabilities(model, features, tokens, context)               # (B, S, T)
        loss = -(advantage.to(log_p.device) * log_p.sum(-1)).sum() / self.samples
        log = rewards.sum().to(log_p.device), torch.tensor(rewards.numel(), device=log_p.device)
        return loss / counts[0], log

    def sample_captions(self, model, context, seeds):
        """decoding.Decoded samples of each image, after its greedy caption if a baseline."""
        has_greedy = self.baseline == "greedy"

        def predict(c_hat, h):
            logits = model.output(c_hat + h)
            if self.stop is None:
                return logits
            hidden = weighted_hidden(model, c_hat, h, logits.argmax(-1), self.stop)
            weighted = model.output(hidden)
            if has_greedy:
                weighted[:, 0] = logits[:, 0]
            return weighted

        with without_gradient():
            return decoding.sample(model, context, self.vocabulary, self.max_len, seeds,
                                   samples=self.samples + has_greedy, greedy_first=has_greedy,
                                   predict=predict)

    def log_probabilities(self, model, features, tokens, context):
        """Log-probabilities (B, S, T) of tokens (B, S, T) after <start>; 0 at padding."""
        captions = decoding.with_start(tokens, self.vocabulary)
        trace = model.teacher_force(features, captions, context=context)
        rows = word_rows(captions)
        c_hat, h, hidden = (x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h, trace.hidden))
        if self.stop is not None:
            with without_gradient():
                words = model.output(hidden).argmax(-1)
            hidden = weighted_hidden(model, c_hat, h, words, self.stop)
        logits = decoding.without_special(model.output(hidden).float(), self.vocabulary)
        targets = tokens.flatten()[rows]
        log_p = -F.cross_entropy(logits, targets, reduction="none", ignore_index=0)
        of_tokens = log_p.new_zeros(tokens.numel())
        of_tokens[rows] = log_p
        return of_tokens.view(tokens.shape)

    def check(self, advantage, batch):
        """InputError if no reward, in any process, has differed from its baseline for PATIENCE
        steps: the gradient is zero."""
        differs = processes.any_of((advantage != 0).any().item())
        if differs or self.learned_at is None:
            self.learned_at = batch["step"]
        if batch["step"] - self.learned_at >= self.PATIENCE:
            raise InputError(f"the reward has been constant for {self.PATIENCE} steps in epoch "
                             f"{batch['epoch'] + 1}, so the model does not learn: lower "
                             "--decoder_lr, start from an earlier checkpoint, or raise --samples")
