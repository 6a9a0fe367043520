"""In float32 on --device, by default the CPU, models, explanations, decoding and training steps
compute what they do in float64 on the CPU."""
import copy

import pytest
import torch
from helpers import (
    CAPTIONS,
    MODEL_TYPES,
    OWN_METHODS,
    V,
    make,
    make_batch,
    max_pooled,
    random_images,
)

from captioning import cli
from captioning.data.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.decoding import decode, image_seeds
from captioning.explanation.methods import METHODS
from captioning.training.erasure import Choice, ErasureLoss, choose
from captioning.training.loop import make_optimizer, train_step
from captioning.training.losses import CrossEntropy, LRPInferenceLoss
from captioning.training.scst import SCST

# <start> and <end> are ids 1 and 2, as in CAPTIONS
VOCABULARY = Vocabulary({word: i for i, word in enumerate([PAD, START, END, UNK, *"abcdefgh"])})


@pytest.fixture(params=MODEL_TYPES)
def models(request, device):
    """A model in float64 on the CPU, and the same in float32 on the device."""
    model = make(request.param, max_pooled)
    return model, copy.deepcopy(model).float().to(device)


def assert_close(actual, expected):
    assert actual.dtype == torch.float32
    difference = (actual.detach().cpu() - expected.detach()).abs().max()
    assert difference <= 1e-3 * expected.detach().abs().max()


def test_explanations(models, device):
    images = random_images()
    for method in OWN_METHODS:
        expected = METHODS[method].explain(models[0], images, CAPTIONS)
        explanation = METHODS[method].explain(models[1], images.to(device), CAPTIONS.to(device))
        for name in ("logits", "targets", "words", "features", "pixels", "attention"):
            if getattr(expected, name) is not None:
                assert_close(getattr(explanation, name), getattr(expected, name))


def test_decoding(models, device):
    features = models[0].encode(random_images())
    for options in ({"method": "greedy"}, {"beam_size": 3}, {"method": "sample", "top_p": 0.9},
                    {"method": "diverse_beam_search", "beam_size": 2}):
        options["seeds"] = image_seeds(range(len(features)), 1)
        expected = decode(models[0], features, VOCABULARY, max_len=6, **options)
        tokens = decode(models[1], features.float().to(device), VOCABULARY, max_len=6, **options)
        assert tokens.device.type == device.type and torch.equal(tokens.cpu(), expected)


def test_fine_tuning(models, device):
    """Features with erased evidence, the loss of their predictions, log-probabilities of
    self-critical training, and derivatives, with models in evaluation mode."""
    categories = torch.tensor([-1, -1, -1, 0, 0, 1, 2, 1, -1, -1, -1, -1])
    features, results = models[0].encode(random_images()), []
    batch = make_batch(CAPTIONS.masked_fill(CAPTIONS.eq(VOCABULARY.unk), 4)[:, None])
    choice = choose(batch, categories)
    for model, place in zip(models, (torch.device("cpu"), device), strict=True):
        loss = ErasureLoss(VOCABULARY, categories=categories.to(place), weight=0.5,
                           keep_weight=0.5, share=0.5)
        chosen = Choice(*(x.to(place) for x in choice[:3]), *choice[3:])
        erased = loss.erase(model, features.to(model.W_o.weight), chosen)
        log_p = SCST(VOCABULARY, None, 5).log_probabilities(
            model, erased, batch["captions"][..., 1:].to(place), model.start(erased))
        erased_loss = loss.erased_loss(model, erased, chosen, loss.counts(batch))
        weights = [model.embedding.weight, model.W_v.weight, model.W_o.weight]
        derivatives = torch.autograd.grad(erased_loss + log_p.sum(), weights)
        results.append((erased, erased_loss, log_p, *derivatives))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected.double())


def test_training_steps(models, device):
    """Their loss, correct words, words and the gradient's norm."""
    for kind in (CrossEntropy, LRPInferenceLoss):
        results = []
        for model, place in zip(models, (torch.device("cpu"), device), strict=True):
            stop = {"stop": torch.arange(V, device=place) < 4} if kind is LRPInferenceLoss else {}
            loss = kind(VOCABULARY, region_weight=0.5, **stop)
            batch = make_batch(CAPTIONS[:, None], images=random_images().to(model.W_o.weight))
            optimizer = make_optimizer(model, place, 1e-9, 1e-9)
            scaler = torch.amp.GradScaler(place.type, enabled=False)
            results.append(train_step(model, loss, [batch], optimizer, scaler, place, 0.1))
        assert_close(results[1].float(), results[0])


def test_small_models_have_one_thread_and_others_the_default(monkeypatch):
    """Also a large model after a small one."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(cli, "THREADS", 7)
    for threads, size in ((None, 10), (None, cli.SMALL_MODEL), (3, 10)):
        cli.set_threads(threads, torch.nn.Linear(1, size, bias=False, device="meta"))
    assert chosen == [1, 7, 3]
