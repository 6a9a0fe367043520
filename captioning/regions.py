"""Explanations of models on region features: relevance of regions instead of pixels, and its correctness."""
import torch

from captioning.correctness import THRESHOLDS
from captioning.errors import InputError

ON_PIXELS = ("grad_cam", "guided_grad_cam")     # methods that are maps of pixels and nothing else


def methods_of_regions(methods, weight):
    """Those of the methods that explain regions; says in one sentence which are left out. InputError if all are."""
    left_out = [method for method in methods if method in ON_PIXELS]
    if left_out:
        reason = f"{weight} works on region features, which have no pixel maps: {' and '.join(left_out)} cannot be had"
        if len(left_out) == len(methods):
            raise InputError(f"{reason}, name other --methods, lrp for one")
        print(f"{reason}, the other methods explain regions")
    return [method for method in methods if method not in ON_PIXELS]


def region_relevance(explanation, method):
    """(B, T, K) of any method but those ON_PIXELS: relevance summed over channels, or attention (mean over heads)."""
    if method != "attention":
        return explanation.features.sum(-1)
    return explanation.attention.mean(2) if explanation.attention.dim() == 4 else explanation.attention


def overlaps(regions, boxes):
    """The share (n, m, K) of each region (n, K, 4) that lies inside each box (n, m, 4); 0 for those without area.

    Both as x0, y0, x1, y1 in shares of the picture, NaN where there is no box.
    """
    regions, boxes = regions[:, None], boxes.clamp(0, 1)[:, :, None]                   # (n, 1, K, 4), (n, m, 1, 4)
    sides = (torch.minimum(regions[..., 2:], boxes[..., 2:]) - torch.maximum(regions[..., :2], boxes[..., :2])).clamp(0)
    areas = (regions[..., 2:] - regions[..., :2]).clamp(0).prod(-1)                    # (n, 1, K)
    return (sides.prod(-1) / areas).nan_to_num(0, 0, 0)


def share_inside(relevance, regions, boxes, thresholds=THRESHOLDS):
    """Correctness of regions: their relevance weighs how much of them lies inside the object's box, the best of several.

    relevance (n, K), zero for padding; regions (n, K, 4) and boxes (n, m, 4) as in `overlaps`. Positive relevance is
    divided by its maximum and values ≤ τ are left out. Returns the share for every threshold (n, thresholds).
    """
    tiny = torch.finfo(relevance.dtype).tiny
    relevance = relevance.clamp(min=0)
    relevance = relevance / relevance.amax(1, keepdim=True).clamp(min=tiny)
    kept = torch.where(relevance > relevance.new_tensor(thresholds)[:, None, None], relevance, 0)      # (τ, n, K)
    inside = torch.einsum("nmk,tnk->ntm", overlaps(regions, boxes), kept)
    return inside.amax(2) / kept.sum(2).T.clamp(min=tiny)
