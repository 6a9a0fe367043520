"""explain.py: one folder per image with the model's explanations, and one page for all of them."""
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import explain
from aoamodel import AOAModel
from captioning import checkpoint, decoding, grounding
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import build
from captioning.errors import InputError
from captioning.explanation.methods import SPLIT
from captioning.metrics.object_words import Objects
from captioning.report import explanations
from gridTDmodel import GridTDModel

ROOT = Path(__file__).parents[1]
WORDS = build([["a", "dog", "runs", "fast"]], 1)
ORIENTATION = 0x0112        # EXIF tag


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


def make_image(path, size=(90, 60), seed=0):
    """Writes an image of random pixels; size: width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def run(weight, images, save_path, *flags):
    explain.main(explain.get_args_parser().parse_args(
        ["--weight", str(weight), "--images", *map(str, images), "--save_path", str(save_path), "--device", "cpu",
         "--max_len", "4", *flags]))


def run_data_set(weight, data, save_path, *flags):
    explain.main(explain.get_args_parser().parse_args(
        ["--weight", str(weight), "--dataset", "demo", "--data_folder", str(data), "--save_path", str(save_path),
         "--device", "cpu", "--methods", "attention", "--caption", "a dog", *flags]))


def page_entries(folder):
    html = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(html.split('type="application/json" id="data">')[1].split("</script>")[0])


def page_names(folder):
    return [entry["name"] for entry in page_entries(folder)]


def stored(folder):
    """The arrays of a folder's explanation."""
    with np.load(folder / "explanation.npz") as arrays:
        return dict(arrays)


# -- arrays and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_arrays_equal_the_models_explanations(weights, tmp_path, kind, capsys):
    paths = [make_image(tmp_path / "in" / f"{name}.png", (90 - 20 * i, 60), i) for i, name in enumerate("abc")]
    run(weights / f"{kind}.pth", paths, tmp_path / "out", "--methods", "lrp", "grad_cam", "attention", "--caption",
        "A dog runs!", "--batch_size", "2")
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    captions = torch.tensor([WORDS.encode(["a", "dog", "runs"], 3)])
    output = capsys.readouterr().out
    for path in paths:
        expected = model.lrp(preprocess(read_image(path), 112)[None], captions)
        arrays = stored(tmp_path / "out" / path.stem)
        assert list(arrays["words"]) == ["<start>", "a", "dog", "runs", "<end>"]
        for name, value in (("lrp_words", expected.words[0]), ("lrp_regions", expected.features[0].sum(-1)),
                            ("logits", expected.targets[0]),
                            ("attention", expected.attention[0]),
                            *((f"lrp_{part}", getattr(expected, part)[0]) for part in SPLIT)):
            assert np.allclose(arrays[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item()), name
        pixels = expected.pixels[0].sum(1).numpy()      # rounded
        error = np.abs(arrays["lrp_pixels"] - pixels).max((1, 2))
        assert (error > 0).all() and (error <= np.abs(pixels).max((1, 2)) / 255).all()
        assert arrays["grad_cam_pixels"].shape == (4, 112, 112) and "attention_pixels" not in arrays
        assert str(arrays["image"]) == str(path) and bool(arrays["upright"])
        lines = output.split(f"{path.name}: a dog runs\n")[1].splitlines()[:5]
        assert lines[0].split() == ["word", "probability", "image", "words", "<start>", "rest"]
        for t, word in enumerate(["a", "dog", "runs", "<end>"]):
            numbers = [expected.logits[0, t].softmax(0)[captions[0, t + 1]], expected.image[0, t],
                       expected.previous[0, t], expected.start[0, t], expected.rest[0, t]]
            shown = lines[t + 1].split()
            assert shown[0] == word and np.allclose([float(n) for n in shown[1:]], numbers, atol=0.0051)


def test_files_of_an_image(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(GridTDModel, "attention", None)     # the other methods provide the attention weights, too
    run(weights / "gridtd.pth", [make_image(tmp_path / "a.png")], tmp_path / "out", "--methods", *explain.METHODS,
        "--caption", "a dog")
    names = {path.name for path in (tmp_path / "out" / "a").iterdir()}
    others = {"explanation.npz", "entry.html", "thumbnail.webp"}
    assert names == others | {f"{method}.png" for method in explain.METHODS} | {
        f"words_{method}.png" for method in explain.METHODS if method != "attention"}
    for path in (tmp_path / "out" / "a").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 3


def test_captions_of_different_lengths_in_one_batch(weights, tmp_path, monkeypatch):
    rows = torch.tensor([WORDS.encode(["a", "dog"], 4) + [0, 0], WORDS.encode(["a", "dog", "runs", "fast"], 4)])
    monkeypatch.setattr(explain, "captions_to_explain", lambda *_: rows)
    paths = [make_image(tmp_path / "a.png"), make_image(tmp_path / "b.png", seed=1)]
    run(weights / "aoa.pth", paths, tmp_path / "out", "--methods", "lrp")
    short, long = (stored(tmp_path / "out" / name) for name in "ab")
    assert short["lrp_words"].shape == (3, 3) and long["lrp_words"].shape == (5, 5)
    assert short["lrp_pixels"].shape == (3, 112, 112) and short["attention"].shape == (3, 2, 49)


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_contrast(weights, tmp_path, kind):
    path = make_image(tmp_path / "a.png")
    run(weights / f"{kind}.pth", [path], tmp_path / "out", "--caption", "a dog", "--contrast", "runs", "--methods",
        *explain.METHODS)
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    images, captions = preprocess(read_image(path), 112)[None], torch.tensor([WORDS.encode(["a", "dog"], 2)])
    arrays = stored(tmp_path / "out" / "a")
    logits = model(images, captions)[0].detach()
    difference = logits[range(3), captions[0, 1:]] - logits[:, WORDS.wordmap["runs"]]
    assert np.allclose(arrays["logits"], difference, atol=1e-5)
    of_word, of_contrast = (model.gradient(images, ids).pixels[0].sum(1) for ids in (
        captions, torch.tensor([[captions[0, 0], WORDS.wordmap["runs"], captions[0, 2]]])))
    expected = (of_word[0] - of_contrast[0]).numpy()
    assert np.abs(arrays["gradient_pixels"][0] - expected).max() <= np.abs(expected).max() / 255
    probabilities = model(images, captions)[0].softmax(1)[:, WORDS.wordmap["runs"]].detach()
    assert np.allclose(arrays["contrast_probabilities"], probabilities, atol=1e-6)
    contrast = page_entries(tmp_path / "out")[0]["contrast"]
    assert contrast["word"] == "runs" and np.allclose(contrast["p"], probabilities, atol=1e-3)


def test_attention_alone_needs_no_backward_pass(weights, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a backward pass was run")
    monkeypatch.setattr(torch.autograd, "grad", fail)
    monkeypatch.setattr(torch.autograd, "backward", fail)
    for kind in ("gridtd", "aoa"):
        run(weights / f"{kind}.pth", [make_image(tmp_path / "a.png")], tmp_path / kind, "--methods", "attention",
            "--contrast", "runs")
        with pytest.raises(AssertionError, match="backward"):
            run(weights / f"{kind}.pth", [tmp_path / "a.png"], tmp_path / kind, "--methods", "gradient")


def test_the_progress_bar_advances_within_a_batch(weights, tmp_path, monkeypatch):
    class Bar(explain.tqdm):
        updates = []

        def update(self, n=1):
            self.updates.append(n)
            super().update(n)

        def close(self):
            assert self.n == self.total == sum(self.updates)
            super().close()
    monkeypatch.setattr(explain, "tqdm", Bar)
    paths = [make_image(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")]
    paths[1].write_bytes(b"not an image")
    run(weights / "gridtd.pth", paths, tmp_path / "out", "--methods", "lrp", "gradient", "attention", "--skip_broken")
    assert Bar.updates == [4, 2, 2, 2, 1, 1]        # the broken image, three methods of two images, drawing each


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, options", [
    (["--decoding", "greedy"], {"method": "greedy"}),
    ([], {"method": "beam_search", "beam_size": 3}),
    (["--length_penalty", "2", "--beam_size", "5"], {"method": "beam_search", "beam_size": 5, "length_penalty": 2}),
    (["--decoding", "diverse_beam_search", "--diversity", "9"], {"method": "diverse_beam_search", "diversity": 9.0}),
    (["--decoding", "greedy", "--block_trigrams"], {"method": "greedy", "block_trigrams": True}),
    (["--decoding", "sample", "--temperature", "3", "--top_k", "4", "--top_p", "0.9"],
     {"method": "sample", "temperature": 3, "top_k": 4, "top_p": 0.9})])
def test_captions_are_decoded_as_the_flags_specify(weights, tmp_path, flags, options):
    path = make_image(tmp_path / "a.png")
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "attention", "--max_len", "12", *flags)
    torch.manual_seed(1)        # the default of --seed; as in explain.py, the model is loaded after it
    model, _ = checkpoint.load(weights / "gridtd.pth")
    with torch.no_grad():
        features = model.encode(preprocess(read_image(path), 112)[None])
        tokens = decoding.decode(model, features, WORDS, max_len=12, **options)[0]
    assert list(stored(tmp_path / "out" / "a")["words"]) == ["<start>", *(WORDS.words[i] for i in tokens.tolist() if i)]


# -- captions of other systems, flags and grounded decoding ------------------------------------------------------------


def write_captions(path, items):
    path.write_text(json.dumps(items), encoding="utf-8")
    return str(path)


def test_captions_of_other_systems(weights, tmp_path, capsys):
    paths = [make_image(tmp_path / name) for name in ("COCO_val_0000000007.png", "b.png")]
    file = write_captions(tmp_path / "results.json", [
        {"image_id": 7, "caption": "A dog runs."}, {"image": "b.png", "caption": "a"},
        {"image": "c.png", "caption": "x"}])
    flags = ("--methods", "attention", "--captions", file)
    run(weights / "aoa.pth", paths, tmp_path / "out", *flags, "--quiet", "--shared_scale")
    output = capsys.readouterr().out
    assert "b.png: a\n" in output and "COCO_val_0000000007.png: a dog runs\n" in output and "probability" not in output
    assert list(stored(tmp_path / "out" / "b")["words"]) == ["<start>", "a", "<end>"]
    assert bool(stored(tmp_path / "out" / "b")["shared_scale"])
    write_captions(tmp_path / "results.json", [{"image_id": 7, "caption": "a dog runs"}, {"image": "b.png", "caption":
                                                                                         "a dog"}])
    run(weights / "aoa.pth", paths, tmp_path / "out", *flags, "--shared_scale")
    assert list(stored(tmp_path / "out" / "b")["words"]) == ["<start>", "a", "dog", "<end>"]


def test_captions_with_unknown_words_are_skipped(weights, tmp_path):
    paths = [make_image(tmp_path / name) for name in ("a.png", "b.png")]
    file = write_captions(tmp_path / "results.json", [{"image": "a.png", "caption": "a zebra"},
                                                      {"image": "b.png", "caption": "a dog"}])
    with pytest.raises(InputError, match=r"1 of 2 images were skipped.*the caption of a\.png 'a zebra'.*: zebra"):
        run(weights / "gridtd.pth", paths, tmp_path / "out", "--methods", "attention", "--captions", file)
    assert page_names(tmp_path / "out") == ["b"]
    paths.append(make_image(tmp_path / "c.png"))
    with pytest.raises(InputError, match=r"lacks captions for 1 of 3 images, c\.png first"):
        run(weights / "gridtd.pth", paths, tmp_path / "out", "--methods", "attention", "--captions", file)


@pytest.fixture
def calibrated(weights, tmp_path):
    """A checkpoint with a calibration by which every object word is flagged; "dog" is the only object word."""
    path = tmp_path / "model.pth"
    path.write_bytes((weights / "gridtd.pth").read_bytes())
    model, _ = checkpoint.load(path)
    grounding.save(path, model, 2.0, 2.0, Objects({"dog": "dog"}))
    return path


def test_flags(calibrated, tmp_path, capsys):
    image = make_image(tmp_path / "a.png")
    run(calibrated, [image], tmp_path / "out", "--methods", "lrp", "--caption", "a dog runs")
    assert stored(tmp_path / "out" / "a")["flags"].tolist() == [False, True, False, False]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "from language" in line] == ["dog"]
    run(calibrated, [image], tmp_path / "out", "--methods", "lrp", "--caption", "a dog runs", "--contrast", "fast")
    assert "flags" not in stored(tmp_path / "out" / "a")


def test_grounded_captions(calibrated, weights, tmp_path, monkeypatch):
    def preferring_dogs(model, *arguments, **options):
        model.W_o.bias.data[WORDS.wordmap["dog"]] = 9
        return decoding.decode(model, *arguments, **options)
    monkeypatch.setattr(grounding, "decode", preferring_dogs)
    image = make_image(tmp_path / "a.png")
    run(calibrated, [image], tmp_path / "out", "--methods", "attention", "--grounded")
    assert "dog" not in stored(tmp_path / "out" / "a")["words"]
    with pytest.raises(InputError, match=r"gridtd_grounding\.json is missing: --grounded requires"):
        run(weights / "gridtd.pth", [image], tmp_path / "out", "--grounded")
    with pytest.raises(InputError, match="at most one of"):
        run(calibrated, [image], tmp_path / "out", "--grounded", "--caption", "a dog")


def settings(*flags):
    args = explain.get_args_parser().parse_args(["--weight", "x", "--images", "y", *flags])
    return explain.settings_of(args, args.methods, make_model("gridtd"), None)


def test_an_explanation_depends_on_its_decoding_options():
    for flags in (["--block_trigrams"], ["--length_penalty", "1"], ["--max_len", "9"], ["--beam_size", "2"]):
        assert settings(*flags) != settings()
    sampling = ["--decoding", "sample"]
    for flags in (["--temperature", "2"], ["--top_k", "3"], ["--top_p", "0.5"], ["--seed", "2"]):
        assert settings(*sampling, *flags) != settings(*sampling)
    assert settings("--seed", "2") == settings()        # nothing is random in beam search
    assert settings("--caption", "a", "--beam_size", "2") == settings("--caption", "a")
    assert settings("--grounded") != settings() != settings("--shared_scale")


# -- folders and the page ----------------------------------------------------------------------------------------------


def test_images_with_the_same_stem_get_different_folders(tmp_path):
    paths = [Path(name) for name in ("x/a.jpg", "y/a.jpg", "a.png", "b.jpg", "a.jpg_0.png", "z/a.jpg_0.png")]
    names = [folder.name for folder in explanations.choose_folders(paths, tmp_path)]
    assert len(set(names)) == len(names) and names[3] == "b"
    paths = [Path("x/a.jpg"), Path("y/a.jpg"), Path("a.jpg_0.png")]
    assert len(set(explanations.choose_folders(paths, tmp_path))) == 3


def test_later_commands_do_not_overwrite_other_images_of_the_same_name(weights, tmp_path):
    first, second, third = (make_image(tmp_path / name / "a.png", seed=i) for i, name in enumerate("xyz"))
    flags = ("--methods", "attention", "--caption", "a dog")
    run(weights / "gridtd.pth", [first], tmp_path / "out", *flags)
    before = stored(tmp_path / "out" / "a")
    run(weights / "gridtd.pth", [second], tmp_path / "out", *flags)
    after = stored(tmp_path / "out" / "a")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    run(weights / "gridtd.pth", [third, second], tmp_path / "out", *flags)      # `second` keeps its folder
    images = {folder.name: str(stored(folder)["image"]) for folder in explanations.stored_folders(tmp_path / "out")}
    assert sorted(images.values()) == sorted(map(str, (first, second, third))) and images["a"] == str(first)
    assert page_names(tmp_path / "out") == ["a.png_0", "a_2", "a"]


def test_the_page_shows_the_explanations_of_earlier_commands(weights, tmp_path):
    paths = {name: make_image(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")}
    run(weights / "gridtd.pth", [paths["c"], paths["a"]], tmp_path / "out", "--methods", "lrp", "--caption", "a dog")
    run(weights / "gridtd.pth", [paths["b"]], tmp_path / "out", "--methods", "attention", "--caption", "a")
    first, *others = page_entries(tmp_path / "out")
    assert [first["name"], *(entry["name"] for entry in others)] == ["b", "a", "c"]
    assert [list(entry["methods"]) for entry in (first, *others)] == [["attention"], ["lrp"], ["lrp"]]
    run(weights / "gridtd.pth", [paths["c"]], tmp_path / "out", "--methods", "attention", "--caption", "a dog runs")
    assert [(entry["name"], entry["caption"]) for entry in page_entries(tmp_path / "out")] == [
        ("c", "a dog runs"), ("a", "a dog"), ("b", "a")]


def test_explanations_that_cannot_be_shown_are_omitted_from_the_page(weights, tmp_path, capsys):
    paths = {name: make_image(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abcde")}
    flags = ("--methods", "attention", "--caption", "a dog")
    run(weights / "gridtd.pth", paths.values(), tmp_path / "out", *flags)
    paths["a"].unlink()         # which the page does not need
    (tmp_path / "out" / "b" / "explanation.npz").write_bytes(b"cut short")
    (tmp_path / "out" / "c" / "entry.html").unlink()       # as written by earlier versions
    killed = tmp_path / "out" / "e.elsewhere.123.tmp"
    (tmp_path / "out" / "e").rename(killed)
    capsys.readouterr()
    run(weights / "gridtd.pth", [paths["d"]], tmp_path / "out", *flags)
    assert page_names(tmp_path / "out") == ["d", "a"]
    (sentence,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("omitted from "))
    assert "b (its explanation.npz cannot be read)" in sentence
    assert "c (its entry.html or thumbnail.webp is missing" in sentence
    run(weights / "gridtd.pth", list(paths.values())[1:4], tmp_path / "out", *flags)
    assert page_names(tmp_path / "out") == ["b", "c", "d", "a"]


def test_a_new_folder_appears_only_when_complete(weights, tmp_path, monkeypatch):
    path = make_image(tmp_path / "a.png")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space"):
        patch.setattr(explanations.np, "savez_compressed", fail)
        run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "attention")
    assert not [entry for entry in (tmp_path / "out").iterdir() if entry.is_dir()]


def test_other_settings_replace_an_explanation_but_no_other_files(weights, tmp_path):
    path = make_image(tmp_path / "a.png")
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "grad_cam", "--caption", "a dog")
    (tmp_path / "out" / "a" / "mine.txt").write_text("notes")
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "attention", "--caption", "a")
    assert {p.name for p in (tmp_path / "out" / "a").iterdir()} == {"attention.png", "explanation.npz", "mine.txt",
                                                                    "entry.html", "thumbnail.webp"}
    assert list(stored(tmp_path / "out" / "a")["words"]) == ["<start>", "a", "<end>"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "index.html", "log.txt", "settings.json"]


def test_existing_explanations_are_not_computed_again(weights, tmp_path, monkeypatch):
    paths = [make_image(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")]
    batch_sizes = []
    explain_batch = explain.explain_batch

    def counting(model, vocabulary, images, *arguments):
        batch_sizes.append(len(images))
        return explain_batch(model, vocabulary, images, *arguments)
    monkeypatch.setattr(explain, "explain_batch", counting)
    flags = ("--methods", "attention", "--caption", "a dog")
    run(weights / "gridtd.pth", paths[:2], tmp_path / "out", *flags)
    before = (tmp_path / "out" / "a" / "explanation.npz").stat().st_mtime_ns
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    assert batch_sizes == [2, 1] and (tmp_path / "out" / "a" / "explanation.npz").stat().st_mtime_ns == before
    assert page_names(tmp_path / "out") == ["a", "b", "c"]
    make_image(paths[1], seed=9)        # the file is replaced by another image
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    (tmp_path / "out" / "c" / "explanation.npz").write_bytes(b"cut short")
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    run(weights / "gridtd.pth", paths, tmp_path / "out", *flags, "--overwrite")
    run(weights / "aoa.pth", paths, tmp_path / "out", *flags)
    assert batch_sizes == [2, 1, 1, 1, 3, 3]


def test_names_of_images_cannot_lead_out_of_the_output_folder(weights, tmp_path):
    """The stem of "...jpg" is "..", and that of "index.html.jpg" is the name of the page."""
    make_image(tmp_path / "precious.png")
    names = ["...jpg", "..jpg", ". .jpg", "index.html.jpg", "$\\frac{$.jpg", "a.1.tmp.jpg", os.fsdecode(b"\xff.jpg")]
    for i, name in enumerate(names):
        make_image(tmp_path / "in" / "x.jpg", seed=i).rename(tmp_path / "in" / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        run(weights / "gridtd.pth", [tmp_path / "in" / name for name in names], tmp_path / "out" / "inner",
            "--methods", "attention", "--caption", "a dog")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inner"]
    folders = [path for path in (tmp_path / "out" / "inner").iterdir() if path.is_dir()]
    assert len(folders) == len(names) and len(page_entries(tmp_path / "out" / "inner")) == len(names)


DAMAGES = {"empty": lambda path: path.write_bytes(b""), "deleted": Path.unlink,
           "flipped": lambda path: path.write_bytes(bytes(255 - byte if i == path.stat().st_size // 2 else byte
                                                          for i, byte in enumerate(path.read_bytes()))),
           "missing": lambda path: np.savez(path, **{k: v for k, v in np.load(path).items() if k != "logits"}),
           "wrong type": lambda path: np.savez(path, **dict(np.load(path)) | {"words": np.zeros(4)}),
           "wrong shape": lambda path: np.savez(path, **dict(np.load(path)) | {"logits": np.zeros(4)}),
           "not finite": lambda path: np.savez(path, **dict(np.load(path)) | {"logits": np.full(3, np.nan)})}


@pytest.mark.parametrize("damage", [*DAMAGES, "image", "pipe"])
def test_a_damaged_explanation_is_replaced(weights, tmp_path, damage):
    path, folder = make_image(tmp_path / "a.png"), tmp_path / "out" / "a"
    flags = ("--methods", "attention", "--caption", "a dog")
    run(weights / "gridtd.pth", [path], tmp_path / "out", *flags)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    if damage == "image":
        (folder / "attention.png").write_bytes(before["attention.png"][:-100])
    elif damage == "pipe":
        (folder / "entry.html").unlink()
        os.mkfifo(folder / "entry.html")
    else:
        DAMAGES[damage](folder / "explanation.npz")
    identity = str(np.load(io.BytesIO(before["explanation.npz"]))["identity"])
    assert not explanations.is_explained(folder, identity)
    run(weights / "gridtd.pth", [path], tmp_path / "out", *flags)
    assert before.keys() == {file.name for file in folder.iterdir()} and page_names(tmp_path / "out") == ["a"]
    assert before["attention.png"] == (folder / "attention.png").read_bytes()
    assert explanations.is_explained(folder, identity)


def test_a_pipe_in_place_of_an_explained_image_is_refused(weights, tmp_path):
    path, flags = make_image(tmp_path / "a.png"), ("--methods", "attention", "--caption", "a dog")
    run(weights / "gridtd.pth", [path], tmp_path / "out", *flags)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="none of the images"):
        run(weights / "gridtd.pth", [path], tmp_path / "out", *flags)


# -- images ------------------------------------------------------------------------------------------------------------


def rotated_jpeg(path):
    """A JPEG of 60×90 pixels, displayed upright, that is stored as 90×60 pixels with EXIF orientation 6."""
    ramp = np.linspace(0, 255, 90).astype(np.uint8)[:, None].repeat(60, 1)
    upright = Image.fromarray(np.dstack([ramp, ramp, 255 - ramp]))
    exif = Image.Exif()
    exif[ORIENTATION] = 6       # the viewer rotates by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    return upright


def test_images_are_explained_and_shown_upright(weights, tmp_path, monkeypatch):
    path = tmp_path / "portrait.jpg"
    upright = rotated_jpeg(path)
    drawn, draw_heatmaps = [], explanations.draw_heatmaps
    monkeypatch.setattr(explanations, "draw_heatmaps",
                        lambda file, image, *rest, **options: drawn.append(image) or draw_heatmaps(file, image, *rest,
                                                                                                   **options))
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "lrp", "--caption", "a dog")
    image = read_image(path, upright=True)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(upright)).mean() < 3
    model, _ = checkpoint.load(weights / "gridtd.pth")
    expected = model.lrp(preprocess(image, 112)[None], torch.tensor([WORDS.encode(["a", "dog"], 2)]))
    pixels = expected.pixels[0].sum(1).numpy()
    assert np.allclose(stored(tmp_path / "out" / "portrait")["lrp_pixels"], pixels, atol=np.abs(pixels).max() / 255)
    assert drawn[0].shape == (90, 60, 3)
    assert shown_size(tmp_path / "out", 0) == (60, 90)
    other = make_image(tmp_path / "other.png")      # the page is rebuilt by a later command
    run(weights / "gridtd.pth", [other], tmp_path / "out", "--methods", "lrp", "--caption", "a dog")
    assert page_names(tmp_path / "out") == ["other", "portrait"] and shown_size(tmp_path / "out", 1) == (60, 90)


def shown_size(folder, index):
    """Width and height of the image of the page's entry."""
    data = page_entries(folder)[index]["image"].split("base64,")[1]
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def test_images_of_a_data_set_keep_their_stored_orientation(weights, tmp_path, monkeypatch):
    path = tmp_path / "portrait.jpg"
    rotated_jpeg(path)
    monkeypatch.setattr(explain, "split_images", lambda *_: {path: (["a dog"], None)})
    run_data_set(weights / "gridtd.pth", tmp_path, tmp_path / "out")
    assert not bool(stored(tmp_path / "out" / "portrait")["upright"]) and shown_size(tmp_path / "out", 0) == (90, 60)
    run(weights / "gridtd.pth", [make_image(tmp_path / "b.png")], tmp_path / "out", "--caption", "a dog")
    assert shown_size(tmp_path / "out", 1) == (90, 60)


def test_images_of_a_folder_are_sorted_and_unique(tmp_path):
    for name in ("b.png", "a.PNG", "c.png"):
        make_image(tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    paths = explain.find_images([str(tmp_path), str(tmp_path / "c.png")])
    assert [path.name for path in paths] == ["a.PNG", "b.png", "c.png"]


def test_images_of_a_split(weights, demo_data, tmp_path):
    run_data_set(weights / "gridtd.pth", demo_data, tmp_path, "--split", "val", "--max_images", "3")
    assert page_names(tmp_path) == ["val_00000", "val_00001", "val_00002"]
    boxes = load_boxes(demo_data / "demo" / "boxes_demo.json")["val_00001.png"]
    entry, data = page_entries(tmp_path)[1], CaptionDataset(demo_data, "demo", "val")
    assert entry["references"] == data.references[1] and entry["settings"]["captions"] == "given"
    assert {item["name"] for item in entry["objects"]} == set(boxes["categories"])
    corners = [corners for category in boxes["bbox"].values() for corners in category]
    assert sorted(item["box"] for item in entry["objects"]) == sorted(np.round(np.array(corners) / 112, 4).tolist())
    assert "explain.py" in json.loads((tmp_path / "settings.json").read_text())
    with pytest.raises(InputError, match="either --images"):
        run_data_set(weights / "gridtd.pth", demo_data, tmp_path, "--images", "x.png")


def test_images_that_cannot_be_read_are_skipped(weights, tmp_path, capsys):
    good, bad = make_image(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match=r"1 of 2 images were skipped.*bad\.png") as caught:
        run(weights / "gridtd.pth", [bad, good], tmp_path / "out", "--methods", "attention")
    assert "\n" not in str(caught.value) and page_names(tmp_path / "out") == ["good"]
    run(weights / "gridtd.pth", [bad, good], tmp_path / "out", "--skip_broken", "--methods", "attention")
    assert "skipped: " in capsys.readouterr().out and (tmp_path / "out" / "good" / "attention.png").exists()
    with pytest.raises(InputError, match="none of the images"):
        run(weights / "gridtd.pth", [bad], tmp_path / "out", "--skip_broken")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--caption", "a zebra runs past"], "vocabulary.*: zebra, past"), (["--caption", "?!"], "contains no words"),
    (["--contrast", "zebra"], "--contrast 'zebra'.*vocabulary.*: zebra"), (["--contrast", "a dog"], "must be one word"),
    (["--images", "nowhere.jpg"], "does not exist"), (["--weight", "nowhere.pth"], "cannot be read"),
    (["--weight", "regions.pth"], "region features"), (["--images", "empty"], "contains no images")])
def test_bad_input_is_reported_in_one_sentence(weights, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    flags = [str(weights / flag) if flag == "regions.pth" else flag for flag in flags]
    with pytest.raises(InputError, match=message) as caught:
        run(weights / "gridtd.pth", [make_image(Path("a.png"))], "out", *flags)
    assert "\n" not in str(caught.value)


def test_exit_status_and_standard_error(weights, tmp_path):
    command = [sys.executable, "explain.py", "--weight", str(weights / "gridtd.pth"), "--device", "cpu", "--caption",
               "a zebra", "--images", str(make_image(tmp_path / "a.png")), "--save_path", str(tmp_path / "out")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout.startswith("settings: --weight ")
    assert process.stderr.startswith("error: --caption 'a zebra'") and process.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", [["--methods", "magic"], ["--decoding", "magic"], ["--beam_size", "0"]])
def test_invalid_flags(tmp_path, flag, capsys):
    with pytest.raises(SystemExit) as end:
        explain.get_args_parser().parse_args(["--weight", "x", "--images", "y", *flag])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_real_photographs(weights, shared_data, tmp_path):
    paths = sorted((shared_data / "coco_sample" / "val2017").glob("*.jpg"))[:2]
    run(weights / "aoa.pth", paths, tmp_path, "--caption", "a dog runs")
    for path in paths:
        colour = np.asarray(Image.open(tmp_path / path.stem / "lrp.png").convert("RGB")).astype(int)
        assert (np.ptp(colour, axis=2) > 100).mean() > 0.01
