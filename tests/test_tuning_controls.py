"""Controls of fine-tuning: masks as evidence, other images, predictions as confident as p̃."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import MODELS, make, random_regions, refused, run_training, train_run

from aoamodel import AOAModel
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.vocabulary import build
from captioning.decoding import image_seeds
from captioning.explanation import lrp_inference
from captioning.metrics.object_words import load_objects
from captioning.training.erasure import Choice
from captioning.training.losses import LRPInferenceLoss, cross_entropy, word_rows
from studies.hallucination import tuning_controls as controls

WORDS = build([["stuvwxyz"]], 1)
CAPTIONS = torch.tensor([[[1, 3, 7, 5, 6, 2], [1, 5, 8, 4, 2, 0]],
                         [[1, 3, 7, 4, 2, 0], [1, 3, 7, 4, 2, 0]],
                         [[1, 7, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0]]])


def choice_of(categories, index=None, seed=0):
    index = torch.arange(len(categories)) if index is None else torch.tensor(index)
    return Choice(None, None, categories, image_seeds(index.tolist(), seed), index)


def erasure(control):
    return control(WORDS, categories=torch.full((len(WORDS),), -1), weight=1.0, keep_weight=0.0,
                   share=0.3)


def test_mask_coverage_equals_literal_loops(demo_data, monkeypatch):
    """The share of each of 4×4 regions that an object covers, flipped with the image."""
    data = CaptionDataset(demo_data, "demo", "train", image_size=64, augment=True)
    objects = load_objects(demo_data, "demo", {})
    names = sorted(set(objects.words.values()))
    boxes = load_boxes(Path(demo_data, "demo", "boxes_demo.json"))
    settings = SimpleNamespace(control="mask", mode="erase_tune", data_folder=demo_data,
                               dataset="demo", synonyms=None)
    monkeypatch.setattr(controls, "make_original_loss", lambda *_: erasure(controls.ErasureLoss))
    loss = controls.make_loss(settings, None, data.vocabulary, data, torch.device("cpu"))
    index = list(range(8))
    categories = [names.index(sorted(boxes[data.names[i]]["categories"])[0]) for i in index]
    chosen = choice_of(torch.tensor([[category, -1] for category in categories]), index)
    got = loss.relevance(None, torch.zeros(8, 16, 3), chosen)[:, 0]

    captions = data.captions[index].long()
    augmented = data.read_images(index, captions)
    data.augment = False
    plain = data.read_images(index, captions)
    flips = 0
    for b, i in enumerate(index):
        difference = (augmented[b] - plain[b]).abs().mean()
        is_flipped = (augmented[b] - plain[b].flip(-1)).abs().mean() < difference
        flips += int(is_flipped)
        mask = loss.masks.mask(i, names[categories[b]], loss.masks.pixels.shape[1:]).float()
        mask = mask.flip(-1) if is_flipped else mask
        expected = mask.unflatten(0, (4, -1)).unflatten(2, (4, -1)).mean((1, 3)).flatten()
        torch.testing.assert_close(got[b], expected)
        assert got[b].any()
    assert 0 < flips < 8


def test_the_other_image_does_not_name_the_object():
    categories = torch.tensor([[1, 2], [2, -1], [3, 1], [1, -1]])
    features = torch.arange(4.0)[:, None, None].expand(4, 6, 3)
    swap = erasure(controls.ImageSwap)
    drawn = [swap.erase(None, features, choice_of(categories, seed=seed))[:, 0, 0]
             for seed in range(50)]
    assert [{int(x) for x in column} for column in torch.stack(drawn).T] == [
        {1}, {2, 3}, {0, 1, 3}, {1}]
    categories[1, 1] = 1            # all captions name the object of the first and the last image
    swapped = swap.erase(None, features, choice_of(categories))
    assert swapped[0, 0, 0] == 0 and swapped[3, 0, 0] == 3


@MODELS
def test_no_image_is_no_padding(model_type):
    blank = erasure(controls.NoImage).erase(None, random_regions(), None)
    assert (blank != 0).all() and (blank < 1e-30).all()
    assert make(model_type)(blank, CAPTIONS[:, 0]).isfinite().all()


@pytest.mark.parametrize("control", [controls.Temperature, controls.Permuted])
def test_lrp_inference_controls(control, monkeypatch):
    """Stop words alone leave CE(p, y) twice; permuted ω are those of p̃ if the order is kept."""
    model = make(AOAModel)
    trace = model.teacher_force(random_regions(), CAPTIONS)
    every = torch.ones(12).bool()
    loss = control(WORDS, stop=every, weight=0.5)
    only_stop_words = loss.word_loss(model, trace, CAPTIONS)[0]
    torch.testing.assert_close(only_stop_words,
                               1.5 * cross_entropy(model, trace.hidden, CAPTIONS)[0])
    loss.stop = ~every
    p_tilde = LRPInferenceLoss(WORDS, stop=~every, weight=0.5)
    weighted = p_tilde.word_loss(model, trace, CAPTIONS)[0]
    value = loss.word_loss(model, trace, CAPTIONS)[0]
    assert abs(value - only_stop_words) > 1e-2 and abs(value - weighted) > 1e-2
    if control is controls.Permuted:
        monkeypatch.setattr(torch, "rand_like", lambda x: torch.arange(x.shape[-1]).expand_as(x))
        torch.testing.assert_close(loss.word_loss(model, trace, CAPTIONS)[0], weighted)


def test_temperature_and_dropout(monkeypatch):
    """Words that LRP-inference weights have the mean confidence of p̃; stop words, and all words if
    all are stop words, keep their logits, with the same dropout."""
    model = make(AOAModel, seed=2)
    stop = torch.arange(12) == 6
    logits = []
    trace = model.teacher_force(random_regions(), CAPTIONS)
    word_loss = controls.word_loss
    monkeypatch.setattr(controls, "word_loss", lambda z, *a: logits.append(z) or word_loss(z, *a))
    controls.Temperature(WORDS, stop=stop, weight=0.5).word_loss(model, trace, CAPTIONS)
    plain, changed = logits
    words = plain.argmax(-1)
    rows = word_rows(CAPTIONS)
    c_hat, h = (x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h))
    weighted = lrp_inference.weighted_hidden(model, c_hat, h, words, stop)
    is_weighted = ~stop[words] & (CAPTIONS[..., 1:].flatten()[rows] != 0)
    assert is_weighted.any() and not is_weighted.all()
    torch.testing.assert_close(controls.confidence(changed[is_weighted]),
                               controls.confidence(model.W_o(weighted[is_weighted])),
                               rtol=1e-4, atol=0)
    torch.testing.assert_close(changed[~is_weighted], plain[~is_weighted])
    model.train().dropout.p = 0.5
    for control in (controls.Temperature, controls.Permuted):
        logits.clear()
        control(WORDS, stop=torch.ones(12).bool(), weight=0.5).word_loss(model, trace, CAPTIONS)
        torch.testing.assert_close(*logits)


def test_controls_train(demo_data, tmp_path, monkeypatch):
    base = tmp_path / "base"
    train_run(demo_data, base, "--epochs", "1")
    monkeypatch.setattr(controls.finetune, "make_loss", controls.make_loss)
    script = SimpleNamespace(get_args_parser=controls.get_args_parser, main=controls.finetune.main)
    for control, mode in (("mask", "erase_tune"), ("image_swap", "erase_tune"),
                          ("temperature", "lrp_tune")):
        folder = tmp_path / control
        arguments = ["--weight", f"{base}/checkpoint_last.pth", "--epochs", "1", "--workers", "0",
                     "--device", "cpu", "--save_path", str(folder), "--control", control]
        content = run_training(script, [*arguments, f"--{mode}"], folder)
        assert content["training"]["flags"]["control"] == control
    with refused("--control temperature is a control of --lrp_tune"):
        script.main(script.get_args_parser().parse_args([*arguments, "--ce_tune"]))
