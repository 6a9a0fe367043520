"""Time of LRP-inference fine-tuning compared with plain fine-tuning, and of its reward: python benchmarks/finetune.py

d = e = 512, V = 9586, 64 images with one caption of 20 words, stored features of 196 × 512, random weights. The
alternatives run in turn in one process; each time is the median over --repeats after one warm-up run.
"""
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.explain import MODELS, measure, report
from captioning.cli import Parser, add_device, positive_int
from captioning.data.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.explanation.lrp_inference import lrp_loss
from captioning.training.loop import make_optimizer, train_step
from captioning.training.losses import teacher_forced_loss
from captioning.training.parts import WHOLE, Loss
from captioning.training.reward import CiderD, write_frequencies
from captioning.training.scst import SCST

V, B, T, K, C, REFERENCES = 9586, 64, 20, 196, 512, 5
STOP_SHARE = 0.5        # of the predicted words; in COCO's captions 51 % of the words are stop words or <end>


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--repeats", type=positive_int, default=5, help="timed runs of each alternative")
    add("--amp", action="store_true", help="mixed precision")
    add_device(parser)
    return parser


def vocabulary():
    """A Vocabulary of V words."""
    words = [f"w{i}" for i in range(1, V - 3)]
    return Vocabulary({word: i for i, word in enumerate([PAD, *words, UNK, START, END])})


def sample_captions(count, words, generator):
    """Random captions (count, REFERENCES, T + 1), ids from <start> to <end>; word frequencies follow Zipf's law."""
    weights = [1 / i for i in range(1, V - 3)]
    ids = generator.choices(range(1, V - 3), weights, k=count * REFERENCES * (T - 1))
    ids = torch.tensor(ids).view(count, REFERENCES, T - 1)
    return torch.cat([torch.full_like(ids[..., :1], words.start), ids, torch.full_like(ids[..., :1], words.end)], -1)


def steps(name, args, device, words, references, reward):
    """{mode: function that runs one training step} of a new model."""
    torch.manual_seed(0)
    model = MODELS[name](V, encoder=None, feature_dim=C).to(device)
    model.encoder = torch.nn.Sequential()       # the images are features already, without a mask
    model.encode = lambda images: images
    features = torch.rand(B, K, C).to(device)
    with torch.no_grad():
        predicted = model(features, references[:, 0].to(device)).argmax(-1).flatten().tolist()
    frequent = sorted(set(predicted), key=predicted.count, reverse=True)
    stop, stop_count = torch.zeros(V, dtype=torch.bool, device=device), 0
    for word in frequent:
        if stop_count + predicted.count(word) <= STOP_SHARE * len(predicted):
            stop[word], stop_count = True, stop_count + predicted.count(word)
    no_stop_words = torch.zeros_like(stop)
    losses = {
        "lrp_tune": partial(lrp_loss, stop=stop), "lrp_tune without stop words": partial(lrp_loss, stop=no_stop_words),
        "ce_tune": None}
    losses = {mode: teacher_forced_loss(words, criterion) for mode, criterion in losses.items()}
    for mode, mode_stop in (("lrp_cider_tune", stop), ("cider_tune", None)):
        losses[mode] = SCST(words, reward, T, stop=mode_stop)
        losses[mode].check = lambda *_: None     # random weights: the advantage is not meaningful
    optimizer, scaler = make_optimizer(model, device, 1e-12), torch.amp.GradScaler(device.type, enabled=False)

    def step(loss, captions):
        model.train()
        parts = [(WHOLE, {"images": features, "captions": captions})]
        return lambda: train_step(Loss(model, loss), parts, 0, optimizer, scaler, device, 0.1, args.amp)
    print(f"{name}: {stop_count / len(predicted):.0%} of the predicted words are stop words")
    return {mode: step(loss, references if "cider" in mode else references[:, :1]) for mode, loss in losses.items()}


def reward_functions(reward, samples, references):
    """{name: function}: CIDEr-D of samples (B, 2, T) by this repository, and by pycocoevalcap on the same captions."""
    functions = {"CiderD of this repository": lambda: reward(samples, references[..., 1:])}
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        print(f"pycocoevalcap is skipped: {error}")
        return functions

    def text(ids):
        return " ".join(str(i) for i in ids if i)
    results = {i: [text(ids)] for i, ids in enumerate(samples.flatten(0, 1).tolist())}
    truths = {i: [text(ids) for ids in references[i // 2, :, 1:].tolist()] for i in results}
    return functions | {"pycocoevalcap's Cider().compute_score": lambda: Cider().compute_score(truths, results)}


def main(args):
    device = pick_device(args.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__} on {device.type}, {hardware}; V = {V}, {B} captions of {T} words, "
          f"amp {args.amp}")
    words, generator = vocabulary(), random.Random(0)
    train = sample_captions(2000, words, generator)
    with tempfile.TemporaryDirectory() as folder:
        write_frequencies(Path(folder) / "frequencies.hdf5", train.numpy(), V)
        reward = CiderD(Path(folder) / "frequencies.hdf5", V)
    references = train[:B]
    seconds = measure(reward_functions(reward, train[B:2 * B, :2, 1:], references), args.repeats, device)
    report("CIDEr-D of 128 captions, 5 references each", seconds, dict.fromkeys(seconds, "0.05"))
    reward_seconds = seconds["CiderD of this repository"]
    started = time.perf_counter()
    for name, target in (("gridtd", "1.25"), ("aoa", "1.15")):
        seconds = measure(steps(name, args, device, words, references, reward), args.repeats, device)
        for tuned, plain, limit in (("lrp_tune", "ce_tune", target), ("lrp_tune without stop words", "ce_tune", "none"),
                                    ("lrp_cider_tune", "cider_tune", "1.25")):
            report(f"{name}, a step of", {tuned: seconds[tuned], plain: seconds[plain]}, {plain: limit})
        print(f"    the reward takes {reward_seconds / seconds['cider_tune']:.1%} of a cider_tune step (target 5%)")
    print(f"{time.perf_counter() - started:.0f} s in total")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
