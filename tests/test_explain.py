"""explain.py: a folder for every picture, with the model's own numbers in it."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import explain
from aoamodel import AOAModel
from captioning import checkpoint, decoding
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import build
from captioning.errors import InputError
from gridTDmodel import GridTDModel

ROOT = Path(__file__).parents[1]
WORDS = build([["a", "dog", "runs", "fast"]], 1)


def make_model(kind, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "embed_dim": 8, "hidden_dim": 8, "encoder": "small"} | options
    return GridTDModel(**sizes, attention_dim=6) if kind == "gridtd" else AOAModel(**sizes, num_head=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("gridtd", "aoa"):
        checkpoint.save(folder / f"{kind}.pth", make_model(kind), WORDS)
    checkpoint.save(folder / "regions.pth", make_model("gridtd", encoder=None, feature_dim=5), WORDS)
    return folder


def picture(path, size=(90, 60), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def run(weight, images, save_path, *flags):
    explain.main(explain.get_args_parser().parse_args(
        ["--weight", str(weight), "--images", *map(str, images), "--save_path", str(save_path), "--device", "cpu",
         "--max_len", "4", *flags]))


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_arrays_are_the_models_own(weights, tmp_path, kind, capsys):
    paths = [picture(tmp_path / "in" / f"{name}.png", (90 - 20 * i, 60), i) for i, name in enumerate("abc")]
    run(weights / f"{kind}.pth", paths, tmp_path / "out", "--methods", "lrp", "grad_cam", "attention", "--caption",
        "A dog runs!", "--batch_size", "2")
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    captions = torch.tensor([WORDS.encode(["a", "dog", "runs"], 3)])
    said = capsys.readouterr().out
    for path in paths:
        expected = model.lrp(preprocess(read_image(path), 112)[None], captions)
        found = np.load(tmp_path / "out" / path.stem / "explanation.npz")
        assert list(found["words"]) == ["<start>", "a", "dog", "runs", "<end>"]
        for name, value in (("lrp_words", expected.words[0]), ("lrp_regions", expected.features[0].sum(-1)),
                            ("lrp_pixels", expected.pixels[0].sum(1)), ("logits", expected.targets[0]),
                            ("attention", expected.attention[0])):
            assert np.allclose(found[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item()), name
        assert found["lrp_pixels"].dtype == np.float32 and found["grad_cam_pixels"].shape == (4, 112, 112)
        assert f"{path.name}: a dog runs   (LRP: {expected.conservation.mean():.0%}" in said


def test_files_of_a_picture(weights, tmp_path):
    run(weights / "gridtd.pth", [picture(tmp_path / "a.png")], tmp_path / "out", "--methods", *explain.METHODS,
        "--caption", "a dog")
    names = {path.name for path in (tmp_path / "out" / "a").iterdir()}
    assert names == {f"{method}.png" for method in explain.METHODS} | {"explanation.npz"} | {
        f"words_{method}.png" for method in explain.METHODS if method != "attention"}
    for path in (tmp_path / "out" / "a").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 3


def test_own_caption_is_the_decoders(weights, tmp_path):
    path = picture(tmp_path / "a.png")
    model, _ = checkpoint.load(weights / "gridtd.pth")
    with torch.no_grad():
        features = model.encode(preprocess(read_image(path), 112)[None])
    for method in ("greedy", "beam_search", "diverse_beam_search"):
        run(weights / "gridtd.pth", [path], tmp_path / method, "--methods", "attention", "--decoding", method)
        tokens = decoding.decode(model, features, WORDS, method, 4, beam_size=3)[0]
        words = np.load(tmp_path / method / "a" / "explanation.npz")["words"]
        assert list(words) == ["<start>", *(WORDS.words[i] for i in tokens.tolist() if i)]


def test_captions_of_different_lengths_in_one_batch(weights, tmp_path, monkeypatch):
    rows = torch.tensor([WORDS.encode(["a", "dog"], 4) + [0, 0], WORDS.encode(["a", "dog", "runs", "fast"], 4)])
    monkeypatch.setattr(explain, "captions_of", lambda *_: rows)
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)]
    run(weights / "aoa.pth", paths, tmp_path / "out", "--methods", "lrp")
    short, long = (np.load(tmp_path / "out" / name / "explanation.npz") for name in "ab")
    assert short["lrp_words"].shape == (3, 3) and long["lrp_words"].shape == (5, 5)
    assert short["lrp_pixels"].shape == (3, 112, 112) and short["attention"].shape == (3, 2, 49)


def test_pictures_with_the_same_stem_keep_folders_of_their_own(tmp_path):
    paths = [Path(name) for name in ("x/a.jpg", "y/a.jpg", "a.png", "b.jpg", "a.jpg_0.png", "z/a.jpg_0.png")]
    names = explain.folder_names(paths)
    assert len(set(names)) == len(names) and names[3] == "b"
    odd = explain.folder_names([Path("x/a.jpg"), Path("y/a.jpg"), Path("a.jpg_0.png")])
    assert len(set(odd)) == 3


def test_a_folders_pictures_come_by_name_and_once(tmp_path):
    for name in ("b.png", "a.PNG", "c.png"):
        picture(tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    found = explain.find_pictures([str(tmp_path), str(tmp_path / "c.png")])
    assert [path.name for path in found] == ["a.PNG", "b.png", "c.png"]


def test_a_folder_appears_whole(weights, tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")

    def fail(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space"):
        patch.setattr(explain.np, "savez_compressed", lambda *_, **__: fail())
        run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "attention")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_run_replaces_the_first_and_nothing_else(weights, tmp_path):
    path = picture(tmp_path / "a.png")
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "grad_cam", "--caption", "a dog")
    (tmp_path / "out" / "a" / "mine.txt").write_text("notes")
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "attention", "--caption", "a")
    assert {p.name for p in (tmp_path / "out" / "a").iterdir()} == {"attention.png", "explanation.npz", "mine.txt"}
    assert list(np.load(tmp_path / "out" / "a" / "explanation.npz")["words"]) == ["<start>", "a", "<end>"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "index.html"]


def test_what_is_explained_already_is_not_explained_again(weights, tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")]
    explained = []
    explain_batch = explain.explain_batch
    monkeypatch.setattr(explain, "explain_batch",
                        lambda *some: explained.append(len(some[-1])) or explain_batch(*some))
    flags = ("--methods", "attention", "--caption", "a dog")
    run(weights / "gridtd.pth", paths[:2], tmp_path / "out", *flags)
    before = (tmp_path / "out" / "a" / "explanation.npz").stat().st_mtime_ns
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    assert explained == [2, 1] and (tmp_path / "out" / "a" / "explanation.npz").stat().st_mtime_ns == before
    assert [entry["name"] for entry in page_data(tmp_path / "out")] == ["a", "b", "c"]
    picture(paths[1], seed=9)                                                           # another picture of that name
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    (tmp_path / "out" / "c" / "explanation.npz").write_bytes(b"cut short")
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags, "--overwrite")
    run(weights / "aoa.pth", paths, tmp_path / "out", *flags)
    assert explained == [2, 1, 1, 1, 3, 3]


def page_data(folder):
    html = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(html.split('type="application/json" id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_contrast(weights, tmp_path, kind):
    path = picture(tmp_path / "a.png")
    run(weights / f"{kind}.pth", [path], tmp_path / "out", "--caption", "a dog", "--contrast", "runs", "--methods",
        *explain.METHODS)
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    images, captions = preprocess(read_image(path), 112)[None], torch.tensor([WORDS.encode(["a", "dog"], 2)])
    found = np.load(tmp_path / "out" / "a" / "explanation.npz")
    logits = model(images, captions)[0].detach()
    difference = logits[range(3), captions[0, 1:]] - logits[:, WORDS.wordmap["runs"]]
    assert np.allclose(found["logits"], difference, atol=1e-5)
    one, other = (model.gradient(images, ids).pixels[0].sum(1) for ids in (
        captions, torch.tensor([[captions[0, 0], WORDS.wordmap["runs"], captions[0, 2]]])))
    assert np.allclose(found["gradient_pixels"][0], one[0] - other[0], atol=1e-6)
    assert page_data(tmp_path / "out")[0]["contrast"] == "runs"


def test_a_data_sets_split(weights, demo_data, tmp_path):
    parser = explain.get_args_parser()
    flags = ["--weight", str(weights / "gridtd.pth"), "--save_path", str(tmp_path), "--device", "cpu", "--methods",
             "attention", "--caption", "a dog", "--data_folder", str(demo_data), "--dataset", "demo"]
    explain.main(parser.parse_args([*flags, "--split", "val", "--max_images", "3"]))
    assert [entry["name"] for entry in page_data(tmp_path)] == ["val_00000", "val_00001", "val_00002"]
    with pytest.raises(InputError, match="either --images"):
        explain.main(parser.parse_args([*flags, "--images", "x.png"]))


def test_broken_pictures_do_not_stop_the_others(weights, tmp_path, capsys):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match=r"1 of 2 pictures were left out.*bad\.png") as caught:
        run(weights / "gridtd.pth", [bad, good], tmp_path / "out", "--methods", "attention")
    assert "\n" not in str(caught.value) and [entry["name"] for entry in page_data(tmp_path / "out")] == ["good"]
    run(weights / "gridtd.pth", [bad, good], tmp_path / "out", "--skip_broken", "--methods", "attention")
    assert "left out" in capsys.readouterr().out and (tmp_path / "out" / "good" / "attention.png").exists()
    with pytest.raises(InputError, match="none of the pictures"):
        run(weights / "gridtd.pth", [bad], tmp_path / "out", "--skip_broken")


@pytest.mark.parametrize("flags, message", [
    (["--caption", "a zebra runs past"], "vocabulary: zebra, past"), (["--caption", "?!"], "holds no words"),
    (["--contrast", "zebra"], "--contrast 'zebra'.*vocabulary: zebra"), (["--contrast", "a dog"], "must be one word"),
    (["--images", "nowhere.jpg"], "does not exist"), (["--weight", "nowhere.pth"], "cannot be read"),
    (["--weight", "regions.pth"], "region features"), (["--images", "empty"], "holds no pictures")])
def test_bad_input_is_one_clear_sentence(weights, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    flags = [str(weights / flag) if flag == "regions.pth" else flag for flag in flags]
    with pytest.raises(InputError, match=message) as caught:
        run(weights / "gridtd.pth", [picture(Path("a.png"))], "out", *flags)
    assert "\n" not in str(caught.value)


def test_exit_status_and_standard_error(weights, tmp_path):
    command = [sys.executable, "explain.py", "--weight", str(weights / "gridtd.pth"), "--device", "cpu", "--caption",
               "a zebra", "--images", str(picture(tmp_path / "a.png")), "--save_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("settings: --weight ")
    assert done.stderr.startswith("error: --caption 'a zebra'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", [["--methods", "magic"], ["--decoding", "sample"], ["--beam_size", "0"]])
def test_unknown_choices(tmp_path, flag, capsys):
    with pytest.raises(SystemExit) as end:
        explain.get_args_parser().parse_args(["--weight", "x", "--images", "y", *flag])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_real_photographs(weights, shared_data, tmp_path):
    paths = sorted((shared_data / "coco_sample" / "val2017").glob("*.jpg"))[:2]
    run(weights / "aoa.pth", paths, tmp_path, "--caption", "a dog runs")
    for path in paths:
        colour = np.asarray(Image.open(tmp_path / path.stem / "lrp.png").convert("RGB")).astype(int)
        assert (np.ptp(colour, axis=2) > 100).mean() > 0.01
