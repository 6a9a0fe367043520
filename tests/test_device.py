"""In float32 on --device, by default the CPU, models, explanations, decoding and training steps compute what they do in
float64 on the CPU."""
import copy
from functools import partial

import pytest
import torch
from helpers import CAPTIONS, V, make, max_pooled, random_images

from aoamodel import AOAModel
from captioning.data.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.decoding import decode
from captioning.explanation.lrp_inference import lrp_loss
from captioning.explanation.methods import METHODS
from captioning.training.erasure import Choice, ErasureLoss, choose
from captioning.training.loop import make_optimizer, train_step
from captioning.training.losses import teacher_forced_loss
from captioning.training.parts import WHOLE, Loss
from captioning.training.scst import SCST
from gridTDmodel import GridTDModel

VOCABULARY = Vocabulary({word: i for i, word in enumerate([PAD, START, END, UNK, *(f"w{i}" for i in range(4, V))])})


@pytest.fixture(params=[GridTDModel, AOAModel])
def models(request, device):
    """A model in float64 on the CPU, and the same in float32 on the device."""
    model = make(request.param, max_pooled)
    return model, copy.deepcopy(model).float().to(device)


def assert_close(actual, expected):
    assert actual.dtype == torch.float32
    assert (actual.detach().cpu() - expected.detach()).abs().max() <= 1e-3 * expected.detach().abs().max()


def test_explanations(models, device):
    images = random_images()
    for method in METHODS:
        expected = getattr(models[0], method)(images, CAPTIONS)
        explanation = getattr(models[1], method)(images.to(device), CAPTIONS.to(device))
        for name in ("logits", "targets", "words", "features", "pixels", "attention"):
            if getattr(expected, name) is not None:
                assert_close(getattr(explanation, name), getattr(expected, name))


def test_decoding(models, device):
    features = models[0].encode(random_images())
    for options in ({"method": "greedy"}, {"beam_size": 3}, {"method": "diverse_beam_search", "beam_size": 2}):
        expected = decode(models[0], features, VOCABULARY, max_len=6, **options)
        tokens = decode(models[1], features.float().to(device), VOCABULARY, max_len=6, **options)
        assert tokens.device.type == device.type and torch.equal(tokens.cpu(), expected)


def test_fine_tuning(models, device):
    """Features with erased evidence, the loss of their predictions, log-probabilities of self-critical training, and
    derivatives, with models in evaluation mode."""
    categories = torch.tensor([-1, -1, -1, 0, 0, 1, 2, 1, -1, -1, -1, -1])
    features, results = models[0].encode(random_images()), []
    words = CAPTIONS.masked_fill(CAPTIONS.eq(VOCABULARY.unk), 4)[:, None]
    choice = choose(words, categories)
    for model, place in zip(models, ("cpu", device), strict=True):
        loss = ErasureLoss(VOCABULARY, categories.to(place), 0.5, 0.5, 0.5, fill="mean")
        chosen = Choice(*(part.to(place) for part in choice))
        erased = loss.erase(model, features.to(model.W_o.weight), chosen, WHOLE)
        log_p = SCST(VOCABULARY, None, 5).log_probabilities(model, erased, words[..., 1:].to(place),
                                                            model.start(erased))
        erased_loss = loss.erased_loss(model, erased, chosen, WHOLE)
        weights = [model.embedding.weight, model.W_v.weight, model.W_o.weight]
        derivatives = torch.autograd.grad(erased_loss + log_p.sum(), weights)
        results.append((erased, erased_loss, log_p, *derivatives))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected.double())


def test_training_steps(models, device):
    """Their loss, correct words, words and the gradient's norm."""
    batch = {"images": random_images(), "captions": CAPTIONS[:, None]}
    for criterion in (None, lrp_loss):
        results = []
        for model, place in zip(models, (torch.device("cpu"), device), strict=True):
            stop = torch.arange(V, device=place) < 4
            loss = teacher_forced_loss(VOCABULARY, criterion and partial(criterion, stop=stop), region_weight=0.5)
            inputs = {"images": batch["images"].to(model.W_o.weight), "captions": batch["captions"]}
            results.append(train_step(Loss(model, loss), [(WHOLE, inputs)], 0, make_optimizer(model, place, 1e-9, 1e-9),
                                      torch.amp.GradScaler(place.type, enabled=False), place, 0.1))
        assert_close(results[1].float(), results[0])
