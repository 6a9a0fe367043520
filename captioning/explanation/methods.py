"""The explanation methods by name, and their results as one map per word.

An entry of METHODS works everywhere: flags, page, PNGs and measures. To add one to the scripts,
write it into the table below, for example

    "my_lrp": Method(lambda model, *args, eps=0.01, **options: model.lrp(*args, rule=MyRule(eps),
                     **options), "LRP with a rule of mine in the convolutions.", additive=True)

In Python it can also be added from outside: METHODS["my_lrp"] = Method(…).
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch.nn import functional as F

from captioning.errors import InputError
from captioning.explanation.rules import Gamma

# the summands into which LRP splits the explained logit
SPLIT = ("image", "start", "previous", "rest")


@dataclass(frozen=True)
class Method:
    """What the rest of the code needs to know about an explanation method."""
    explain: Callable           # (model, images, captions, **options) -> attribution.Explanation
    description: str            # one sentence, shown on the page
    additive: bool = False      # a form of LRP: its parts add up to the logit; takes the option eps
    signed: bool = True         # its maps have negative values
    has_words: bool = True      # it assigns something to the words read
    needs_pixels: bool = False  # it is defined by maps of pixels, so that region features have none
    needs: str | None = None    # a method that not every model has
    # what the lowest and the highest values of its maps mean
    labels: tuple = ("negative gradient", "positive gradient")


def _own(name):
    """The method of the model that has this name."""
    return lambda model, *args, **options: getattr(model, name)(*args, **options)


def _gamma(model, *args, **options):
    return model.lrp(*args, rule=Gamma(0.25, options.get("eps", 0.01)), **options)


def _attn_gamma(model, *args, **options):
    return model.attn_lrp(*args, gamma=0.25, **options)


METHODS = {
    "lrp": Method(
        _own("lrp"),
        "Layer-wise relevance propagation: the word's logit, divided among pixels and previous "
        "words.",
        additive=True, labels=("opposes the word", "supports the word")),
    "lrp_specific": Method(
        _own("lrp_specific"),
        "LRP of the word minus the mean of LRP of the caption's other words: what is specific to "
        "the word.",
        additive=True, labels=("supports the other words more", "supports this word more")),
    "lrp_gamma": Method(
        _gamma,
        "LRP with the γ-rule in the encoder, which keeps negative evidence of convolutions.",
        additive=True, labels=("opposes the word", "supports the word")),
    "attn_lrp": Method(
        _own("attn_lrp"),
        "AttnLRP: LRP that also passes through attention weights (models of transformers).",
        additive=True, needs="attn_lrp", labels=("opposes the word", "supports the word")),
    "attn_lrp_gamma": Method(
        _attn_gamma,
        "AttnLRP with the γ-rule in the encoder (models of transformers).",
        additive=True, needs="attn_lrp", labels=("opposes the word", "supports the word")),
    "gradient": Method(
        _own("gradient"),
        "Gradient: how the logit reacts to small changes of each pixel; its sign says nothing "
        "about support."),
    "grad_cam": Method(
        _own("grad_cam"),
        "Grad-CAM: positions of the last feature map that raise the logit, at the resolution of "
        "that map.",
        signed=False, needs_pixels=True, labels=("low", "high")),
    "guided_backprop": Method(
        _own("guided_backprop"),
        "Guided backpropagation: the gradient along positive paths only; shows edges and "
        "textures.", needs="guided_backprop"),
    "guided_grad_cam": Method(
        _own("guided_grad_cam"),
        "Guided Grad-CAM: guided backpropagation, weighted with Grad-CAM.", needs_pixels=True,
        needs="guided_grad_cam"),
    "attention": Method(
        _own("attention"),
        "Attention: where the model looks when it predicts the word, not whether that supports the "
        "word.",
        signed=False, has_words=False, labels=("low", "high")),
}


def pixel_maps(explanation, method, size):
    """(B, T, H, W) of any method: pixels summed over channels, or attention upsampled to `size`."""
    if method != "attention":
        return explanation.pixels.sum(2)
    maps = _mean_over_heads(explanation.attention).unflatten(-1, explanation.grid)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def region_relevance(explanation, method):
    """(B, T, K) of any method: features summed over channels, or attention (mean over heads)."""
    if method != "attention":
        return explanation.features.sum(-1)
    return _mean_over_heads(explanation.attention)


def _mean_over_heads(attention):
    return attention.mean(2) if attention.dim() == 4 else attention


def methods_for_regions(methods, weight):
    """Those of the methods that apply to region features; names the omitted ones in one sentence.

    weight: path of the checkpoint, for messages. InputError if no method is left.
    """
    # "random", the baseline of measures, is no method
    applicable = [method for method in methods
                  if method not in METHODS or not METHODS[method].needs_pixels]
    if not applicable:
        raise InputError(f"{weight} uses region features, which have no pixel maps: choose other "
                         f"--methods than {' and '.join(methods)}, for example lrp")
    if len(applicable) < len(methods):
        report_omitted([method for method in methods if method not in applicable], weight)
    return applicable


def check_methods(model, methods, weight):
    """InputError if a method is not defined for the model. weight: its path, for the message."""
    for method in methods:
        needs = METHODS[method].needs if method in METHODS else None
        if needs and not hasattr(model, needs):
            raise InputError(f"{method} is not defined for {type(model).__name__}, the model of "
                             f"{weight}: choose other --methods, for example lrp")


def report_omitted(names, weight):
    """Prints one sentence on the methods or experiments that region features do not permit."""
    print(f"{weight} uses region features, which have no pixel maps: {', '.join(names)} omitted")
