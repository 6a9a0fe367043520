"""The study of <start>: paths that carry no relevance, and regions that are removed in the order of relevance."""
import pytest
import torch
from helpers import CAPTIONS, make, random_regions

from captioning.explanation.methods import SPLIT
from gridTDmodel import GridTDModel
from studies.start_relevance import FRACTIONS, VARIANTS, Stopped, areas


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_paths(name):
    model, features = make(GridTDModel), random_regions()
    expected = model.lrp(features, CAPTIONS)
    model.__class__ = Stopped
    model.stopped, model.at_start = VARIANTS[name]
    explanation = model.lrp(features, CAPTIONS)
    assert torch.equal(explanation.logits, expected.logits)
    torch.testing.assert_close(sum(getattr(explanation, part) for part in SPLIT), expected.targets)
    assert torch.equal(explanation.features[:, 0], expected.features[:, 0]) or "LSTM2" in name     # within step 0
    assert torch.equal(explanation.features, expected.features) == (name == "LRP")
    if "after <start>" in name:
        assert not explanation.start[:, 1:].any() and explanation.start[:, 0].all()


def test_areas():
    model, features = make(GridTDModel), random_regions()
    rows, steps, relevance = torch.tensor([2, 0]), torch.tensor([0, 3]), torch.randn(2, 6, dtype=torch.float64)
    deletion, insertion = areas(model, features, CAPTIONS, rows, steps, relevance)
    for n, (b, t) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
        order = relevance[n].argsort(descending=True).tolist()
        for actual, is_deletion in ((deletion, True), (insertion, False)):
            curve = []
            for fraction in FRACTIONS:
                changed, first = features[b].clone(), order[:round(fraction * 6)]
                changed[[k for k in range(6) if (k in first) == is_deletion]] = 0
                logits = model(changed[None], CAPTIONS[b:b + 1])[0, t]
                curve.append(logits.log_softmax(0)[CAPTIONS[b, t + 1]].item())
            assert actual[n].item() == pytest.approx(sum(curve) / len(curve))
