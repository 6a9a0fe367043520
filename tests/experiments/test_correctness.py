"""The share of relevance inside an object's box, against a literal loop."""
import pytest
import torch
from helpers import literal_of_regions

from captioning.experiments.correctness import (
    THRESHOLDS,
    box_share,
    overlaps,
    share_inside,
    share_of_regions,
)

WHOLE = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])


def literal(heat, boxes, tau):
    """The best box's share of one map (H, W); boxes of one category as fractions of the image."""
    H, W = heat.shape
    maximum = max(max(0.0, float(value)) for value in heat.flatten())
    best = 0.0
    for x0, y0, x1, y1 in boxes.tolist():
        inside = total = 0.0
        for row in range(H):
            for column in range(W):
                value = max(0.0, float(heat[row, column])) / maximum
                if value <= tau:
                    continue
                total += value
                if x0 <= (column + 0.5) / W < x1 and y0 <= (row + 0.5) / H < y1:
                    inside += value
        best = max(best, inside / total)
    return best


def test_share_inside_equals_a_literal_loop():
    assert pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) == THRESHOLDS
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 9, 12, generator=generator, dtype=torch.float64)
    boxes = [torch.tensor([[0.1, 0.1, 0.6, 0.5]]),
             torch.tensor([[0, 0, 0.3, 1], [0.5, 0.2, 1, 0.9]]),
             torch.tensor([[0.4, 0.4, 0.9, 0.9], [0, 0, 0.1, 0.1], [0, 0, 1, 0.5]])]
    padded = torch.nn.utils.rnn.pad_sequence(
        boxes, batch_first=True, padding_value=float("nan")).double()
    before = maps.clone()
    shares = share_inside(maps, padded)
    for i in range(3):
        expected = [literal(maps[i], boxes[i], tau) for tau in THRESHOLDS]
        assert shares[i].tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.allclose(share_inside(maps[i:i + 1], padded[i:i + 1]), shares[i])
    assert torch.equal(maps, before)
    assert box_share(padded).tolist() == pytest.approx([0.2, 0.35, 0.5])


def test_constant_maps():
    """A positive constant scores the area of the largest box, others score zero."""
    boxes = torch.tensor([[[0.0, 0.0, 0.25, 0.5], [0.5, 0.0, 1.0, 1.0]]])
    shares = share_inside(torch.ones(1, 8, 8), boxes)
    assert shares[0, :9].tolist() == pytest.approx([0.5] * 9) and box_share(boxes).item() == 0.5
    maps = torch.stack([torch.zeros(5, 5), -torch.ones(5, 5)])
    assert torch.equal(share_inside(maps, WHOLE.expand(2, 1, 4)), torch.zeros(2, 10))


def test_a_box_beyond_the_image_covers_at_most_the_whole_image():
    assert box_share(torch.tensor([[[-0.5, -0.5, 2.0, 2.0]]])).item() == 1


# -- regions -----------------------------------------------------------------------------------


def test_share_of_regions_equals_a_literal_loop():
    generator = torch.Generator().manual_seed(0)

    def random_boxes(n):
        corners = torch.rand(5, n, 2, 2, generator=generator, dtype=torch.float64)
        return corners.sort(2).values.flatten(2)
    regions = random_boxes(20)
    relevance = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    relevance[1, 14:] = 0       # padding
    regions[1, 14:] = 0
    boxes = random_boxes(2)
    boxes[2, 1] = torch.nan
    shares = share_of_regions(relevance, overlaps(regions, boxes))
    for i in range(5):
        own = boxes[i, :1 if i == 2 else 2]
        expected = [literal_of_regions(relevance[i], regions[i], own, tau) for tau in THRESHOLDS]
        assert shares[i].tolist() == pytest.approx(expected, abs=1e-12)
    assert len(shares.unique()) > 15 and not overlaps(regions, boxes)[2, 1].any()


def test_regions_without_relevance_or_area_score_zero():
    point = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]])
    assert overlaps(point, WHOLE).tolist() == [[[0, 1]]]
    assert not share_of_regions(-torch.ones(1, 2), overlaps(point, WHOLE)).any()
