"""explain.py: a folder for every picture, with the model's own numbers in it."""
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

import explain
from aoamodel import AOAModel
from captioning import checkpoint, decoding
from captioning.errors import InputError
from captioning.images import preprocess, read_image
from captioning.vocabulary import build
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
        tokens = decoding.decode(model, features, WORDS, method, 4, 3)[0]
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


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.found += [unquote(value) for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_index_links_to_every_picture(weights, tmp_path):
    paths = [picture(tmp_path / "in" / name) for name in ("a b#1.png", "<i>&.png")]
    run(weights / "gridtd.pth", paths, tmp_path / "out", "--methods", "grad_cam", "attention", "--caption", "a dog")
    links = Links()
    links.feed((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert len(links.found) == 2 * 2 * 3 and all((tmp_path / "out" / link).is_file() for link in links.found)
    assert links.text.count("a dog") == 2 and "<i>&" in links.text


def test_broken_pictures_can_be_left_out(weights, tmp_path, capsys):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match="bad.png"):
        run(weights / "gridtd.pth", [bad, good], tmp_path / "out")
    run(weights / "gridtd.pth", [bad, good], tmp_path / "out", "--skip_broken", "--methods", "attention")
    assert "left out" in capsys.readouterr().out and (tmp_path / "out" / "good" / "attention.png").exists()
    with pytest.raises(InputError, match="none of the pictures"):
        run(weights / "gridtd.pth", [bad], tmp_path / "out", "--skip_broken")


@pytest.mark.parametrize("flags, message", [
    (["--caption", "a zebra runs past"], "vocabulary: zebra, past"), (["--caption", "?!"], "holds no words"),
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
