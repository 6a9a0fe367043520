"""The model of docs/new_model.md does all that the two models of the repository do."""
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import (
    CAPTIONS,
    ENCODERS,
    OWN_METHODS,
    assert_close,
    call,
    inputs_of,
    make,
    max_pooled,
    random_images,
    random_regions,
    run_training,
    train_run,
)

import evaluation
import explain
import finetune
from captioning import captioner, checkpoint
from captioning.explanation.methods import METHODS, SPLIT
from captioning.files import read_json

DOCUMENT = Path(__file__).parents[1] / "docs" / "new_model.md"


@pytest.fixture(scope="module", autouse=True)
def model_type():
    """The class of the document, registered as it says."""
    module = ModuleType("showattendtell")
    sys.modules[module.__name__] = module
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, DOCUMENT, "exec"), module.__dict__)
    captioner.MODELS["sat"] = ("showattendtell", "ShowAttendTell")
    yield module.ShowAttendTell
    del captioner.MODELS["sat"], sys.modules[module.__name__]


@ENCODERS
def test_relevance_is_conserved(model_type, encoder):
    model, images = make(model_type, encoder, biased=False), inputs_of(encoder)
    explanation = model.lrp(images, CAPTIONS, eps=0)
    assert_close(explanation.conservation, (CAPTIONS[:, 1:] != 0).double(), 1e-9)
    if encoder:
        assert_close(explanation.pixels.sum((2, 3, 4)), explanation.image, 1e-9)
    with_biases = make(model_type, encoder).lrp(images, CAPTIONS)
    assert_close(sum(getattr(with_biases, part) for part in SPLIT), with_biases.targets)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_every_method_explains_a_batch_like_its_items(model_type, method):
    model = make(model_type, max_pooled)
    images = random_images()
    batch = METHODS[method].explain(model, images, CAPTIONS)
    alone = METHODS[method].explain(model, images[1:2], CAPTIONS[1:2])
    for name in ("words", "features", "pixels", "attention"):
        if getattr(batch, name) is not None:
            assert_close(getattr(alone, name)[0], getattr(batch, name)[1])


def test_gradients_are_those_of_autograd(model_type):
    model, features = make(model_type), random_regions()[:1].requires_grad_()
    logits = model(features, CAPTIONS[:1])
    expected, = torch.autograd.grad(logits[0, 3, CAPTIONS[0, 4]], features)
    assert_close(model.gradient(features.detach(), CAPTIONS[:1]).features[0, 3], expected[0])


def test_steps_equal_teacher_forcing(model_type):
    model, features = make(model_type), random_regions()
    logits = model(features, CAPTIONS)
    context, state = model.start(features), model.initial_state(3)
    for t in range(CAPTIONS.shape[1] - 1):
        step, state, _ = model.step(CAPTIONS[:, t:t + 1], state, context)
        assert_close(step[:, 0], logits[:, t])


def test_scripts_train_tune_evaluate_and_explain_it(demo_data, tmp_path):
    flags = ["--model_type", "sat", "--epochs", "1"]
    content = train_run(demo_data, tmp_path / "sat", *flags)
    assert content["model_type"] == "sat" and content["config"]["hidden_dim"] == 16
    weight = str(tmp_path / "sat" / "checkpoint_best.pth")
    before = checkpoint.load(weight)[0].state_dict()
    common = ["--weight", weight, "--data_folder", demo_data, "--workers", "0", "--device", "cpu"]
    for mode in ("lrp_tune", "erase_tune"):
        tuned = run_training(finetune, [f"--{mode}", *common, "--epochs", "1", "--save_path",
                                        tmp_path / mode], tmp_path / mode)
        assert not torch.equal(tuned["state_dict"]["W_a.weight"], before["W_a.weight"])

    call(evaluation, *common, "--metrics", "cider", "chair", "--explanations", "pointing_game",
         "--max_images", "2")
    assert "chair_i" in read_json(tmp_path / "sat" / "metrics_test.json")
    image = next((demo_data / "demo" / "images").glob("test_*.png"))
    call(explain, "--weight", weight, "--images", image, "--save_path", tmp_path / "explained",
         "--device", "cpu")
    assert (tmp_path / "explained" / image.stem / "lrp.png").is_file()
