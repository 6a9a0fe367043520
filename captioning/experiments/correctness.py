"""Correctness (docs/method.md, section 9): positive relevance inside the object's box."""
import torch

from captioning.experiments.batch import Batch, positive_shares
from captioning.experiments.experiment import Experiment, Part, curves
from captioning.report import plots

THRESHOLDS = [tau / 10 for tau in range(10)]


def correctness(batch, rows, steps):
    """The share of a word's positive relevance that lies inside its object's box.

    Positive relevance is divided by its maximum, values ≤ τ are set to 0, and the best box of the
    category counts. With region features, the relevance of a region is weighted by the share of its
    area inside the box. Baselines: method box, the largest box's share of the image; with region
    features also method even, equal relevance of all regions. Measures: τ = 0.0, 0.1 … 0.9."""
    boxes = batch.boxes(rows, steps)
    values = {}
    if batch.on_regions:
        overlap = overlaps(batch.region_boxes(rows), boxes)
        is_region = (batch.images != 0).any(-1).to(batch.images.dtype)
        even = share_of_regions(is_region[rows], overlap)
        values["even", "0.0"] = even[:, 0]
    for method in batch.study.methods:
        maps = batch.maps(method, rows, steps)
        shares = share_of_regions(maps, overlap) if batch.on_regions else share_inside(maps, boxes)
        values |= {(method, str(tau)): shares[:, k] for k, tau in enumerate(THRESHOLDS)}
    values["box", "0.0"] = box_share(boxes)
    return values


def share_inside(maps, boxes):
    """Maps (n, H, W) and boxes (n, m, 4) -> the share of positive relevance inside the best box for
    every threshold, (n, thresholds).

    Boxes are x0, y0, x1, y1 as fractions of the image's width and height, padded with NaN."""
    in_rows, in_columns = rows_and_columns(boxes, *maps.shape[1:])
    in_rows = in_rows.to(maps.dtype)
    in_columns = in_columns.to(maps.dtype)
    return _shares(maps, lambda above: torch.einsum("nmh,nhw,nmw->nm", in_rows, above, in_columns))


def share_of_regions(relevance, overlap):
    """`share_inside` of region features: relevance (n, K), and the `overlaps` (n, m, K) of the
    regions with the boxes."""
    return _shares(relevance, lambda above: torch.einsum("nmk,nk->nm", overlap, above))


def _shares(relevance, inside):
    """relevance (n, …), inside(relevance) -> (n, m): its sums in each box."""
    relevance = positive_shares(relevance)
    shares = []
    for tau in THRESHOLDS:
        above = torch.where(relevance > tau, relevance, 0)
        total = above.sum(tuple(range(1, above.dim()))).clamp(min=torch.finfo(above.dtype).tiny)
        shares.append(inside(above).amax(1) / total)
    return torch.stack(shares, 1)


def box_share(boxes):
    """boxes (n, m, 4) -> (n,): the share of the image that the largest box covers."""
    return overlaps(boxes.new_tensor([[[0, 0, 1, 1]]]), boxes).amax((1, 2))


def overlaps(regions, boxes):
    """The share (n, m, K) of the area of each region (n, K, 4) that lies inside each box (n, m, 4).

    Both are fractions of the image. The share is 0 for boxes of NaN (padding) and for regions
    without area."""
    regions = regions[:, None]                      # (n, 1, K, 4)
    boxes = boxes.clamp(0, 1)[:, :, None]           # (n, m, 1, 4)
    low = torch.maximum(regions[..., :2], boxes[..., :2])
    high = torch.minimum(regions[..., 2:], boxes[..., 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    areas = (regions[..., 2:] - regions[..., :2]).clamp(min=0).prod(-1)
    return (inside / areas).nan_to_num(0, 0, 0)


def rows_and_columns(boxes, H, W):
    """boxes (n, m, 4) -> (n, m, H) and (n, m, W) bool: the rows and the columns of pixels whose
    centres each box contains."""
    y = (torch.arange(H, dtype=boxes.dtype, device=boxes.device) + 0.5) / H
    x = (torch.arange(W, dtype=boxes.dtype, device=boxes.device) + 0.5) / W
    x0, y0, x1, y1 = boxes[..., None].unbind(2)                                        # (n, m, 1)
    return (y >= y0) & (y < y1), (x >= x0) & (x < x1)


def draw(path, table, values):
    """Share of relevance inside the box over τ, and the box's share of the image."""
    panels = {"correct object words": curves(table, [str(tau) for tau in THRESHOLDS])}
    plots.draw_curves(path, panels, THRESHOLDS, "threshold τ", "share of relevance inside the box",
                      {"the box's share\nof the image": table.loc[("box", "0.0"), "mean"]})


CORRECTNESS = Experiment(
    (Part(Batch.words_with_box, correctness, needs_pixels=False),),
    draw, shown=("0.0", "0.3", "0.6", "0.9"), needs_boxes=True)
