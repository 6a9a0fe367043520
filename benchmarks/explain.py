"""Time and memory of explanations against autograd, zennit and captum: python benchmarks/explain.py

VGG16 at 224×224, d = e = 512, V = 9586, random weights, a caption of 10 words. Memory on Linux."""
import ctypes
import multiprocessing
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measure
from captioning.explanation import attribution, encoders
from captioning.explanation.rules import LRP

T = 10


def inputs(B, size, device):
    """Images (B, 3, S, S) and captions (B, T + 1)."""
    captions = measure.random_captions((B,), measure.vocabulary(size.V), T).to(device)
    return torch.randn(B, 3, size.image, size.image, device=device), captions


def build_whole(name, size, device):
    encoder = "vgg16" if size == measure.Sizes() else "small"
    return measure.build(name, size, device, encoder).eval().requires_grad_(False)


def gradients(model, images, ids, words):
    """The gradients of the logits of some words by autograd."""
    pixels = images.clone().requires_grad_()
    targets = model(pixels, ids).gather(2, ids[:, 1:, None]).sum((0, 2))                   # (T,)
    for t in words:
        torch.autograd.grad(targets[t], pixels, retain_graph=len(words) > 1)


def one_word_after_the_other(model, images, ids):
    for t in range(T):
        gradients(model, images, ids, [t])


def whole(args, size, device):
    """Pixel maps of all words: LRP against autograd, one forward pass in all or one per word."""
    rows = []
    for name in measure.MODELS:
        model = build_whole(name, size, device)
        images, ids = inputs(1, size, device)
        images = attribution.fast_format(images)
        rows += measure.compare({
            f"LRP, {name}": partial(model.lrp, images, ids),
            f"autograd, 1 forward and {T} backward passes":
            partial(gradients, model, images, ids, range(T)),
            f"autograd, {T} forward and backward passes":
            partial(one_word_after_the_other, model, images, ids)}, args.repeats, device)
    return measure.Table(f"LRP of a caption of {T} words, to the pixels", measure.COMPARISON, rows)


def training(model, features, ids):
    loss = F.cross_entropy(model(features, ids).flatten(0, 1), ids[:, 1:].flatten())
    torch.autograd.grad(loss, list(model.parameters()))


def decoder(args, size, device):
    """Relevance at the encoder's output against one forward and one backward pass of training."""
    rows = []
    for name in measure.MODELS:
        model = measure.build(name, size, device).eval()
        for B in (1, 8):
            features = torch.rand(B, size.K, size.C, device=device)
            _, ids = inputs(B, size, device)
            rows += measure.compare({
                f"LRP, {name}, batch {B}": partial(model.lrp, features, ids),
                "one forward and backward pass of training":
                partial(training, model, features, ids)}, args.repeats, device)
    return measure.Table(f"LRP of a caption of {T} words, decoder alone", measure.COMPARISON, rows)


def encoder(args, size, device):
    """Pixel relevance of ten linear functions of VGG16's features against zennit and captum."""
    torch.manual_seed(0)
    layers = encoders.architecture("vgg16").to(device).eval().requires_grad_(False)
    images, _ = inputs(1, size, device)
    weights = torch.randn(T, *layers(images).shape[1:], device=device)                # (T, C, h, w)

    def ours():
        pixels = attribution.fast_format(images).clone().requires_grad_()
        with LRP():
            features = layers(pixels)
        attribution.through_encoder(features, pixels, weights[:, None], None)

    def zennit():
        from zennit.composites import EpsilonPlus
        pixels = images.clone().requires_grad_()
        with EpsilonPlus().context(layers) as modified:
            features = modified(pixels)
            for weight in weights:
                relevance = weight * features.detach()
                torch.autograd.grad(features, pixels, relevance, retain_graph=True)

    def captum():
        from captum import attr
        from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule
        head = torch.nn.Conv2d(weights.shape[1], T, weights.shape[2:], bias=False, device=device)
        head.weight.data = weights
        model = torch.nn.Sequential(*layers, head)
        for t in range(T):
            for layer in layers:        # captum removes the rules after use
                if isinstance(layer, torch.nn.Conv2d):
                    layer.rule = Alpha1_Beta0_Rule()
            attr.LRP(model).attribute(images.clone().requires_grad_(), target=(t, 0, 0))

    functions = {f"LRP, {T} targets": ours, "zennit's EpsilonPlus": zennit,
                 "captum's LRP, α1β0": captum}
    rows = measure.compare(functions, args.repeats, device)
    return measure.Table("LRP through VGG16 alone", measure.COMPARISON, rows)


def memory(args, size, device):
    """Peak memory of LRP for one image, each number of a new process."""
    rows = []
    for chunk, name in ((1, "one word at a time (default on CPUs)"),
                        (100, "all words at once (default on GPUs)")):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rows.append([name, pool.apply(peak, (size, chunk, str(device)))])
    return measure.Table("Peak memory of LRP in MiB, gridtd, one image",
                         ["`--chunk`", f"{T} words"], rows)


def peak(size, chunk, device):
    """Peak memory of one explanation in MiB, without the model."""
    model = build_whole("gridtd", size, torch.device(device))
    images, ids = inputs(1, size, device)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model.lrp(images, ids, chunk=chunk)
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20

    # building the model needed more for a moment: forget that
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_of_process()
    model.lrp(images, ids, chunk=chunk)
    return peak_of_process() - before


def peak_of_process():
    """The largest memory of this process since the last reset, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 10


PARTS = {"whole": whole, "decoder": decoder, "encoder": encoder, "memory": memory}
FLAGS = {"--parts": {"nargs": "+", "choices": list(PARTS), "default": list(PARTS),
                     "help": "parts to measure"}}


def tables(args, size, device):
    return [PARTS[part](args, size, device) for part in args.parts]


if __name__ == "__main__":
    measure.run("explain", __doc__, tables, repeats=2, flags=FLAGS)
