"""Time and memory of explanations compared with plain autograd, zennit and captum: python benchmarks/explain.py

VGG16 at 224×224, d = e = 512, V = 9586, random weights, a caption of 10 words. Zennit and captum are compared if
installed.
"""
import multiprocessing
import re
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import (
    COMPARISON,
    MODELS,
    Sizes,
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
from captioning.api import explain_batch
from captioning.cli import positive_int
from captioning.device import pick_device
from captioning.errors import run_script
from captioning.explanation import attribution, encoders
from captioning.explanation.methods import METHODS
from captioning.explanation.rules import LRP

T = 10


def get_args_parser():
    parser = get_parser(__doc__, repeats=2)
    add = parser.add_argument
    add("--batch_sizes", type=positive_int, nargs="+", default=[1], help="images per batch")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure")
    return parser


def inputs(B, size, device, words=T):
    """Images (B, 3, S, S) and captions (B, words + 1)."""
    captions = random_captions((B,), vocabulary(size.V), words).to(device)
    return torch.randn(B, 3, size.image, size.image, device=device), captions


def build_whole(name, size, device):
    encoder = "vgg16" if size == Sizes() else "small"
    return build(name, size, device, encoder).eval().requires_grad_(False)


def whole(args, size, device):
    """Pixel maps of all words: LRP compared with autograd, with one forward pass in all or one per word."""
    rows, notes = [], []
    for name in MODELS:
        model = build_whole(name, size, device)
        for B in args.batch_sizes:
            images, ids = inputs(B, size, device)

            def logits(images, model=model, ids=ids):
                pixels = images.clone().requires_grad_()
                return pixels, model(pixels, ids).gather(2, ids[:, 1:, None]).sum((0, 2))      # (T,)

            def one_forward(images=images, logits=logits):
                pixels, targets = logits(images)
                return [torch.autograd.grad(target, pixels, retain_graph=True)[0] for target in targets]

            def same_format(one_forward=one_forward, images=images):
                return one_forward(attribution.fast_format(images))

            def repeated_forward(images=images, logits=logits):
                return [torch.autograd.grad(targets[t], pixels)[0]
                        for t in range(T) for pixels, targets in (logits(images),)]

            def relevance(model=model, images=images, ids=ids):
                return model.lrp(images, ids)
            rows += compare({f"LRP, {name}, batch {B}": relevance,
                             f"autograd, 1 forward and {T} backward passes, same memory format": same_format,
                             "the same, format of the images": one_forward,
                             f"autograd, {T} forward and backward passes": repeated_forward}, args.repeats, device)
        notes.append(f"{name}: {profile(relevance, device)}")
    return Table(f"LRP of a caption of {T} words, to the pixels", COMPARISON, rows,
                 f"LRP, time by operation: {'; '.join(notes)}.")


def methods(args, size, device):
    """All methods together compared with one after the other."""
    rows, words = [], vocabulary(size.V)
    for name in MODELS:
        model = build_whole(name, size, device)
        images, ids = inputs(1, size, device)

        def together(model=model, images=images, ids=ids):
            return explain_batch(model, words, images, ids, METHODS)

        def separately(model=model, images=images, ids=ids):
            return [getattr(model, method)(images, ids) for method in METHODS]
        rows += compare({f"all methods in one call, {name}": together, "one after the other": separately}, args.repeats,
                        device)
    return Table(f"The {len(METHODS)} methods of explain.py", COMPARISON, rows, "")


def decoder(args, size, device):
    """Relevance of all words at the encoder's output compared with one forward and one backward pass of training."""
    rows, notes = [], []
    for name in MODELS:
        model = build(name, size, device).eval()
        for B in (1, 8):
            features, ids = torch.rand(B, size.K, size.C, device=device), inputs(B, size, device)[1]

            def training(model=model, features=features, ids=ids):
                loss = torch.nn.functional.cross_entropy(model(features, ids).flatten(0, 1), ids[:, 1:].flatten())
                return torch.autograd.grad(loss, list(model.parameters()))

            def relevance(model=model, features=features, ids=ids):
                return model.lrp(features, ids)
            rows += compare({f"LRP, {name}, batch {B}": relevance,
                             "one forward and backward pass of training": training}, args.repeats, device)
        notes.append(f"{name}: {profile(relevance, device)}")
    return Table(f"LRP of a caption of {T} words, decoder alone", COMPARISON, rows,
                 f"LRP, time by operation: {'; '.join(notes)}.")


def encoder(args, size, device):
    """Pixel relevance of ten linear functions of VGG16's features compared with zennit and captum."""
    torch.manual_seed(0)
    layers, rows = encoders.architecture("vgg16").to(device).eval().requires_grad_(False), []
    for B in args.batch_sizes:
        images, _ = inputs(B, size, device)
        shape = layers(images).shape
        weights = torch.randn(T, *shape[1:], device=device)                                    # (T, C, h, w)

        def relevance(images=images, weights=weights):
            return encoder_relevance(layers, images, weights)
        functions = {f"LRP, batch {B}, {T} targets": relevance}
        for name, library in (("zennit's EpsilonPlus", zennit), ("captum's LRP, α1β0", captum)):
            try:
                functions[name] = library(layers, images, weights)
            except ImportError as error:
                print(f"{name} is skipped: {error}")
        rows += compare(functions, args.repeats, device)
    return Table("LRP through VGG16 alone", COMPARISON, rows, f"LRP, time by operation: {profile(relevance, device)}.")


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


def memory(args, size, device):
    """Peak memory by number of words, for one image and gridtd; each number is measured in a new process."""
    largest, rows = 64 * size.image ** 2 * 4 / 2 ** 20, []
    for chunk in (1, 100):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            few, many = (pool.apply(peak, ("gridtd", size, words, chunk, str(device))) for words in (10, 20))
        name = "one word at a time (default on CPUs)" if chunk == 1 else "all words at once (default on GPUs)"
        rows.append([name, few, many, (many - few) / 10, (many - few) / 10 / largest])
    columns = ["`--chunk`", "10 words", "20 words", "per word", "relative to the largest feature map"]
    return Table("Peak memory of LRP in MiB, one image", columns, rows, "")


def peak(name, size, words, chunk, device):
    """Peak memory of one explanation in MiB, without the model."""
    device = torch.device(device)
    model, (images, ids) = build_whole(name, size, device), inputs(1, size, device, words)
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


PARTS = {"whole": whole, "methods": methods, "decoder": decoder, "encoder": encoder, "memory": memory}


def main(args):
    device = pick_device(args.device)
    write("explain", args, device, [PARTS[part](args, sizes(args), device) for part in args.parts])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
