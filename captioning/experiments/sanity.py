"""Sanity checks for explanations (Adebayo et al. 2018): another model must get another explanation."""
import copy
from dataclasses import replace

import torch
from torch import nn

from captioning.experiments.batch import Batch
from captioning.experiments.tpfp import average_ranks


def sanity(batch, rows, steps):
    """Spearman's rank correlation of a word's map with its map after the model's layers, from the output down to the
    encoder's first convolution, have been randomised one after the other, each staying so (cascading randomisation). A
    method that explains the model falls to 0, one that is 1 to the end does not look at it. For object words, t ≥ 1.

    rows, steps (n,) -> {(method, measure): (n,)}; the measures are the layers' names, numbered in this order.
    """
    model, found = copy.deepcopy(batch.study.model), {}
    before = {method: batch.maps(method, rows, steps) for method in batch.study.methods}
    generator = torch.Generator().manual_seed(batch.study.seed)
    for number, (name, layer) in enumerate(layers_from_the_top(model), start=1):
        randomise(layer, generator)
        other = Batch(replace(batch.study, model=model), batch.indices, batch.names, batch.images, batch.words,
                      batch.references, batch.only)
        found |= {(method, f"{number:02d}_{name}"): rank_correlation(before[method], other.maps(method, rows, steps))
                  for method in batch.study.methods}
    return found


def layers_from_the_top(model):
    """[(name, module)] of all weights: the decoder's layers, the last defined first, then the encoder's convolutions
    (with their batch-norm) or residual blocks, the last first."""
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
    """Draws each weight tensor anew, in place, from a normal distribution with its own mean and standard deviation."""
    with torch.no_grad():
        for weight in layer.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + weight.std(correction=0) * noise)


def rank_correlation(a, b):
    """a, b (n, S, S) -> Spearman's correlation (n,), equal values sharing their rank; 0 where a map is constant."""
    a, b = (average_ranks(maps.flatten(1).cpu().double()) for maps in (a, b))
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in (a, b))
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(1) / scale.clamp(min=1e-300), 0)
