"""The interval of a difference of CHAIR_i on Flickr8k."""
import numpy as np
import pytest

from studies.flickr8k import flickr8k


def test_interval_contains_the_difference_unless_there_is_none():
    rng = np.random.default_rng(1)
    words = np.ones((1, 2000, 1), int)
    rare, frequent = (np.concatenate([words, rng.random((1, 2000, 1)) < share], 2)
                      for share in (0.1, 0.3))
    low, high = flickr8k.interval(rare, frequent)
    assert low < flickr8k.chair(rare) - flickr8k.chair(frequent) < high < -0.1
    expected = 2 * 1.96 * (0.1 * 0.9 + 0.3 * 0.7) ** 0.5 / 2000 ** 0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    assert tuple(flickr8k.interval(rare, rare)) == (0, 0)
