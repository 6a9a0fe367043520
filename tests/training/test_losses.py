"""Losses of given captions, against their equations; scheduled sampling."""
import math

import pytest
import torch
from helpers import MODELS, make, make_batch, vocabulary_of

from captioning.training.losses import CrossEntropy, mix_in_predictions, region_loss, word_loss
from gridTDmodel import GridTDModel

WORDS = vocabulary_of("abcde")
CAPTIONS = torch.tensor([[[7, 1, 2, 8]], [[7, 3, 8, 0]]])
LONG = torch.tensor([[[7, 1, 2, 3, 4, 8]]]).expand(64, 1, -1)


def gridtd():
    return GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()


def value(loss, model, features, captions, epoch=0):
    """The loss of one batch in one pass."""
    batch = make_batch(captions, epoch=epoch)
    return loss(model, features, batch, loss.counts(batch))[0]


def mixed(model, captions, probability):
    features = torch.rand(len(captions), 4, 3)
    seeds = make_batch(captions)["seeds"]
    return mix_in_predictions(model, features, captions, probability, WORDS, seeds)


def test_word_loss_ignores_padding():
    logits = torch.randn(6, 7, requires_grad=True)
    loss, _, words = word_loss(logits, torch.tensor([1, 2, 6, 3, 6, 0]))
    p = logits.log_softmax(-1)
    assert words == 5
    torch.testing.assert_close(loss, -(p[0, 1] + p[1, 2] + p[2, 6] + p[3, 3] + p[4, 6]))


@MODELS
def test_region_loss_equals_its_equation(model_type):
    model, vocabulary = make(model_type), vocabulary_of("abcdefgh")
    features = torch.rand(2, 4, 7, dtype=torch.float64)
    texts = [[["a", "b"], ["b", "d"]], [["c"], ["c", "c"]]]
    captions = torch.zeros(2, 2, 5, dtype=torch.long)
    for b, image in enumerate(texts):
        for n, words in enumerate(image):
            ids = vocabulary.encode(words, 3)
            captions[b, n, :len(ids)] = torch.tensor(ids)
    expected, predicted, words = 0.0, 0, 0
    for b, image in enumerate(texts):
        regions = [model.region_logits(features)[b, k] for k in range(4)]
        for word in "abcdefgh":
            index = vocabulary.wordmap[word]
            p = max(1 / (1 + math.exp(-logits[index].item())) for logits in regions)
            is_present = any(word in caption for caption in image)
            expected -= math.log(p if is_present else 1 - p)
            predicted, words = predicted + (is_present and p > 0.5), words + is_present
    padded = torch.cat([features, torch.zeros(2, 1, 7)], 1)       # padding regions predict nothing
    loss, *counts = region_loss(model, padded, captions, vocabulary)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [int(count) for count in counts] == [predicted, words]


def test_region_logits_are_those_of_the_region_alone():
    """gridtd: with the attention on one region, the sentinel gate closed and h2 zero."""
    model, features = gridtd(), torch.rand(1, 4, 3)
    v = model.start(features).v
    torch.testing.assert_close(model.region_logits(features), model.output(v))


def test_the_epoch_selects_the_loss():
    """The region loss alone in the first epochs, then the criterion plus the weighted region loss,
    each divided by its own number of words."""
    model, features = gridtd(), torch.rand(2, 4, 3)
    loss = CrossEntropy(WORDS, region_weight=0.5, region_epochs=2)
    regions, _, distinct = region_loss(model, features, CAPTIONS, WORDS)
    logits = model.output(model.teacher_force(features, CAPTIONS).hidden)
    summed, _, words = word_loss(logits.flatten(0, -2), CAPTIONS[..., 1:].flatten())
    assert (distinct, words) == (3, 5)
    assert value(loss, model, features, CAPTIONS, epoch=1) == regions / 3
    torch.testing.assert_close(value(loss, model, features, CAPTIONS, epoch=2),
                               summed / 5 + 0.5 * regions / 3)


def test_scheduled_sampling_keeps_start_end_and_padding():
    captions = torch.cat([LONG, torch.zeros(64, 1, 2, dtype=torch.long)], -1)
    inputs = mixed(gridtd(), captions, 0.5)
    assert inputs.shape == captions.shape
    assert torch.equal(inputs[..., 0], captions[..., 0])
    assert torch.equal(inputs[..., 5:], captions[..., 5:])     # <end> and padding are not replaced
    changed = (inputs != captions)[..., 1:5].float().mean().item()
    assert 0.3 < changed < 0.55                 # half of them, except for those sampled correctly
    assert torch.equal(mixed(gridtd(), captions, 0.0), captions)


def test_scheduled_sampling_never_samples_padding_start_or_unknown():
    model, special = gridtd(), [WORDS.pad, WORDS.start, WORDS.unk]
    with torch.no_grad():
        model.W_o.bias[special] = 10.0
    inputs = mixed(model, LONG, 1.0)[..., 1:5]
    assert not torch.isin(inputs, torch.tensor(special)).any() and inputs.unique().numel() > 3
    # and the mask of these words does not reach the loss
    loss = CrossEntropy(WORDS, ss_prob=1.0)
    assert value(loss, model, torch.rand(1, 4, 3), LONG[:1]).isfinite()


def test_scheduled_sampling_follows_the_prediction():
    """Every word has the frequency that the model predicts for it."""
    model, captions = gridtd(), LONG[:1].expand(4000, 1, -1)
    features = torch.rand(1, 4, 3).expand(4000, -1, -1)
    inputs = mix_in_predictions(model, features, captions, 1.0, WORDS,
                                make_batch(captions)["seeds"])
    logits = model.output(model.teacher_force(features[:1], captions[:1]).hidden)[0, 0]
    logits[:, [WORDS.pad, WORDS.start, WORDS.unk]] = -torch.inf
    for t, p in enumerate(logits.softmax(-1)[:4]):
        counts = inputs[:, 0, t + 1].bincount(minlength=9) / 4000
        assert (counts - p).abs().max() < 4 * 0.5 / 4000 ** 0.5


def test_scheduled_sampling_continues_if_weights_are_not_finite():
    """The training loop reports such a step up to nine steps later."""
    model = gridtd()
    with torch.no_grad():
        model.W_o.bias[1] = torch.nan
    mixed(model, CAPTIONS, 0.5)


def test_label_smoothing():
    """The target is a mixture of the reference word and the uniform distribution over all words."""
    logits, captions = torch.randn(2, 3, 9), CAPTIONS[:, 0]
    log_p = logits.log_softmax(-1)
    words = [(b, t, captions[b, t + 1]) for b in range(2) for t in range(3) if captions[b, t + 1]]
    expected = -sum(0.9 * log_p[b, t, w] + 0.1 * log_p[b, t].mean() for b, t, w in words)
    targets = captions[:, 1:].flatten()
    loss = word_loss(logits.flatten(0, -2), targets, label_smoothing=0.1)[0]
    torch.testing.assert_close(loss, expected)
    model, features = gridtd(), torch.rand(2, 4, 3)
    logits = model.output(model.teacher_force(features, CAPTIONS).hidden)
    expected = word_loss(logits.flatten(0, -2), targets, 0.1)[0] / 5
    loss = CrossEntropy(WORDS, label_smoothing=0.1)
    torch.testing.assert_close(value(loss, model, features, CAPTIONS), expected)
