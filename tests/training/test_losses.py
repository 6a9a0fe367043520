"""Losses of given captions, against their equations; scheduled sampling."""
import math

import pytest
import torch

from aoamodel import AOAModel
from captioning.data.vocabulary import Vocabulary, build
from captioning.training.losses import mix_in_predictions, region_loss, teacher_forced_loss, word_loss
from gridTDmodel import GridTDModel

WORDS = Vocabulary({word: i for i, word in enumerate(["<pad>", *"abcde", "<unk>", "<start>", "<end>"])})


def test_word_loss_ignores_padding():
    logits = torch.randn(6, 7, requires_grad=True)
    loss, _, words = word_loss(logits, torch.tensor([1, 2, 6, 3, 6, 0]))
    p = logits.log_softmax(-1)
    expected = -(p[0, 1] + p[1, 2] + p[2, 6] + p[3, 3] + p[4, 6]) / 5
    assert words == 5
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("model_class", [GridTDModel, AOAModel])
def test_region_loss_equals_its_equation(model_class):
    vocabulary = build([["a", "b", "c", "d"]], 1)
    options = {"attention_dim": 5} if model_class is GridTDModel else {"num_head": 2}
    model = model_class(len(vocabulary), embed_dim=4, hidden_dim=6, encoder=None, feature_dim=3, **options).double()
    features = torch.rand(2, 4, 3, dtype=torch.float64)
    texts = [[["a", "b"], ["b", "d"]], [["c"], ["c", "c"]]]
    captions = torch.zeros(2, 2, 5, dtype=torch.long)
    for b, image in enumerate(texts):
        for n, words in enumerate(image):
            ids = vocabulary.encode(words, 3)
            captions[b, n, :len(ids)] = torch.tensor(ids)
    expected, predicted, words = 0.0, 0, 0
    for b, image in enumerate(texts):
        regions = [model.region_logits(features)[b, k] for k in range(4)]
        for word in "abcd":
            p = max(1 / (1 + math.exp(-logits[vocabulary.wordmap[word]].item())) for logits in regions)
            is_present = any(word in caption for caption in image)
            expected -= math.log(p if is_present else 1 - p)
            predicted, words = predicted + (is_present and p > 0.5), words + is_present
    padded = torch.cat([features, torch.zeros(2, 1, 3)], 1)       # padding regions predict nothing
    loss, *counts = region_loss(model, padded, captions, vocabulary)
    assert loss.item() == pytest.approx(expected / words, rel=1e-5)
    assert [int(count) for count in counts] == [predicted, words]


def test_region_logits_are_those_of_the_region_alone():
    """gridtd: W_o of ĉ + h2 if the attention is on one region only, the sentinel gate closed and h2 zero."""
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()
    features = torch.rand(1, 4, 3)
    v = model.start(features).v
    torch.testing.assert_close(model.region_logits(features), model.output(v))


def test_the_epoch_selects_the_loss():
    """The region loss alone in the first epochs, then the criterion plus the weighted region loss."""
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()
    features, captions = torch.rand(2, 4, 3), torch.tensor([[[7, 1, 2, 8]], [[7, 3, 8, 0]]])
    loss_function = teacher_forced_loss(WORDS, region_weight=0.5, region_epochs=2)
    regions = region_loss(model, features, captions, WORDS)[0]
    logits = model.output(model.teacher_force(features, captions).hidden)
    words = word_loss(logits.flatten(0, -2), captions[..., 1:].flatten())[0]
    assert loss_function(model, features, captions, 1)[0] == regions
    torch.testing.assert_close(loss_function(model, features, captions, 2)[0], words + 0.5 * regions)


def test_scheduled_sampling_keeps_start_end_and_padding():
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3)
    captions = torch.tensor([[[7, 1, 2, 3, 4, 8, 0, 0]]]).expand(64, 1, -1)
    features = torch.rand(64, 4, 3)
    torch.manual_seed(0)
    inputs = mix_in_predictions(model, features, captions, 0.5, WORDS)
    assert inputs.shape == captions.shape
    assert torch.equal(inputs[..., 0], captions[..., 0])
    assert torch.equal(inputs[..., 5:], captions[..., 5:])         # <end> and padding are never replaced
    changed = (inputs != captions)[..., 1:5].float().mean().item()
    assert 0.3 < changed < 0.55                                    # half of them, except for those sampled correctly
    assert torch.equal(mix_in_predictions(model, features, captions, 0.0, WORDS), captions)


def test_scheduled_sampling_never_samples_padding_start_or_unknown():
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3)
    with torch.no_grad():
        model.W_o.bias[[WORDS.pad, WORDS.start, WORDS.unk]] = 10.0
    captions = torch.tensor([[[7, 1, 2, 3, 4, 8]]]).expand(64, 1, -1)
    inputs = mix_in_predictions(model, torch.rand(64, 4, 3), captions, 1.0, WORDS)[..., 1:5]
    assert not torch.isin(inputs, torch.tensor([WORDS.pad, WORDS.start, WORDS.unk])).any()
    assert inputs.unique().numel() > 3


def test_scheduled_sampling_mask_does_not_reach_the_loss():
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()
    captions = torch.tensor([[[7, 1, 2, 3, 4, 8]]])
    loss, *_ = teacher_forced_loss(WORDS, ss_prob=1.0)(model, torch.rand(1, 4, 3), captions, 0)
    assert loss.isfinite()


def test_scheduled_sampling_draws_like_torch_multinomial(monkeypatch):
    """Without the mask: the same words, from the same random numbers."""
    monkeypatch.setattr("captioning.training.losses.without_special", lambda logits, vocabulary: logits)
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()
    features, captions = torch.rand(64, 4, 3), torch.tensor([[[7, 1, 2, 3, 4, 8]]]).expand(64, 1, -1)
    torch.manual_seed(0)
    inputs = mix_in_predictions(model, features, captions, 1.0, WORDS)
    torch.manual_seed(0)
    logits = model.output(model.teacher_force(features, captions).hidden)
    sampled = torch.distributions.Categorical(logits=logits).sample()
    assert torch.equal(inputs[..., 1:5], sampled[..., :4])


def test_scheduled_sampling_continues_if_weights_are_not_finite():
    """The training loop reports such a step up to nine steps later."""
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3)
    with torch.no_grad():
        model.W_o.bias[1] = torch.nan
    mix_in_predictions(model, torch.rand(2, 4, 3), torch.tensor([[[7, 1, 2, 8]]] * 2), 0.5, WORDS)


def test_label_smoothing():
    """The target distribution is a mixture of the reference word and the uniform distribution over all words."""
    logits, captions = torch.randn(2, 3, 9), torch.tensor([[7, 1, 2, 8], [7, 3, 8, 0]])
    log_p = logits.log_softmax(-1)
    words = [(b, t, captions[b, t + 1]) for b in range(2) for t in range(3) if captions[b, t + 1]]
    expected = -sum(0.9 * log_p[b, t, w] + 0.1 * log_p[b, t].mean() for b, t, w in words) / len(words)
    loss = word_loss(logits.flatten(0, -2), captions[:, 1:].flatten(), label_smoothing=0.1)[0]
    torch.testing.assert_close(loss, expected)
    model = GridTDModel(9, 4, 6, 5, encoder=None, feature_dim=3).eval()
    features = torch.rand(2, 4, 3)
    logits = model.output(model.teacher_force(features, captions[:, None]).hidden)
    loss, *_ = teacher_forced_loss(WORDS, label_smoothing=0.1)(model, features, captions[:, None], 0)
    torch.testing.assert_close(loss, word_loss(logits.flatten(0, -2), captions[:, 1:].flatten(), 0.1)[0])
