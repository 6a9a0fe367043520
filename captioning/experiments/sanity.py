"""Sanity checks (Adebayo et al. 2018): an explanation must change when the model's weights do."""
import copy
import warnings
from dataclasses import replace

import torch
from torch import nn

from captioning.experiments.experiment import Experiment, Part, curves
from captioning.report import plots


def sanity(batch, rows, steps):
    """Rank correlation of a word's map with its map after randomisation of the model's layers.

    Layers are randomised one after the other, from the output to the encoder's first convolution,
    and remain so: the correlation of a method that depends on the weights decreases to 0. Measures:
    the layers' names, numbered in this order."""
    study = batch.study
    model = copy.deepcopy(study.model)
    values = {}
    original = {method: batch.maps(method, rows, steps) for method in study.methods}
    generator = torch.Generator().manual_seed(study.seed)
    for number, (name, layer) in enumerate(layers_from_the_top(model), start=1):
        randomise(layer, generator)
        randomised = replace(batch, study=replace(study, model=model))
        for method in study.methods:
            maps = randomised.maps(method, rows, steps)
            values[method, f"{number:02d}_{name}"] = rank_correlation(original[method], maps)
    return values


def layers_from_the_top(model):
    """[(name, module)] of all weights: the decoder's layers in reverse order of definition, then
    the encoder's convolutions (with their batch-norm) or residual blocks in reverse order."""
    def has_weights(layer):
        return next(layer.parameters(), None) is not None

    decoder = [(name, layer) for name, layer in model.named_children()
               if name != "encoder" and has_weights(layer)]
    stages = []
    for layer in filter(has_weights, model.encoder):
        if isinstance(layer, nn.BatchNorm2d):
            stages[-1].append(layer)
        else:
            stages.append(nn.ModuleList([layer]))
    encoder = [(f"conv{number}", stage) for number, stage in enumerate(stages, start=1)]
    return decoder[::-1] + encoder[::-1]


def randomise(layer, generator):
    """Resamples each weight, in place, from a normal distribution with its mean and deviation."""
    with torch.no_grad():
        for weight in layer.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + weight.std(correction=0) * noise)


def rank_correlation(a, b):
    """a, b (n, H, W) -> (n,): Spearman's rank correlation; 0 where a map is constant."""
    from scipy.stats import ConstantInputWarning, spearmanr  # slow to import
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        correlation = [spearmanr(x, y).statistic for x, y in zip(
            a.flatten(1).cpu().numpy(), b.flatten(1).cpu().numpy(), strict=True)]
    return torch.tensor(correlation, dtype=torch.double).nan_to_num(0)


def draw(path, table, values):
    """Rank correlation with the original map over the randomised layers."""
    layers = sorted(set(table.index.get_level_values("measure")))
    panels = {"cascading randomisation of the weights": curves(table, layers)}
    plots.draw_curves(path, panels,
                      [layer.split("_", 1)[1] for layer in layers],
                      "randomised down to this layer", "rank correlation with the original map")


SANITY = Experiment((Part(lambda batch: batch.later_object_words, sanity),), draw)
