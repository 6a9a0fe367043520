"""The explanation methods by name, and their results as one map per word."""
from torch.nn import functional as F

from captioning.errors import InputError

METHODS = ("lrp", "lrp_specific", "gradient", "grad_cam", "guided_backprop", "guided_grad_cam", "attention")
LRP_METHODS = ("lrp", "lrp_specific")
NON_NEGATIVE = ("attention", "grad_cam")        # methods whose maps have no negative values
WITHOUT_WORDS = ("attention",)                  # methods that assign nothing to the words read
PIXELS_ONLY = ("grad_cam", "guided_grad_cam")   # methods that are defined by maps of pixels
SPLIT = ("image", "start", "previous", "rest")  # the summands into which LRP splits the explained logit


def pixel_maps(explanation, method, size):
    """(B, T, H, W) of any method: pixels summed over channels; attention (mean over heads) upsampled to `size`."""
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
    applicable = [method for method in methods if method not in PIXELS_ONLY]
    if not applicable:
        raise InputError(f"{weight} uses region features, which have no pixel maps: choose other --methods than "
                         f"{' and '.join(methods)}, for example lrp")
    if len(applicable) < len(methods):
        report_omitted([method for method in methods if method in PIXELS_ONLY], weight)
    return applicable


def report_omitted(names, weight):
    """Prints one sentence on the methods or experiments that region features do not permit."""
    print(f"{weight} uses region features, which have no pixel maps: {', '.join(names)} omitted")
