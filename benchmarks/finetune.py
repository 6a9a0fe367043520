"""Time of fine-tuning with explanations against plain fine-tuning: python benchmarks/finetune.py

32 images with one caption of 20 words, stored features of 196 × 512, d = e = 512, V = 9586, random
weights; every second word is a stop word. Evidence erasure explains one of two captions of each
image, or one of five. A step is forward and backward pass, clipping and Adam."""
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pycocoevalcap.cider.cider import Cider

from benchmarks import measure
from captioning.decoding import image_seeds
from captioning.device import autocast
from captioning.training.erasure import ErasureLoss
from captioning.training.losses import CrossEntropy, LRPInferenceLoss
from captioning.training.reward import CiderD, write_frequencies
from captioning.training.scst import SCST

B, T, REFERENCES = 32, 20, 5
OBJECT_INTERVAL = 7     # every seventh word names an object: on average three in a caption
FLAGS = {"--amp": {"action": "store_true", "help": "mixed precision"}}


def make_losses(words, reward, device):
    """{mode: loss function} of the fine-tuning modes."""
    number = torch.arange(len(words), device=device)
    stop = number % 2 == 0
    is_object = (number % OBJECT_INTERVAL == 0) & (number != words.pad)
    erasure = ErasureLoss(words, categories=torch.where(is_object, number, -1), weight=0.2,
                          keep_weight=0.1, share=0.2)
    losses = {"--ce_tune": CrossEntropy(words), "--lrp_tune": LRPInferenceLoss(words, stop=stop),
              "--erase_tune": erasure,
              "--cider_tune": SCST(words, reward, T),
              "--lrp_cider_tune": SCST(words, reward, T, stop=stop)}
    for mode in ("--cider_tune", "--lrp_cider_tune"):
        losses[mode].check = lambda *_: None     # random weights: the advantage is not meaningful
    return losses


def train_step(model, optimizer, amp, features, loss, captions):
    index = torch.arange(len(captions))
    batch = {"captions": captions, "index": index, "seeds": image_seeds(index.tolist()), "epoch": 0,
             "step": 0}
    optimizer.zero_grad()
    with autocast(features.device, amp):
        value, _ = loss(model.train(), features, batch, loss.counts(batch))
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def reward_functions(reward, samples, references):
    """{name: function}: CIDEr-D of samples (B, 2, T) by this repository, and by pycocoevalcap."""
    def text(ids):
        return " ".join(str(i) for i in ids if i)
    results = {i: [text(ids)] for i, ids in enumerate(samples.flatten(0, 1).tolist())}
    truths = {i: [text(ids) for ids in references[i // 2, :, 1:].tolist()] for i in results}
    return {f"CIDEr-D of {len(results)} captions": partial(reward, samples, references[..., 1:]),
            "pycocoevalcap": lambda: Cider().compute_score(truths, results)}


def tables(args, size, device):
    words = measure.vocabulary(size.V)
    train = measure.random_captions((2000, REFERENCES), words, T)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "frequencies.hdf5")
        write_frequencies(path, train.numpy(), size.V)
        reward = CiderD(path, size.V)
    references = train[:B].to(device)
    features = torch.rand(B, size.K, size.C, device=device)
    rewards = reward_functions(reward, train[B:2 * B, :2, 1:], train[:B])
    rows = []
    for name in measure.MODELS:
        model = measure.build(name, size, device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-12)
        losses = make_losses(words, reward, device)
        step = partial(train_step, model, optimizer, args.amp, features)
        for tuned, plain, captions in (
                ("--lrp_tune", "--ce_tune", 1), ("--lrp_cider_tune", "--cider_tune", REFERENCES),
                ("--erase_tune", "--ce_tune", 2), ("--erase_tune", "--ce_tune", 5)):
            given = references[:, :captions]
            rows += measure.compare({
                f"{name}, {tuned}, {captions} captions": partial(step, losses[tuned], given),
                plain: partial(step, losses[plain], given)}, args.repeats, device)
        self_critical = partial(step, losses["--cider_tune"], references)
        rows += measure.compare({"the reward alone": next(iter(rewards.values())),
                                 f"{name}, --cider_tune": self_critical}, args.repeats, device)
    rows += measure.compare(rewards, args.repeats, device)
    return [measure.Table(f"A step of {B} images; half of the words are stop words",
                          measure.COMPARISON, rows)]


if __name__ == "__main__":
    measure.run("finetune", __doc__, tables, flags=FLAGS)
