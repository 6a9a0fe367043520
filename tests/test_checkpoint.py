"""Checkpoints: saving and loading, damaged files, published files, and no execution of code."""
import collections
import pickle

import pytest
import torch
from helpers import Code, published_state, refused, vocabulary_of
from torch import nn

from aoamodel import AOAModel
from captioning import checkpoint
from captioning.files import write_json
from gridTDmodel import GridTDModel

VOCABULARY = vocabulary_of(["a", "dog"])
CAPTIONS = torch.tensor([[4, 1, 2, 5]])


def make(model_type, encoder=None, **options):
    torch.manual_seed(1)
    return model_type(len(VOCABULARY), 4, 6, encoder=encoder,
                      **({"feature_dim": 3} if encoder is None else {}),
                      **options).eval()


@pytest.mark.parametrize("model", [make(GridTDModel, attention_dim=5, query_per_region=True),
                                   make(AOAModel, num_head=2), make(GridTDModel, encoder="small")])
def test_saved_model_is_restored(tmp_path, model):
    checkpoint.save(tmp_path / "c.pth", model, VOCABULARY, {"state": {"epoch": 3}})
    loaded, vocabulary = checkpoint.load(tmp_path / "c.pth")
    images = torch.randn(1, 3, 112, 112) if model.encoder is not None else torch.rand(1, 5, 3)
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    assert vocabulary.wordmap == VOCABULARY.wordmap
    assert torch.equal(loaded(images, CAPTIONS), model(images, CAPTIONS))
    assert checkpoint.read(tmp_path / "c.pth")["training"] == {"state": {"epoch": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_loading_executes_no_code(tmp_path):
    torch.save({"state_dict": {}, "evil": Code(tmp_path / "evil")}, tmp_path / "c.pth")
    with refused("no file of tensors"):
        checkpoint.load(tmp_path / "c.pth")
    assert not (tmp_path / "evil").exists()


def test_damaged_checkpoints_are_named(tmp_path):
    intact = tmp_path / "intact.pth"
    checkpoint.save(intact, make(GridTDModel), VOCABULARY)
    content = checkpoint.read(intact)
    weights = content["state_dict"]
    for number, damaged in enumerate([
            {"state_dict": {name: weights[name] for name in weights if name != "W_o.bias"}},
            {"state_dict": {**weights, "W_o.bias": weights["W_o.bias"].long()}},
            intact.read_bytes()[:-500], b"", b"not a checkpoint", pickle.dumps([1, 2]),
            {"model_type": "aoa"}, {"model_type": "lstm"}, {"state_dict": 3}, {"wordmap": {}},
            {"wordmap": {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": 3}},
            {"config": {"vocab_size": "many"}}]):
        path = tmp_path / f"{number}.pth"
        if isinstance(damaged, bytes):
            path.write_bytes(damaged)
        else:
            torch.save(content | damaged, path)
        with refused(rf"/{number}\.pth"):
            checkpoint.load(path)


def test_another_word_map_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c.pth", make(AOAModel, num_head=2), VOCABULARY)
    write_json(tmp_path / "other.json", {**VOCABULARY.wordmap, "cat": 6})
    with refused("other.json"):
        checkpoint.load(tmp_path / "c.pth", wordmap=tmp_path / "other.json")


@pytest.mark.parametrize("model", [make(GridTDModel, attention_dim=5), make(AOAModel, num_head=2)])
@pytest.mark.parametrize("zipped", [True, False])
def test_published_checkpoints_load_without_their_pickled_optimizer(tmp_path, model, zipped):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(1, 5, 3), CAPTIONS).sum().backward()
    optimizer.step()
    optimizer.state = collections.defaultdict(dict, optimizer.state)
    state = {f"module.{key}": value for key, value in published_state(model).items()}
    torch.save({"state_dict": state, "epoch": 7, "bleu-4": 0.2, "cider": 0.5,
                "optimizer": optimizer},
               tmp_path / "published.pth", _use_new_zipfile_serialization=zipped)
    write_json(tmp_path / "wordmap.json", VOCABULARY.wordmap)
    loaded, _ = checkpoint.load(tmp_path / "published.pth", wordmap=tmp_path / "wordmap.json",
                                num_head=2)
    features = torch.rand(2, 5, 3)
    model.query_per_region = isinstance(model, GridTDModel)
    torch.testing.assert_close(loaded(features, CAPTIONS.expand(2, -1)),
                               model(features, CAPTIONS.expand(2, -1)))
    with refused("--wordmap"):
        checkpoint.load(tmp_path / "published.pth")
    with refused("published.pth is a published checkpoint"):
        checkpoint.release([tmp_path / "published.pth"], tmp_path / "small.pth")


@pytest.mark.parametrize("from_features", [True, False])
def test_released_model_is_small_and_rounded_to_float16(tmp_path, from_features):
    model = GridTDModel(len(VOCABULARY), 32, 32, 16, encoder="small").eval()
    model.encoder.half().float()
    model.encoder[1].running_mean.fill_(0.1)        # which float16 would change
    training = {"state": {"epoch": 3}, "from_features": from_features}
    checkpoint.save(tmp_path / "c.pth", model, VOCABULARY, training)
    checkpoint.release([tmp_path / "c.pth"], tmp_path / "r.pth")
    assert (tmp_path / "r.pth").stat().st_size < 0.5 * (tmp_path / "c.pth").stat().st_size
    released, words = checkpoint.load(tmp_path / "r.pth")
    assert words.wordmap == VOCABULARY.wordmap and released.config == model.config
    assert checkpoint.read(tmp_path / "r.pth")["training"] == {"from_features": from_features}
    state = released.state_dict()
    for name, value in model.state_dict().items():
        is_rounded = value.is_floating_point() and not (from_features
                                                        and name == "encoder.1.running_mean")
        rounded = value.half().float() if is_rounded else value
        assert state[name].dtype == value.dtype and torch.equal(state[name], rounded), name


def test_weights_of_several_checkpoints_are_averaged(tmp_path):
    paths = [tmp_path / f"{number}.pth" for number in range(3)]
    models = [make(GridTDModel) for _ in paths]
    for number, (path, model) in enumerate(zip(paths, models, strict=True)):
        nn.init.constant_(model.W_o.bias, 4.0 ** number)
        model.W_a.weight.data *= number
        model.W_a.bias.data.zero_().neg_()      # −0, whose bytes a fingerprint may contain
        checkpoint.save(path, model, VOCABULARY)
    checkpoint.release(paths, tmp_path / "mean.pth")
    state = checkpoint.load(tmp_path / "mean.pth")[0].state_dict()
    assert (state["W_o.bias"] == 7).all()
    torch.testing.assert_close(state["W_a.weight"], models[1].W_a.weight, rtol=1e-3, atol=1e-4)
    assert state["W_a.bias"].signbit().all()

    for path, value in zip(paths, (1.0, 1.0, 2.0), strict=True):
        model = make(GridTDModel, encoder="small")
        nn.init.constant_(model.encoder[0].weight, value)
        checkpoint.save(path, model, VOCABULARY, {"from_features": path is paths[1]})
    with refused("different encoders, but stored features"):
        checkpoint.release(paths, tmp_path / "mean.pth")

    checkpoint.save(paths[1], make(AOAModel, num_head=2), VOCABULARY)
    with refused("1.pth is of another model than"):
        checkpoint.release(paths, tmp_path / "mean.pth")


def test_model_with_an_unnamed_encoder_is_not_saved(tmp_path):
    model = make(GridTDModel, encoder=nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="name"):
        checkpoint.save(tmp_path / "c.pth", model, VOCABULARY)
