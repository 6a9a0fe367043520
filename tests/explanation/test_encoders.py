"""Encoders load torchvision's weights from a file; weights that do not fit are named."""
import pytest
import torch
from torchvision import models

from captioning.errors import InputError
from captioning.explanation import encoders


def vgg16_without_classifier():
    """torchvision's VGG16 with random weights, without the 124 million of its classifier."""
    with torch.device("meta"):
        model = models.vgg16()
    del model.classifier
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_weights_from_a_file(tmp_path, name):
    torch.manual_seed(0)
    model = (vgg16_without_classifier() if name == "vgg16" else models.resnet50()).eval()
    torch.save({**model.state_dict(), "classifier.6.bias": torch.zeros(1000)}, tmp_path / "weights.pth")
    encoder = encoders.build(name, tmp_path / "weights.pth").eval()
    images = torch.randn(1, 3, 64, 64).double()
    body = model.features[:-1] if name == "vgg16" else torch.nn.Sequential(*list(model.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(encoder.double()(images), body.double()(images), rtol=1e-4, atol=1e-4)
    assert encoders.feature_dim(encoder) == {"vgg16": 512, "resnet50": 2048}[name]


def test_half_precision_weights_without_a_classifier(tmp_path):
    state = {key: value.half() for key, value in vgg16_without_classifier().state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    encoder = encoders.build("vgg16", tmp_path / "weights.pth")
    assert torch.equal(encoder[0].weight, state["features.0.weight"].float())


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = vgg16_without_classifier().state_dict()
    files = {"'features.28.weight'": {key: v for key, v in state.items() if key != "features.28.weight"},
             "'features.0.weight'": {**state, "features.0.weight": torch.zeros(64, 1, 3, 3)},
             "state_dict": [1, 2]}
    for expected, content in files.items():
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=expected):
            encoders.build("vgg16", tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"missing\.pth"):
        encoders.build("vgg16", tmp_path / "missing.pth")
    with pytest.raises(InputError, match="vgg11"):
        encoders.build("vgg11")
