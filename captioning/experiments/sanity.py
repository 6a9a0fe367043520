"""Sanity checks of explanations (Adebayo et al. 2018): an explanation must change when the model's weights change."""
import copy
from dataclasses import replace

import torch
from torch import nn

from captioning.experiments.batch import Batch
from captioning.experiments.tpfp import average_ranks


def sanity(batch, rows, steps):
    """Spearman's rank correlation of a word's map with its map after randomisation of the model's layers.

    Layers are randomised one after the other, from the output to the encoder's first convolution, and remain so
    (cascading randomisation). The correlation of a method that depends on the model decreases to 0; a method whose
    correlation remains 1 does not depend on the weights. For object words at steps t ≥ 1.

    rows, steps (n,) -> {(method, measure): (n,)}; the measures are the layers' names, numbered in this order.
    """
    model, values = copy.deepcopy(batch.study.model), {}
    original = {method: batch.maps(method, rows, steps) for method in batch.study.methods}
    generator = torch.Generator().manual_seed(batch.study.seed)
    for number, (name, layer) in enumerate(layers_from_the_top(model), start=1):
        randomise(layer, generator)
        randomised = Batch(replace(batch.study, model=model), batch.indices, batch.names, batch.images, batch.words,
                           batch.references, batch.only)
        values |= {(method, f"{number:02d}_{name}"):
                   rank_correlation(original[method], randomised.maps(method, rows, steps))
                   for method in batch.study.methods}
    return values


def layers_from_the_top(model):
    """[(name, module)] of all weights: the decoder's layers in reverse order of definition, then the encoder's
    convolutions (with their batch-norm) or residual blocks in reverse order."""
    decoder = [(name, layer) for name, layer in model.named_children() if name != "encoder" and _has_weights(layer)]
    stages = []
    for layer in model.encoder:
        if isinstance(layer, nn.BatchNorm2d):
            stages[-1].append(layer)
        elif _has_weights(layer):
            stages.append(nn.ModuleList([layer]))
    return decoder[::-1] + [(f"conv{i}", stages[i - 1]) for i in range(len(stages), 0, -1)]


def _has_weights(layer):
    return next(layer.parameters(), None) is not None


def randomise(layer, generator):
    """Resamples each weight tensor, in place, from a normal distribution with its mean and standard deviation."""
    with torch.no_grad():
        for weight in layer.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + weight.std(correction=0) * noise)


def rank_correlation(a, b):
    """a, b (n, H, W) -> (n,): Spearman's rank correlation, ties with their average rank; 0 where a map is constant."""
    a, b = (average_ranks(maps.flatten(1).cpu().double()) for maps in (a, b))
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in (a, b))
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(1) / scale.clamp(min=1e-300), 0)
