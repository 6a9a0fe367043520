"""Region features of a detector: agreement with torchvision's, and data preparation."""
import h5py
import pytest
import torch
from helpers import call, refused
from torchvision import ops
from torchvision.models import detection

import preparedataset
from captioning.data import detector

NAME, V2 = "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50_fpn_v2"


def random_weights(path, name=NAME):
    """Writes random weights with class scores of sufficient variance -> the path."""
    torch.manual_seed(0)
    model = detection.__dict__[name](weights=None, weights_backbone=None)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("detector") / "weights.pth")


def build_small(name, path, side=96):
    """The detector with the weights in `path`, for small images."""
    model = detector.build(name, path)
    model.transform.min_size, model.transform.max_size = (side,), 128
    return model


@pytest.fixture(scope="module")
def small(weights):
    return build_small(NAME, weights)


def random_images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


@torch.inference_mode()
def test_regions_are_the_highest_scoring_without_overlap(small):
    batch = random_images((60, 90), (100, 70))
    features, boxes, counts = detector.best_regions(small, batch, 12)
    assert features.shape == (2, 12, 1024) and boxes.shape == (2, 12, 4)
    assert counts.tolist() == [12, 12]
    for image, image_features, image_boxes in zip(batch, features, boxes, strict=True):
        H, W = image.shape[1:]
        assert (image_boxes >= 0).all()
        assert (image_boxes[:, 2] <= W + 1e-3).all() and (image_boxes[:, 3] <= H + 1e-3).all()
        # in pixels of the image, not of the resized one
        assert image_boxes[:, 2].max() > W / 2
        overlap = ops.box_iou(image_boxes, image_boxes).fill_diagonal_(0)
        assert overlap.max() <= detector.OVERLAP + 1e-4
        logits, _ = small.roi_heads.box_predictor(image_features)
        scores = logits.softmax(-1)[:, 1:].amax(-1)
        assert (scores.diff() <= 1e-6).all()
        # the features are the output of the box head for these regions
        resized, _ = small.transform([image])
        h, w = resized.image_sizes[0]
        scaled = image_boxes * torch.tensor([w / W, h / H] * 2)
        maps = small.backbone(resized.tensors)
        expected = small.roi_heads.box_head(small.roi_heads.box_roi_pool(maps, [scaled], [(h, w)]))
        torch.testing.assert_close(image_features, expected, rtol=1e-3, atol=1e-3)

    # more than there are: the rest is zero
    features, boxes, counts = detector.best_regions(small, batch[:1], 400)
    n = counts.item()
    assert 0 < n < 400 and (features[0, :n].abs().sum(-1) > 0).all()
    assert not features[0, n:].any() and not boxes[0, n:].any()


@torch.inference_mode()
def test_detector_of_the_configurations(tmp_path):
    model = build_small(V2, random_weights(tmp_path / "v2.pth", V2))
    features, boxes, counts = detector.best_regions(model, random_images((60, 90)), 36)
    assert features.shape == (1, 36, 1024) and counts.tolist() == [36] and features.isfinite().all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert boxes.amax((0, 1))[2:].tolist() == pytest.approx([90, 60], abs=20)


@torch.inference_mode()
def test_image_without_objects_has_regions(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    for name in state:
        if name.startswith("rpn.head.cls_logits"):
            state[name].fill_(-9 if name.endswith("bias") else 0)
    torch.save(state, tmp_path / "low_scores.pth")
    model = build_small(NAME, tmp_path / "low_scores.pth")
    assert detector.best_regions(model, [torch.full((3, 60, 90), 0.5)], 10)[2].item() == 10


def test_weights_with_frozen_batch_norm_load(weights, tmp_path):
    """As those of torchvision, whose frozen batch normalisation has no num_batches_tracked."""
    state = torch.load(weights, weights_only=True)
    torch.save({name: value for name, value in state.items() if "num_batches" not in name},
               tmp_path / "frozen.pth")
    assert len(build_small(NAME, tmp_path / "frozen.pth").state_dict()) == len(state)


def test_data_preparation(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(detector, "PROPOSALS", 20)
    build = detector.build

    def small_build(*arguments):
        model = build(*arguments)
        model.transform.min_size = (64,)
        return model
    monkeypatch.setattr(detector, "build", small_build)
    flags = (f"--dataset demo --output_folder {tmp_path} --demo_size 4 2 2 --workers 0 "
             f"--features bottom_up --detector {NAME} --detector_weights {weights} "
             "--regions 10 --device cpu --batch_size 3")
    call(preparedataset, *flags.split())
    for split, size in (("train", 4), ("val", 2), ("test", 2)):
        with h5py.File(tmp_path / "demo" / f"features_bottom_up_{split}_demo.hdf5") as file:
            assert file["done"][:].all() and len(file["done"]) == size
    with h5py.File(tmp_path / "demo" / "features_bottom_up_train_demo.hdf5") as file:
        assert file["features"].shape == (4, 10, 1024) and file["boxes"].shape == (4, 10, 4)
        assert (file["features"].dtype, file["boxes"].dtype) == ("float16", "float32")
        assert (file["counts"][:] > 0).all() and file["features"][:].any(-1)[:, 0].all()


def test_weights_of_another_detector_are_rejected(tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    state["backbone.of.another"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with refused(f"do not fit {NAME}.*--detector"):
        build_small(NAME, tmp_path / "other.pth")
    with refused("missing.pth cannot be read"):
        build_small(NAME, tmp_path / "missing.pth")
