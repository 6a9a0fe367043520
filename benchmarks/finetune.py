"""What LRP-inference fine-tuning costs beside plain fine-tuning, and its reward: python benchmarks/finetune.py

d = e = 512, V = 9586, 64 pictures with one caption of 20 words, stored features of 196 × 512, random weights. Rivals
take turns in one process; each time is the median over --repeats after one run that is not counted.
"""
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.explain import MODELS, measure, report
from captioning.cli import Parser, add_device, positive_int
from captioning.data.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.device import pick_device
from captioning.explanation.lrp_inference import lrp_loss
from captioning.training.loop import make_optimizer, train_step
from captioning.training.losses import teacher_forced_loss
from captioning.training.reward import CiderD, write_frequencies
from captioning.training.scst import SCST

V, B, T, K, C, REFERENCES = 9586, 64, 20, 196, 512, 5
STOP_SHARE = 0.5        # of predicted words; of COCO's captions 51 % are stop words or <end>


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--repeats", type=positive_int, default=5, help="runs of each rival that count")
    add("--amp", action="store_true", help="mixed precision")
    add_device(parser)
    return parser


def vocabulary():
    words = [f"w{i}" for i in range(1, V - 3)]
    return Vocabulary({word: i for i, word in enumerate([PAD, *words, UNK, START, END])})


def sentences(count, words, generator):
    """Ids (count, REFERENCES, T + 1) from <start> to <end>, words as frequent as in a language."""
    weights = [1 / i for i in range(1, V - 3)]
    drawn = generator.choices(range(1, V - 3), weights, k=count * REFERENCES * (T - 1))
    drawn = torch.tensor(drawn).view(count, REFERENCES, T - 1)
    return torch.cat([torch.full_like(drawn[..., :1], words.start), drawn, torch.full_like(drawn[..., :1], words.end)],
                     -1)


def steps(name, args, device, words, references, reward):
    """{what: function} of training steps of a new model."""
    torch.manual_seed(0)
    model = MODELS[name](V, encoder=None, feature_dim=C).to(device)
    model.encoder = torch.nn.Sequential()       # features that are there, without a mask
    model.encode = lambda images: images
    flags = SimpleNamespace(amp=args.amp, grad_clip=0.1, decoder_lr=1e-12, weight_decay=0.0, finetune_encoder=False,
                            region_epochs=0, ss_prob=0.0, region_loss=0.0)
    features = torch.rand(B, K, C).to(device)
    with torch.no_grad():
        said = model(features, references[:, 0].to(device)).argmax(-1).flatten().tolist()
    frequent = sorted(set(said), key=said.count, reverse=True)
    stop, share = torch.zeros(V, dtype=torch.bool, device=device), 0
    for word in frequent:
        if share + said.count(word) <= STOP_SHARE * len(said):
            stop[word], share = True, share + said.count(word)
    nothing = torch.zeros_like(stop)
    losses = {
        "lrp_tune": partial(lrp_loss, stop=stop), "lrp_tune without stop words": partial(lrp_loss, stop=nothing),
        "ce_tune": None}
    data = SimpleNamespace(epoch=0)
    losses = {what: teacher_forced_loss(flags, words, data, criterion) for what, criterion in losses.items()}
    for what, own in (("lrp_cider_tune", stop), ("cider_tune", None)):
        losses[what] = SCST(words, reward, T, stop=own)
        losses[what].check = lambda advantage: None     # nothing is learnt here
    optimizer, scaler = make_optimizer(flags, model, device), torch.amp.GradScaler(device.type, enabled=False)

    def step(loss, captions):
        model.train()
        return lambda: train_step(flags, model, {"images": features, "captions": captions}, loss, device, optimizer,
                                  scaler)
    print(f"{name}: {share / len(said):.0%} of the predicted words are stop words")
    return {what: step(loss, references if "cider" in what else references[:, :1]) for what, loss in losses.items()}


def reward_rivals(reward, drawn, references):
    """Ours on the ids of 2 captions a picture, pycocoevalcap on the same sentences."""
    rivals = {"reward, ours": lambda: reward(drawn, references[..., 1:])}
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        print(f"pycocoevalcap is left out: {error}")
        return rivals

    def text(ids):
        return " ".join(str(i) for i in ids if i)
    results = {i: [text(ids)] for i, ids in enumerate(drawn.flatten(0, 1).tolist())}
    truths = {i: [text(ids) for ids in references[i // 2, :, 1:].tolist()] for i in results}
    return rivals | {"pycocoevalcap's Cider().compute_score": lambda: Cider().compute_score(truths, results)}


def main(args):
    device = pick_device(args.device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__} on {device.type}, {what}; V = {V}, {B} captions of {T} words, amp {args.amp}")
    words, generator = vocabulary(), random.Random(0)
    train = sentences(2000, words, generator)
    with tempfile.TemporaryDirectory() as folder:
        write_frequencies(Path(folder) / "frequencies.hdf5", train.numpy(), V)
        reward = CiderD(Path(folder) / "frequencies.hdf5", V)
    references = train[:B]
    seconds = measure(reward_rivals(reward, train[B:2 * B, :2, 1:], references), args.repeats, device)
    report("CIDEr-D of 128 captions, 5 references each", seconds, dict.fromkeys(seconds, "0.05"))
    own = seconds["reward, ours"]
    started = time.perf_counter()
    for name, goal in (("gridtd", "1.25"), ("aoa", "1.15")):
        seconds = measure(steps(name, args, device, words, references, reward), args.repeats, device)
        for tuned, plain, limit in (("lrp_tune", "ce_tune", goal), ("lrp_tune without stop words", "ce_tune", "none"),
                                    ("lrp_cider_tune", "cider_tune", "1.25")):
            report(f"{name}, a step of", {tuned: seconds[tuned], plain: seconds[plain]}, {plain: limit})
        print(f"    the reward takes {own / seconds['cider_tune']:.1%} of a cider_tune step (goal 5%)")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
