"""The share of relevance inside an object's box, against a literal loop."""
import pytest
import torch
from helpers import literal_of_regions

from aoamodel import AOAModel
from captioning.experiments.correctness import (
    THRESHOLDS,
    box_share,
    overlaps,
    share_inside,
    share_of_regions,
    word_boxes,
)
from captioning.explanation.methods import pixel_maps
from gridTDmodel import GridTDModel


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


def test_thresholds():
    assert pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) == THRESHOLDS


def test_share_inside_equals_a_literal_loop():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 9, 12, generator=generator, dtype=torch.float64)
    boxes = [torch.tensor([[0.1, 0.1, 0.6, 0.5]]), torch.tensor([[0, 0, 0.3, 1], [0.5, 0.2, 1, 0.9]]),
             torch.tensor([[0.4, 0.4, 0.9, 0.9], [0, 0, 0.1, 0.1], [0, 0, 1, 0.5]])]
    padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True, padding_value=float("nan")).double()
    before = maps.clone()
    shares, areas = share_inside(maps, padded), box_share(padded)
    for i in range(3):
        for j, tau in enumerate(THRESHOLDS):
            assert shares[i, j].item() == pytest.approx(literal(maps[i], boxes[i], tau), abs=1e-12)
    assert torch.equal(maps, before)
    assert areas.tolist() == pytest.approx([0.2, 0.35, 0.5])


def test_words_are_independent_of_each_other():
    maps = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]).expand(4, 1, 4)
    batched = share_inside(maps, boxes)
    assert torch.allclose(batched, torch.cat([share_inside(maps[i:i + 1], boxes[:1]) for i in range(4)]))


def test_every_box_is_scored_on_the_unmodified_map():
    heat = torch.zeros(1, 10, 10)
    heat[0, :, :5], heat[0, :, 5:] = 1.0, 0.4
    left, right = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
    left_share = share_inside(heat, torch.tensor([[left]]))
    right_share = share_inside(heat, torch.tensor([[right]]))
    best_share = share_inside(heat, torch.tensor([[left, right]]))
    assert torch.equal(best_share, torch.maximum(left_share, right_share))
    assert right_share[0, 0] == pytest.approx(2 / 7)


def test_a_constant_map_scores_the_area_of_the_largest_box():
    boxes = torch.tensor([[[0.0, 0.0, 0.25, 0.5], [0.5, 0.0, 1.0, 1.0]]])
    shares, area = share_inside(torch.ones(1, 8, 8), boxes), box_share(boxes)
    assert shares[0, :9].tolist() == pytest.approx([0.5] * 9) and area.item() == 0.5


def test_maps_without_positive_relevance_score_zero():
    shares = share_inside(torch.stack([torch.zeros(5, 5), -torch.ones(5, 5)]), torch.tensor([[[0.0, 0, 1, 1]]] * 2))
    assert torch.equal(shares, torch.zeros(2, 10))


def test_a_box_beyond_the_image_covers_at_most_the_whole_image():
    assert box_share(torch.tensor([[[-0.5, -0.5, 2.0, 2.0]]])).item() == 1


def test_word_boxes_are_fractions_of_the_image():
    entry = {"categories": {"dog": 18}, "bbox": {"18": [[20, 10, 100, 50], [0, 0, 200, 100]]}, "shape": [200, 100]}
    expected = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]])
    assert torch.allclose(word_boxes(entry, "dog"), expected)


@pytest.mark.parametrize("model_class, options", [(GridTDModel, {"attention_dim": 4}), (AOAModel, {"num_head": 2})])
def test_maps_have_the_size_of_the_image(model_class, options):
    torch.manual_seed(0)
    model = model_class(7, embed_dim=4, hidden_dim=4, encoder="small", **options).eval()
    images, captions = torch.randn(2, 3, 112, 112), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]])
    for method in ("lrp", "grad_cam", "attention"):
        maps = pixel_maps(getattr(model, method)(images, captions), method, (112, 112))
        assert maps.shape == (2, 3, 112, 112) and maps.isfinite().all()
        assert maps[0].any() and not maps[1, 2].any()                   # padding is zero
        assert method == "lrp" or (maps >= 0).all()


# -- regions -------------------------------------------------------------------------------------------------------

def test_share_of_regions_equals_a_literal_loop():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(5, 20, 2, 2, generator=generator, dtype=torch.float64).sort(2).values.flatten(2)
    relevance = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    relevance[1, 14:], corners[1, 14:] = 0, 0                           # padding
    boxes = torch.rand(5, 2, 2, 2, generator=generator, dtype=torch.float64).sort(2).values.flatten(2)
    boxes[2, 1] = torch.nan
    shares = share_of_regions(relevance, overlaps(corners, boxes))
    for i in range(5):
        for j, tau in enumerate(THRESHOLDS):
            expected = literal_of_regions(relevance[i], corners[i], boxes[i, :1 if i == 2 else 2], tau)
            assert shares[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert len(shares.unique()) > 15 and not overlaps(corners, boxes)[2, 1].any()


def test_regions_and_the_pixels_that_they_cover_have_the_same_share():
    """The share inside the box is the same if each region's relevance is distributed evenly over its pixels."""
    regions = torch.tensor([[[0, 0, 4, 6], [3, 2, 9, 8], [5, 5, 10, 10]]]).double() / 10
    relevance = torch.tensor([[3.0, 1.0, 2.0]]).double()
    box = torch.tensor([[[0.2, 0.1, 0.7, 0.9]]]).double()
    heat = torch.zeros(1, 10, 10).double()
    for (x0, y0, x1, y1), value in zip((regions[0] * 10).int().tolist(), relevance[0], strict=True):
        heat[0, y0:y1, x0:x1] += value / ((x1 - x0) * (y1 - y0))
    expected = share_inside(heat, box)[:, 0]
    torch.testing.assert_close(share_of_regions(relevance, overlaps(regions, box))[:, 0], expected)


def test_regions_without_relevance_or_area_score_zero():
    box = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    point = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]])
    assert overlaps(point, box).tolist() == [[[0, 1]]]
    assert not share_of_regions(-torch.ones(1, 2), overlaps(point, box)).any()
