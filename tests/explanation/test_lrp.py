"""Layer-wise relevance propagation of both models against literal loops over neurons (oracle.py)."""
import math

import numpy as np
import oracle
import pytest
import torch
from helpers import CAPTIONS, T, make, max_pooled, random_images, random_regions
from torch import nn

from aoamodel import AOAModel
from gridTDmodel import GridTDModel

PARTS = ("words", "features", "pixels")


def average_pooled():
    """An encoder of 8×8 pixels to 4×4 regions with strides, without bias, and with an average over padding."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.ReLU(),
                         nn.AvgPool2d(2, stride=1, padding=1), nn.Conv2d(4, 5, 2), nn.ReLU())


def overlapping():
    """An encoder of 8×8 pixels to 2×4 regions: oblong kernels, overlapping windows, pooling before the ReLU."""
    return nn.Sequential(nn.Conv2d(3, 3, (3, 5), stride=(2, 1), padding=(1, 2)), nn.MaxPool2d(3, 2, padding=1),
                         nn.ReLU(), nn.Conv2d(3, 4, 1))


def assert_agrees(model, images, captions=CAPTIONS, **options):
    """Every field of the explanation equals the oracle's -> (explanation, the oracle's dict for each image)."""
    explanation = model.lrp(images, captions, **options)
    expected = [oracle.explain(model, *item, **options) for item in zip(images, captions, strict=True)]
    caption_mask = (captions[:, 1:] != 0).numpy()
    for b, item in enumerate(expected):
        mask = caption_mask[b]
        np.testing.assert_allclose(explanation.logits[b].numpy()[mask], item["logits"][mask], atol=1e-9)
        for name in (*PARTS, "attention"):
            actual = getattr(explanation, name)
            if item[name] is None:
                assert actual is None
            else:
                assert actual[b].shape == item[name].shape
                largest = np.abs(item[name]).max()
                assert largest > 1e-4                                 # otherwise agreement would be meaningless
                np.testing.assert_allclose(actual[b].numpy(), item[name], rtol=0, atol=1e-9 * min(1, largest),
                                           err_msg=f"{name} {b}")
    return explanation, expected


def assert_same(actual, expected, tolerance=1e-12):
    """The relevance of two explanations is equal, relative to the largest of each field."""
    for name in PARTS:
        a, b = getattr(actual, name), getattr(expected, name)
        if b is None:
            assert a is None
        else:
            assert a.shape == b.shape
            assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


MODELS = pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])

# -- the oracle ----------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("encoder", [max_pooled, average_pooled, overlapping])
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_images(model_type, encoder, eps):
    assert_agrees(make(model_type, encoder, seed=1), random_images(1), eps=eps)


@MODELS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_regions(model_type, seed, eps):
    assert_agrees(make(model_type, seed=seed), random_regions(seed), eps=eps)


@pytest.mark.parametrize("seed", range(2))
def test_query_per_region(seed):
    assert_agrees(make(GridTDModel, seed=seed, query_per_region=True, attention_dim=6), random_regions(seed))


def test_query_per_region_of_images():
    assert_agrees(make(GridTDModel, max_pooled, query_per_region=True, attention_dim=16), random_images())


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_one_head(heads):
    model = make(AOAModel, num_head=heads)
    for head in range(heads):
        assert_agrees(model, random_regions(), head=head)


def test_one_head_of_images():
    assert_agrees(make(AOAModel, max_pooled, num_head=3), random_images(), head=1)


def test_first_maximum_wins():
    model = make(AOAModel, lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 5, 1), nn.ReLU()))
    images = random_images().round()                                  # many equal values
    assert_agrees(model, images)


def test_each_occurrence_of_a_word_is_explained_separately():
    captions = torch.tensor([[1, 3, 3, 3, 2]])
    explanation, _ = assert_agrees(make(GridTDModel), random_regions()[:1], captions)
    assert explanation.words[0, 3].unique().numel() == 4


@pytest.mark.parametrize(("padding", "mode"), [("same", "zeros"), ("valid", "zeros"), (1, "reflect")])
def test_paddings_of_convolutions(padding, mode):
    model = make(GridTDModel, lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=padding, padding_mode=mode), nn.ReLU()))
    captions = CAPTIONS[:1]
    explanation = model.lrp(random_images()[:1], captions)
    torch.testing.assert_close(explanation.logits, model(random_images()[:1], captions).detach())
    if mode == "zeros":
        model.encoder[0].padding = {"same": 1, "valid": 0}[padding]
        assert_same(explanation, assert_agrees(model, random_images()[:1], captions)[0])


# -- contrast ------------------------------------------------------------------------------------------------------


@MODELS
def test_contrast_explains_a_difference_of_logits(model_type):
    """A model whose rows of W_o are differences has these differences as logits, which the oracle explains."""
    model, shifted = make(model_type, max_pooled), make(model_type, max_pooled)
    for parameter in shifted.W_o.parameters():
        parameter.data -= parameter.data[8].clone()
    expected, _ = assert_agrees(shifted, random_images(), CAPTIONS)
    explanation = model.lrp(random_images(), CAPTIONS, contrast=8)
    assert_same(explanation, expected)
    torch.testing.assert_close(explanation.targets, expected.targets)
    assert_same(model.lrp(random_images(), CAPTIONS, contrast=torch.full((3, T), 8)), expected)
    for method in ("gradient", "grad_cam", "guided_backprop", "guided_grad_cam"):
        assert_same(getattr(model, method)(random_images(), CAPTIONS, contrast=8),
                    getattr(shifted, method)(random_images(), CAPTIONS))


# -- conservation --------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("encoder", [None, max_pooled])
@pytest.mark.parametrize("seed", range(3))
def test_relevance_is_conserved_without_biases_and_eps(model_type, encoder, seed):
    model = make(model_type, encoder, seed, biased=False)
    explanation = model.lrp(random_images(seed) if encoder else random_regions(seed), CAPTIONS, eps=0)
    caption_mask = CAPTIONS[:, 1:] != 0
    torch.testing.assert_close(explanation.conservation, caption_mask.double(), rtol=0, atol=1e-9)
    if encoder:
        torch.testing.assert_close(explanation.pixels.sum((2, 3, 4)), explanation.features.sum((2, 3)),
                                   rtol=0, atol=1e-9)


@MODELS
def test_biases_and_eps_absorb_what_the_oracle_computes(model_type):
    explanation, expected = assert_agrees(make(model_type), random_regions())
    for b, item in enumerate(expected):
        for t in range(int((CAPTIONS[b, 1:] != 0).sum())):
            reached = math.fsum(item["words"][t]) + math.fsum(item["features"][t].ravel())
            share = reached / item["logits"][t][CAPTIONS[b, t + 1]]
            assert explanation.conservation[b, t].item() == pytest.approx(share, abs=1e-9)
            assert abs(share - 1) > 1e-3


@MODELS
@pytest.mark.parametrize("options", [{}, {"contrast": 8}, {"steps": torch.tensor([[4, 0], [1, 3], [0, 4]])},
                                     {"head": 1}, {"eps": 0, "pixels": False}])
@pytest.mark.parametrize("encoder", [None, max_pooled])
def test_the_split_adds_up_to_the_target(model_type, encoder, options):
    if "head" in options and model_type is GridTDModel:
        pytest.skip("Ada-LSTM has no heads")
    model, images = make(model_type, encoder), random_images() if encoder else random_regions()
    explanation = model.lrp(images, CAPTIONS, **options)
    assert torch.equal(explanation.image, explanation.features.sum((2, 3)))
    assert torch.equal(explanation.start, explanation.words[..., 0])
    assert torch.equal(explanation.previous, explanation.words[..., 1:].sum(2))
    parts = explanation.image, explanation.start, explanation.previous, explanation.rest
    torch.testing.assert_close(sum(parts), explanation.targets, rtol=0, atol=1e-12)
    padding = explanation.targets == 0
    assert all(part.shape == padding.shape and part.abs().max() > 1e-3 and not part[padding].any() for part in parts)


@MODELS
def test_nothing_rests_without_biases_and_eps(model_type):
    explanation = make(model_type, biased=False).lrp(random_regions(), CAPTIONS, eps=0)
    assert explanation.rest.abs().max() < 1e-9


# -- invariances ---------------------------------------------------------------------------------------------------

CASES = pytest.mark.parametrize(("model_type", "encoder"), [(GridTDModel, max_pooled), (GridTDModel, None),
                                                            (AOAModel, max_pooled), (AOAModel, None)])


@pytest.fixture
def case(model_type, encoder):
    return make(model_type, encoder), random_images() if encoder else random_regions()


@CASES
def test_a_batch_equals_its_items(case):
    model, images = case
    whole = model.lrp(images, CAPTIONS)
    for b in range(len(images)):
        alone = model.lrp(images[b:b + 1], CAPTIONS[b:b + 1])
        for name in PARTS:
            if getattr(whole, name) is not None:
                torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[b], rtol=0, atol=1e-12)


@CASES
def test_padding_changes_nothing(case):
    model, images = case
    short, long = model.lrp(images, CAPTIONS), model.lrp(images, nn.functional.pad(CAPTIONS, (0, 3)))
    assert long.words.shape == (3, T + 3, T + 3)
    padding = nn.functional.pad(CAPTIONS, (0, 3))[:, 1:] == 0
    for name in PARTS + ("attention", "targets", "beta"):
        if getattr(long, name) is not None:
            assert not getattr(long, name)[padding].any()
    assert not long.conservation[padding].any()
    assert not long.words.triu(1).any()
    long.words, long.features = long.words[:, :T, :T], long.features[:, :T]
    long.pixels = None if long.pixels is None else long.pixels[:, :T]
    assert_same(long, short)


@MODELS
def test_padded_regions_receive_no_relevance(model_type):
    model, features = make(model_type), random_regions()
    explanation = model.lrp(features, CAPTIONS)
    padded = (features == 0).all(-1)[:, None].expand(-1, T, -1)
    assert not explanation.features[padded].any()
    shorter = model.lrp(features[1:2, :4], CAPTIONS[1:2])
    torch.testing.assert_close(explanation.features[1:2, :, :4], shorter.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(explanation.words[1:2], shorter.words, rtol=0, atol=1e-12)


def test_relevance_of_words_does_not_depend_on_the_head():
    model = make(AOAModel)
    expected = model.lrp(random_regions(), CAPTIONS)
    for head in range(2):
        single = model.lrp(random_regions(), CAPTIONS, head=head)
        torch.testing.assert_close(single.words, expected.words, rtol=0, atol=1e-12)
        assert (single.features - expected.features).abs().max() > 1e-3


@CASES
def test_single_precision(case):
    model, images = case
    exact = model.lrp(images, CAPTIONS)
    single = model.float().lrp(images.float(), CAPTIONS)
    assert single.words.dtype == single.features.dtype == torch.float32
    assert_same(single, exact, 1e-4)


@MODELS
def test_chunks(model_type):
    model = make(model_type, max_pooled)
    expected = model.lrp(random_images(), CAPTIONS)
    for chunk in (1, 2, 3, 99):
        assert_same(model.lrp(random_images(), CAPTIONS, chunk=chunk), expected)


@CASES
def test_training_mode_and_gradients_are_restored(case):
    model, images = case
    expected = model.lrp(images, CAPTIONS)
    model.train()
    model.embedding.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    assert_same(model.lrp(images, CAPTIONS), expected)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not images.requires_grad


@CASES
def test_within_no_grad(case):
    model, images = case
    expected = model.lrp(images, CAPTIONS)
    with torch.no_grad():
        assert_same(model.lrp(images, CAPTIONS), expected)
        assert not torch.is_grad_enabled()
    assert not expected.words.requires_grad and not expected.features.requires_grad


@CASES
@pytest.mark.parametrize("fused", [False, True])
def test_updated_weights_take_effect(case, fused):
    model, images = case
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=fused)
    model.lrp(images, CAPTIONS)
    model(images, CAPTIONS).square().sum().backward()
    optimizer.step()
    assert_agrees(model, images[:1], CAPTIONS[:1])
