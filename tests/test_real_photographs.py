"""All steps on real photographs: features, overfitting, captions and explanations."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import evaluation
import explain
import preparedataset
import train
from captioning import checkpoint
from captioning.checkpoint import PHOTOGRAPHS, image_size
from captioning.data.images import preprocess, read_image
from captioning.explanation import encoders
from captioning.report.explanations import stored_folders
from gridTDmodel import GridTDModel

CAT = Path(__file__).parents[1] / "docs" / "figures" / "cat.jpg"


def run(module, flags):
    call(module, *f"{flags} --device cpu".split())


@pytest.fixture(scope="module")
def data_folder(shared_data, tmp_path_factory):
    """A data folder with 11, 1 and 4 photographs and their VGG16 features."""
    folder, source = tmp_path_factory.mktemp("few"), shared_data / "coco_sample"
    (folder / "annotations").mkdir()
    for split, count in (("train2017", 12), ("val2017", 4)):
        for kind in ("captions", "instances"):
            content = json.loads((source / "annotations" / f"{kind}_{split}.json").read_text())
            content["images"] = sorted(content["images"], key=lambda image: image["id"])[:count]
            ids = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
            (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
    run(preparedataset, f"--dataset coco2017 --annotation_folder {folder}/annotations "
        f"--image_folder {source} --output_folder {folder}/data --min_word_freq 1 --features cnn "
        f"--encoder_weights {shared_data}/vgg16_features.pth --workers 0")
    return folder / "data"


@pytest.mark.parametrize("model_type", ["gridtd", "aoa"])
def test_from_photographs_to_explanations(data_folder, shared_data, tmp_path, model_type,
                                          monkeypatch):
    # drawing the curves takes longer than an epoch; test_log.py tests it
    monkeypatch.setattr("captioning.training.log.draw_training_curves", lambda *_: None)
    run(train, f"--dataset coco2017 --data_folder {data_folder} --model_type {model_type} "
        f"--encoder_weights {shared_data}/vgg16_features.pth --embed_dim 64 --hidden_dim 128 "
        "--attention_dim 32 --dropout 0 --batch_size 2 --epochs 40 --patience 40 --decoder_lr 3e-3 "
        f"--grad_clip 1 --workers 0 --save_path {tmp_path}")
    weight = f"--weight {tmp_path}/checkpoint_last.pth"
    scores = {}
    for split, more in (("train", "--explanations correctness --max_images 2"), ("test", "")):
        run(evaluation, f"{weight} --dataset coco2017 --data_folder {data_folder} --split {split} "
            f"--metrics cider --workers 0 --save_path {tmp_path} {more}")
        scores[split] = json.loads((tmp_path / f"metrics_{split}.json").read_text())
    assert scores["train"]["cider"] >= 1.2
    assert 0 < scores["train"]["box_share"] < 1 and 0 < scores["train"]["inside_box_lrp"] <= 1
    names = [item["image"] for item in json.loads((tmp_path / "predictions_test.json").read_text())]
    assert len(names) == 4
    path = next((shared_data / "coco_sample").rglob(names[0]))
    run(explain, f"{weight} --images {path} --max_len 5 --save_path {tmp_path}/out")
    for folder in stored_folders(tmp_path / "out"):
        arrays = np.load(folder / "explanation.npz")
        assert arrays["lrp_pixels"].shape == (len(arrays["words"]) - 1, 224, 224)
        assert np.abs(arrays["lrp_pixels"]).sum() > 0
        for method in ("lrp", "attention"):
            assert np.asarray(Image.open(folder / f"{method}.png").convert("L")).std() > 20


def test_share_of_the_image_s_part_that_reaches_the_pixels(shared_data):
    """Through VGG16 all; through EfficientNet-Lite0 little, where biases make the outputs."""
    torch.manual_seed(0)
    vgg16 = GridTDModel(100, 8, 8, 8, encoder="vgg16")
    vgg16.encoder = encoders.build("vgg16", shared_data / "vgg16_features.pth")
    captions = torch.tensor([[2, 10, 20, 3]])
    for name, model, low, high in (("VGG16", vgg16.eval(), 0.999, 1.001),
                                   ("EfficientNet-Lite0", checkpoint.load(PHOTOGRAPHS)[0], 0.01,
                                    0.3)):
        image = preprocess(read_image(CAT), image_size(model))
        result = model.lrp(image[None], captions)
        shares = (result.pixels.sum((2, 3, 4)) / result.image)[0]
        print(f"{name}: {shares.min():.1%} to {shares.max():.1%} of the image's part reach the "
              "pixels")
        assert (shares > low).all() and (shares < high).all()
