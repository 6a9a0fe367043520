"""Controls of fine-tuning: segmentation masks as evidence, other images, and predictions as confident as p̃."""
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make, random_regions, run_training, train_run

from aoamodel import AOAModel
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.vocabulary import build
from captioning.errors import InputError
from captioning.explanation import lrp_inference
from captioning.metrics.object_words import load_objects
from captioning.recurrence import word_rows
from captioning.training.erasure import Choice, ErasureLoss
from captioning.training.parts import WHOLE
from gridTDmodel import GridTDModel
from studies import tuning_controls as controls

CAPTIONS = torch.tensor([[[1, 3, 7, 5, 6, 2], [1, 5, 8, 4, 2, 0]], [[1, 3, 7, 4, 2, 0], [1, 3, 7, 4, 2, 0]],
                         [[1, 7, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0]]])


def test_mask_coverage_equals_literal_loops(demo_data):
    """The share of each of 4×4 regions that an object covers, flipped with the image."""
    data = CaptionDataset(demo_data, "demo", "train", image_size=64, augment=True)
    objects = load_objects(demo_data, "demo", {})
    names, boxes = sorted(set(objects.words.values())), load_boxes(Path(demo_data, "demo", "boxes_demo.json"))
    index = list(range(8))
    categories = [names.index(sorted(boxes[data.names[i]]["categories"])[0]) for i in index]
    coverage = controls.MaskCoverage(data, objects)
    got = coverage(None, torch.zeros(8, 16, 3), Choice(None, None, torch.tensor([[c, -1] for c in categories])),
                   WHOLE._replace(index=torch.tensor(index)))[:, 0]
    captions, flips = data.captions[index].long(), 0
    augmented = data.read_images(index, captions)
    data.augment = False
    plain = data.read_images(index, captions)
    for b, i in enumerate(index):
        is_flipped = (augmented[b] - plain[b].flip(-1)).abs().mean() < (augmented[b] - plain[b]).abs().mean()
        flips += int(is_flipped)
        mask = coverage.masks.mask(i, names[categories[b]], coverage.masks.pixels.shape[1:]).float()
        mask, side = mask.flip(-1) if is_flipped else mask, mask.shape[0] // 4
        expected = [mask[r * side:(r + 1) * side, c * side:(c + 1) * side].mean() for r in range(4) for c in range(4)]
        torch.testing.assert_close(got[b], torch.stack(expected))
        assert got[b].any()
    assert 0 < flips < 8


def test_the_other_image_does_not_name_the_object():
    torch.manual_seed(0)
    categories = torch.tensor([[1, 2], [2, -1], [3, 1], [1, -1]])
    features = torch.arange(4.0)[:, None, None].expand(4, 6, 3)
    seen = [{int(x) for x in column} for column in torch.stack([
        controls.image_swap(None, features, Choice(None, None, categories), WHOLE)[:, 0, 0] for _ in range(50)]).T]
    assert seen == [{1}, {2, 3}, {0, 1, 3}, {1}]
    categories[1, 1] = 1                                            # all captions name the first and the last object
    swapped = controls.image_swap(None, features, Choice(None, None, categories), WHOLE)
    assert swapped[0, 0, 0] == 0 and swapped[3, 0, 0] == 3


@pytest.mark.parametrize("model_type", [GridTDModel, AOAModel])
def test_no_image_is_no_padding(model_type):
    blank = controls.no_image(None, random_regions(), None, WHOLE)
    assert (blank != 0).all() and (blank < 1e-30).all() and make(model_type)(blank, CAPTIONS[:, 0]).isfinite().all()


def test_soft_evidence_equals_literal_loops():
    relevance = torch.randn(20, 3, 7, generator=torch.Generator().manual_seed(0))
    categories = torch.tensor([[0, 1, 2], [0, 1, 0], [0, 1, -1], [0, -1, -1]]).repeat(5, 1)
    for row, words, ids in zip(controls.soft_evidence(relevance, categories, 3), relevance, categories.tolist(),
                               strict=True):
        share = [[max(0.0, x) / max(word) for x in word] for word in words.tolist()]
        others = [word for word, category in zip(share[1:], ids[1:], strict=True) if category not in (-1, ids[0])]
        part = [x and x / (x + sum(word[k] for word in others)) for k, x in enumerate(share[0])]
        largest = sorted(range(7), key=lambda k: -part[k] * share[0][k])[:3]
        assert row.tolist() == pytest.approx([x if k in largest else 0 for k, x in enumerate(part)], abs=1e-6)


def test_other_words_must_be_predicted_from_the_erased_image():
    """Of the first caption: the second names one category, and the third no other object."""
    model, features = make(AOAModel), random_regions()
    categories = torch.tensor([-1, -1, -1, 0, 0, 1, 2, -1, -1, -1, -1, -1])
    captions = torch.tensor([[1, 3, 7, 5, 6, 2], [1, 3, 7, 4, 2, 0], [1, 7, 5, 2, 0, 0]])
    choice = Choice(captions, torch.tensor([[2, 0, 3], [0, 2, 1], [1, 0, 2]]),
                    torch.tensor([[1, 0, 2], [0, 0, -1], [1, -1, -1]]))
    loss = ErasureLoss(build(["stuvwxyz"], 1), categories, 1.0, 0.0, 0.3)
    got = controls.other_words_loss(loss.erased_loss, categories, 0.5, model, features, choice, WHOLE)
    log_p = model(features[:1], captions[:1]).log_softmax(-1)
    expected = loss.erased_loss(model, features, choice, WHOLE) - 0.5 * (log_p[0, 0, 3] + log_p[0, 3, 6]) / 2
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("control", ["temperature", "permuted"])
def test_lrp_inference_controls(control, monkeypatch):
    """Stop words alone leave CE(p, y) twice; else p with T is as confident as p̃, and permuted ω are ω in order."""
    model = make(AOAModel)
    trace = model.teacher_force(random_regions(), CAPTIONS)
    every, none = torch.ones(12).bool(), torch.zeros(12).bool()
    expected = lrp_inference.lrp_loss(model, trace, CAPTIONS, every, 0.5)
    got = controls.control_loss(model, trace, CAPTIONS, every, 0.5, control)
    torch.testing.assert_close(got, expected)
    other = controls.control_loss(model, trace, CAPTIONS, none, 0.5, control)[0]
    expected = lrp_inference.lrp_loss(model, trace, CAPTIONS, none, 0.5)[0]
    assert abs(other - got[0]) > 1e-3 and abs(other - expected) > 1e-3
    if control == "permuted":
        monkeypatch.setattr(torch, "rand_like", lambda x: torch.arange(x.shape[-1]).expand_as(x))
        torch.testing.assert_close(controls.control_loss(model, trace, CAPTIONS, none, 0.5, control)[0], expected)
    else:
        logits = trace.hidden.flatten(0, -2) @ model.W_o.weight.T
        scale = controls.inverse_temperature(logits, torch.tensor(0.7))
        assert controls.confidence(logits * scale).item() == pytest.approx(0.7, abs=1e-5)


def test_temperature_and_dropout(monkeypatch):
    """The words that LRP-inference weights have the mean confidence of p̃; stop words, and all words if all are stop
    words, keep their logits, with the same dropout."""
    model, stop, logits = make(AOAModel, seed=2), torch.arange(12) == 6, []
    trace = model.teacher_force(random_regions(), CAPTIONS)
    word_loss = controls.word_loss
    monkeypatch.setattr(controls, "word_loss", lambda z, *a, **k: logits.append(z) or word_loss(z, *a, **k))
    controls.control_loss(model, trace, CAPTIONS, stop, 0.5, "temperature")
    plain, changed = logits
    rows = word_rows(CAPTIONS)
    weighted = lrp_inference.weighted_hidden(model, *(x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h)),
                                             plain.argmax(-1), stop)
    is_weighted = ~stop[plain.argmax(-1)] & (CAPTIONS[..., 1:].flatten()[rows] != 0)
    assert is_weighted.any() and not is_weighted.all()
    torch.testing.assert_close(controls.confidence(changed[is_weighted]),
                               controls.confidence(model.W_o(weighted[is_weighted])), rtol=1e-4, atol=0)
    torch.testing.assert_close(changed[~is_weighted], plain[~is_weighted])
    model.train().dropout.p = 0.5
    for control in ("temperature", "permuted"):
        logits.clear()
        controls.control_loss(model, trace, CAPTIONS, torch.ones(12).bool(), 0.5, control)
        torch.testing.assert_close(*logits)


def test_controls_train(demo_data, tmp_path):
    base = tmp_path / "base"
    train_run(demo_data, base, "--epochs", "1")
    script = SimpleNamespace(get_args_parser=controls.get_args_parser,
                             main=partial(controls.finetune.main, make_loss=controls.make_loss))
    for control, mode in (("mask", "erase_tune"), ("other_words", "erase_tune"), ("temperature", "lrp_tune")):
        folder = tmp_path / control
        arguments = ["--weight", f"{base}/checkpoint_last.pth", "--epochs", "1", "--workers", "0", "--device", "cpu",
                     "--save_path", str(folder), "--control", control, f"--{mode}"]
        assert run_training(script, arguments, folder)["training"]["flags"]["control"] == control
    settings = controls.get_args_parser().parse_args(["--weight", "x", "--erase_tune", "--control", "soft",
                                                      "--data_folder", str(demo_data), "--dataset", "demo"])
    data = CaptionDataset(demo_data, "demo", "train", image_size=64)
    for control, keep in (("soft", 0.1), ("image_swap", 0), ("other_words", 0)):
        settings.control = control
        loss, _ = controls.make_loss(settings, data.vocabulary, data, None, torch.device("cpu"))
        assert loss.keep == keep and (loss.assign is controls.soft_evidence) == (control == "soft")
    with pytest.raises(InputError, match="--control temperature is a control of --lrp_tune"):
        script.main(script.get_args_parser().parse_args([*arguments[:-1], "--ce_tune", "--resume", "never"]))
