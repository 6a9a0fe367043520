"""Encoders load torchvision's weights from a file; weights that do not fit are named."""
import pytest
import torch
from torchvision import models

from captioning.errors import InputError
from captioning.explanation import encoders


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_weights_from_a_file(tmp_path, name):
    torch.manual_seed(0)
    model = models.get_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = encoders.build(name, tmp_path / "weights.pth").eval()
    images = torch.randn(1, 3, 64, 64).double()
    body = model.features[:-1] if name == "vgg16" else torch.nn.Sequential(*list(model.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(encoder.double()(images), body.double()(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoders.run(encoder, images)[0], encoder(images))
    assert encoders.feature_dim(encoder) == {"vgg16": 512, "resnet50": 2048}[name]


def test_half_precision_weights_without_a_classifier(tmp_path):
    state = {key: value.half() for key, value in models.vgg16().state_dict().items() if key.startswith("features")}
    torch.save(state, tmp_path / "weights.pth")
    encoder = encoders.build("vgg16", tmp_path / "weights.pth")
    assert torch.equal(encoder[0].weight, state["features.0.weight"].float())


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = models.vgg16().state_dict()
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


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="Tanh"):
        encoders.run(torch.nn.Sequential(torch.nn.Tanh()), torch.zeros(1, 3, 8, 8))
