"""Time of fine-tuning with explanations, compared with plain fine-tuning: python benchmarks/finetune.py

32 images with one caption of 20 words, stored features of 196 × 512, d = e = 512, V = 9586, random weights. Evidence
erasure explains one of two captions of each image, as in configs/, or of five, as by default.
"""
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import (
    COMPARISON,
    MODELS,
    Table,
    build,
    compare,
    get_parser,
    profile,
    random_captions,
    sizes,
    vocabulary,
    write,
)
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.explanation.lrp_inference import lrp_loss
from captioning.training.erasure import ErasureLoss
from captioning.training.loop import make_optimizer, train_step
from captioning.training.losses import teacher_forced_loss
from captioning.training.parts import WHOLE, Loss
from captioning.training.reward import CiderD, write_frequencies
from captioning.training.scst import SCST

B, T, REFERENCES = 32, 20, 5
CAPTIONS = (2, 5)       # of each image in evidence erasure
EVERY = 2               # --erase_every
OBJECT_INTERVAL = 7     # every seventh word of the vocabulary names an object: on average three in a caption
STOP_SHARE = 0.5        # of the predicted words; in COCO's captions 51 % of the words are stop words or <end>


def get_args_parser():
    parser = get_parser(__doc__, repeats=3)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    return parser


def steps(name, args, size, device, words, references, reward):
    """{mode: function that runs one training step} of a new model."""
    model, features = build(name, size, device), torch.rand(B, size.K, size.C, device=device)
    with torch.no_grad():
        predicted = model(features, references[:, 0].to(device)).argmax(-1).flatten().tolist()
    frequent = sorted(set(predicted), key=predicted.count, reverse=True)
    stop, stop_count = torch.zeros(size.V, dtype=torch.bool, device=device), 0
    for word in frequent:
        if stop_count + predicted.count(word) <= STOP_SHARE * len(predicted):
            stop[word], stop_count = True, stop_count + predicted.count(word)
    losses = {"--lrp_tune": partial(lrp_loss, stop=stop),
              "--lrp_tune without stop words": partial(lrp_loss, stop=torch.zeros_like(stop)), "--ce_tune": None}
    losses = {mode: teacher_forced_loss(words, criterion) for mode, criterion in losses.items()}
    categories = torch.arange(size.V, device=device)
    categories[categories % OBJECT_INTERVAL > 0] = -1
    categories[words.pad] = -1
    losses["--erase_tune"] = ErasureLoss(words, categories, 0.2, 0.1, 0.2)
    losses[f"--erase_every {EVERY}"] = ErasureLoss(words, categories, 0.2, 0.1, 0.2, every=EVERY)
    for mode, mode_stop in (("--lrp_cider_tune", stop), ("--cider_tune", None)):
        losses[mode] = SCST(words, reward, T, stop=mode_stop)
        losses[mode].check = lambda *_: None     # random weights: the advantage is not meaningful
    optimizer, scaler = make_optimizer(model, device, 1e-12), torch.amp.GradScaler(device.type, enabled=False)

    def step(loss, captions, count=1):
        model.train()
        batch = {"images": features, "captions": captions}
        return lambda: [train_step(Loss(model, loss), [(WHOLE._replace(step=i), batch)], 0, optimizer, scaler, device,
                                   0.1, args.amp) for i in range(count)]
    functions = {mode: step(loss, references if "cider" in mode else references[:, :1])
                 for mode, loss in losses.items()}
    functions |= {f"{mode}, {count} captions": step(losses[mode], references[:, :count])
                  for mode in ("--erase_tune", "--ce_tune") for count in CAPTIONS}
    return functions | {f"{mode}, {count} captions, {EVERY} steps": step(losses[mode], references[:, :count], EVERY)
                        for mode in (f"--erase_every {EVERY}", "--ce_tune") for count in CAPTIONS}


def reward_functions(reward, samples, references):
    """{name: function}: CIDEr-D of samples (B, 2, T) by this repository, and by pycocoevalcap on the same captions."""
    def text(ids):
        return " ".join(str(i) for i in ids if i)
    functions = {f"CIDEr-D of {samples.shape[0] * 2} captions": lambda: reward(samples, references[..., 1:])}
    results = {i: [text(ids)] for i, ids in enumerate(samples.flatten(0, 1).tolist())}
    truths = {i: [text(ids) for ids in references[i // 2, :, 1:].tolist()] for i in results}
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        print(f"pycocoevalcap is skipped: {error}")
        return functions
    return functions | {"pycocoevalcap": lambda: Cider().compute_score(truths, results)}


def main(args):
    device, size = pick_device(args.device), sizes(args)
    words = vocabulary(size.V)
    train = random_captions((2000, REFERENCES), words, T)
    with tempfile.TemporaryDirectory() as folder:
        write_frequencies(Path(folder) / "frequencies.hdf5", train.numpy(), size.V)
        reward = CiderD(Path(folder) / "frequencies.hdf5", size.V)
    references, rows, notes = train[:B], [], []
    rewards = reward_functions(reward, train[B:2 * B, :2, 1:], references)
    for name in MODELS:
        functions = steps(name, args, size, device, words, references, reward)
        for tuned, plain in (("--lrp_tune", "--ce_tune"), ("--lrp_tune without stop words", "--ce_tune"),
                             ("--lrp_cider_tune", "--cider_tune"),
                             *((f"--erase_tune, {n} captions", f"--ce_tune, {n} captions") for n in CAPTIONS),
                             *((f"--erase_every {EVERY}, {n} captions, {EVERY} steps",
                                f"--ce_tune, {n} captions, {EVERY} steps") for n in CAPTIONS)):
            rows += compare({f"{name}, {tuned}": functions[tuned], plain: functions[plain]}, args.repeats, device)
        rows += compare({"the reward alone": next(iter(rewards.values())), f"{name}, --cider_tune":
                         functions["--cider_tune"]}, args.repeats, device)
        notes.append(f"{name}: {profile(functions['--lrp_tune without stop words'], device)}")
    rows += compare(rewards, args.repeats, device)
    write("finetune", args, device, [Table(
        f"A step of {B} images; half of the predicted words are stop words unless stated otherwise", COMPARISON, rows,
        f"`--lrp_tune` without stop words, time by operation: {'; '.join(notes)}. The loss of p̃ needs all V logits "
        "of each word that is not a stop word, hence a second product with W_o, and two for its derivative.")])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
