"""Time and memory of explanations compared with plain autograd, zennit and captum: python benchmarks/explain.py

VGG16 at 224×224, d = e = 512, V = 9586, random weights, a caption of 10 words. The alternatives run in turn in one
process; each time is the median over --repeats after one warm-up run. Zennit and captum are compared if installed.
"""
import multiprocessing
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from aoamodel import AOAModel
from captioning.cli import Parser, add_device, positive_int
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.explanation import attribution, encoders
from captioning.explanation.rules import LRP
from gridTDmodel import GridTDModel

MODELS = {"gridtd": GridTDModel, "aoa": AOAModel}
V, T = 9586, 10


def get_args_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch_sizes", type=positive_int, nargs="+", default=[1, 8], help="images per batch")
    add("--repeats", type=positive_int, default=3, help="timed runs of each alternative")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure")
    add("--image_size", type=positive_int, default=224, help="side of the images in pixels")
    add_device(parser)
    return parser


def measure(functions, repeats, device):
    """{name: median seconds} of functions {name: function without arguments}, which run in turn."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def report(title, seconds, targets):
    """Prints the times, and the ratio of the first to each of the others beside its target {name: target}."""
    first, *others = seconds
    print(f"{title}\n    {first}: {seconds[first]:.3f} s")
    for name in others:
        print(f"    {name}: {seconds[name]:.3f} s, ratio {seconds[first] / seconds[name]:.2f} (target {targets[name]})")
    sys.stdout.flush()


def build(name, device, encoder="vgg16", **options):
    torch.manual_seed(0)
    return MODELS[name](V, encoder=encoder, **options).to(device).eval()


def captions(B, device, words=T):
    return torch.randint(1, V, (B, words + 1), generator=torch.Generator().manual_seed(1)).to(device)


def whole(args, device):
    """Pixel maps of all words: LRP compared with autograd, with one forward pass in all or one per word."""
    for name in MODELS:
        model = build(name, device)
        for B in args.batch_sizes:
            images, ids = torch.randn(B, 3, args.image_size, args.image_size, device=device), captions(B, device)

            def logits(images=images, model=model, ids=ids):
                pixels = images.clone().requires_grad_()
                return pixels, model(pixels, ids).gather(2, ids[:, 1:, None]).sum((0, 2))      # (T,)

            def one_forward(images=images, logits=logits):
                pixels, targets = logits(images)
                return [torch.autograd.grad(target, pixels, retain_graph=True)[0] for target in targets]

            def channels_last(one_forward=one_forward, images=images):
                return one_forward(images.contiguous(memory_format=torch.channels_last))

            def repeated_forward(logits=logits):
                return [torch.autograd.grad(targets[t], pixels)[0]
                        for t in range(T) for pixels, targets in (logits(),)]

            functions = {f"model.lrp, {T} words": lambda model=model, images=images, ids=ids: model.lrp(images, ids),
                         f"autograd, 1 forward and {T} backward passes": one_forward,
                         "the same in the memory format channels_last, which model.lrp uses on CPUs": channels_last,
                         f"autograd, {T} forward and backward passes": repeated_forward}
            model.requires_grad_(False)
            seconds = measure(functions, args.repeats, device)
            report(f"{name}, batch {B}, decoder and encoder", seconds,
                   dict(zip(functions, (None, "1.15", "none", "0.65"), strict=True)))


def decoder(args, device):
    """Relevance of all words at the encoder's output compared with one forward and one backward pass of training."""
    K = (args.image_size // 16) ** 2
    for name in MODELS:
        model = build(name, device, encoder=None, feature_dim=512)
        for B in args.batch_sizes:
            features, ids = torch.rand(B, K, 512, device=device), captions(B, device)

            def training(model=model, features=features, ids=ids):
                loss = torch.nn.functional.cross_entropy(model(features, ids).flatten(0, 1), ids[:, 1:].flatten())
                return torch.autograd.grad(loss, list(model.parameters()))

            functions = {f"model.lrp, {T} words": lambda model=model, features=features, ids=ids: model.lrp(features,
                                                                                                           ids),
                         "one forward and backward pass of training": training}
            seconds = measure(functions, args.repeats, device)
            report(f"{name}, batch {B}, decoder alone", seconds, {"one forward and backward pass of training": "2"})


def encoder(args, device):
    """Pixel relevance of ten linear functions of VGG16's features compared with zennit and captum."""
    torch.manual_seed(0)
    layers = encoders.architecture("vgg16").to(device).eval().requires_grad_(False)
    for B in args.batch_sizes:
        images = torch.randn(B, 3, args.image_size, args.image_size, device=device)
        shape = layers(images).shape
        weights = torch.randn(T, *shape[1:], device=device)                                    # (T, C, h, w)
        functions = {f"this repository, {T} targets":
                     lambda images=images, weights=weights: encoder_relevance(layers, images, weights)}
        for name, library in (("zennit's EpsilonPlus", zennit), ("captum's LRP, alpha 1 beta 0", captum)):
            try:
                functions[name] = library(layers, images, weights)
            except ImportError as error:
                print(f"{name} is skipped: {error}")
        report(f"vgg16, batch {B}, encoder alone", measure(functions, args.repeats, device),
               {"zennit's EpsilonPlus": "0.25", "captum's LRP, alpha 1 beta 0": "1"})


def encoder_relevance(layers, images, weights):
    """Pixel relevance for each of `weights` (T, C, h, w), the relevance at the encoder's output by its features."""
    pixels = attribution.fast_format(images).clone().requires_grad_()
    features, _ = encoders.run(layers, pixels, LRP())
    r = weights[:, None].expand(-1, *features.shape)
    return attribution.through_encoder(features, pixels, r, None)


def zennit(layers, images, weights):
    """The same by zennit, as a function without arguments."""
    from zennit.composites import EpsilonPlus

    def run():
        pixels = images.clone().requires_grad_()
        with EpsilonPlus().context(layers) as modified:
            features = modified(pixels)
            return [torch.autograd.grad(features, pixels, weight * features.detach(), retain_graph=True)[0]
                    for weight in weights]
    return run


def captum(layers, images, weights):
    """The same by captum, as a function without arguments."""
    from captum import attr
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule

    head = torch.nn.Conv2d(weights.shape[1], T, weights.shape[2:], bias=False, device=images.device)
    head.weight.data = weights
    model = torch.nn.Sequential(*layers, head)

    def run():
        maps = []
        for t in range(T):
            for layer in layers:        # captum removes the rules after use
                if isinstance(layer, torch.nn.Conv2d):
                    layer.rule = Alpha1_Beta0_Rule()
            maps.append(attr.LRP(model).attribute(images.clone().requires_grad_(), target=(t, 0, 0)))
        return maps
    return run


def memory(args, device):
    """Peak memory by number of words, for one image; each number is measured in a new process."""
    largest = 64 * args.image_size ** 2 * 4 / 2 ** 20
    for name in MODELS:
        for chunk in (None, 100):
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peaks = {words: pool.apply(peak, (name, args.image_size, words, chunk, str(device)))
                         for words in (5, 10, 20)}
            growth = (peaks[20] - peaks[10]) / 10
            setting = "default --chunk" if chunk is None else "all words at once"
            numbers = ", ".join(f"{mib:.0f} MiB for {words} words" for words, mib in peaks.items())
            print(f"{name}, {setting}: peak of {numbers}; {growth:.1f} MiB per word, {growth / largest:.1f} times the "
                  f"largest feature map ({largest:.1f} MiB)", flush=True)


def peak(name, size, words, chunk, device):
    """Peak memory of one explanation in MiB, without the model."""
    device = torch.device(device)
    model, images, ids = build(name, device), torch.randn(1, 3, size, size, device=device), captions(1, device, words)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model.lrp(images, ids, chunk=chunk)
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
    before = resident()
    model.lrp(images, ids, chunk=chunk)
    return resident() - before


def resident():
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():         # on Linux getrusage includes the parent process's peak
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2 ** 10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


PARTS = {"whole": whole, "decoder": decoder, "encoder": encoder, "memory": memory}


def main(args):
    device = pick_device(args.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__} on {device.type}, {hardware}; VGG16 at {args.image_size}, V = {V}, {T} words")
    for part in args.parts:
        PARTS[part](args, device)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
