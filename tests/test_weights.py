"""Weights that cannot be downloaded or read are reported in one sentence that names the remedy."""
from urllib.error import URLError

import pytest
from helpers import refused
from torchvision.models import _api

from captioning.data import detector
from captioning.explanation import encoders
from captioning.weights import read_weights


@pytest.mark.parametrize(("build", "name", "flag"), [
    (encoders.build, "vgg16", "--encoder_weights"),
    (encoders.build, "resnet50", "--encoder_weights"),
    (detector.build, "fasterrcnn_resnet50_fpn_v2", "--detector_weights")])
def test_without_network(monkeypatch, build, name, flag):
    def fail(*args, **options):
        raise URLError("no network")
    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    with refused(f"the weights of {name} cannot be downloaded .*no network.*{flag}"):
        build(name)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with refused("weights.pth is damaged"):
        read_weights(path)
