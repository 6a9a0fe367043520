"""Correctness (docs/method.md, section 9): the share of a word's positive relevance inside its object's box."""
import torch

THRESHOLDS = [tau / 10 for tau in range(10)]


def correctness(batch, rows, steps):
    """The share of a word's positive relevance that lies inside its object's box.

    Positive relevance is divided by its maximum, values ≤ τ are set to 0, and the best box of the category counts. With
    region features, the relevance of a region is weighted by the share of its area inside the box. For object words
    whose object has a box. Baselines: method box, the largest box's share of the image; with region features also
    method even, equal relevance of all regions.

    rows, steps (n,) -> {(method, measure): (n,)}; the measures are τ: 0.0, 0.1, … 0.9.
    """
    boxes, values, overlap = batch.boxes(rows, steps), {}, None
    if batch.on_regions:
        overlap = overlaps(batch.region_boxes(rows), boxes)
        values["even", "0.0"] = share_of_regions(batch.region_is_present[rows], overlap)[:, 0]
    for method in batch.study.methods:
        maps = batch.maps(method, rows, steps)
        shares = share_inside(maps, boxes) if overlap is None else share_of_regions(maps, overlap)
        values |= {(method, str(tau)): column for tau, column in zip(THRESHOLDS, shares.T, strict=True)}
    return values | {("box", "0.0"): box_share(boxes)}


def share_inside(maps, boxes, thresholds=THRESHOLDS):
    """maps (n, H, W) of relevance, boxes (n, m, 4) -> the share of positive relevance inside the best box for every
    threshold (n, thresholds).

    Boxes are x0, y0, x1, y1 as fractions of the image's width and height, padded with NaN. Positive relevance is
    divided by its maximum, and values ≤ τ are set to 0.
    """
    n, H, W = maps.shape
    maps = maps.clamp(min=0)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    in_rows, in_columns = (part.to(maps.dtype) for part in rows_and_columns(boxes, H, W))
    shares = []
    for tau in thresholds:
        above = torch.where(maps > tau, maps, 0)
        in_box = torch.einsum("nmh,nhw,nmw->nm", in_rows, above, in_columns)
        shares.append(in_box / above.sum((1, 2)).clamp(min=torch.finfo(maps.dtype).tiny)[:, None])
    shares = torch.stack(shares, -1)                                                   # (n, m, thresholds)
    return shares.amax(1)


def box_share(boxes):
    """boxes (n, m, 4) -> (n,): the share of the image that the largest box covers."""
    return overlaps(boxes.new_tensor([[[0, 0, 1, 1]]]), boxes).amax((1, 2))


def overlaps(regions, boxes):
    """The share (n, m, K) of the area of each region (n, K, 4) that lies inside each box (n, m, 4).

    Both are x0, y0, x1, y1 as fractions of the image's width and height. The share is 0 for boxes of NaN (padding) and
    for regions without area.
    """
    regions, boxes = regions[:, None], boxes.clamp(0, 1)[:, :, None]                   # (n, 1, K, 4), (n, m, 1, 4)
    sides = torch.minimum(regions[..., 2:], boxes[..., 2:]) - torch.maximum(regions[..., :2], boxes[..., :2])
    areas = (regions[..., 2:] - regions[..., :2]).clamp(min=0).prod(-1)                # (n, 1, K)
    return (sides.clamp(min=0).prod(-1) / areas).nan_to_num(0, 0, 0)


def share_of_regions(relevance, overlap, thresholds=THRESHOLDS):
    """`share_inside` for region features: relevance (n, K), overlap (n, m, K) of regions with boxes -> the share of
    positive relevance inside the best box, for every threshold (n, thresholds)."""
    tiny = torch.finfo(relevance.dtype).tiny
    relevance = relevance.clamp(min=0)
    relevance = relevance / relevance.amax(1, keepdim=True).clamp(min=tiny)
    above = torch.where(relevance > relevance.new_tensor(thresholds)[:, None, None], relevance, 0)  # (thresholds, n, K)
    return torch.einsum("nmk,tnk->ntm", overlap, above).amax(2) / above.sum(2).T.clamp(min=tiny)


def rows_and_columns(boxes, H, W):
    """boxes (n, m, 4) -> (n, m, H) and (n, m, W) bool: the pixel rows and columns whose centres each box contains."""
    y, x = ((torch.arange(side, dtype=boxes.dtype, device=boxes.device) + 0.5) / side for side in (H, W))
    x0, y0, x1, y1 = (side[..., None] for side in boxes.unbind(-1))                    # (n, m, 1)
    return (y >= y0) & (y < y1), (x >= x0) & (x < x1)


def inside_boxes(boxes, size):
    """boxes (n, m, 4), size (H, W) -> (n, m, H, W) bool: the pixels whose centres each box contains."""
    in_rows, in_columns = rows_and_columns(boxes, *size)
    return in_rows[..., None] & in_columns[..., None, :]


def word_boxes(entry, category):
    """(m, 4): the boxes of a category as fractions of the image; entry: as in docs/method.md, section 8."""
    w, h = entry["shape"]
    boxes = torch.tensor(entry["bbox"][str(entry["categories"][category])], dtype=torch.float32)
    return boxes / torch.tensor([w, h, w, h])
