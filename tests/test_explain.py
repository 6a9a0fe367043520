"""explain.py: one folder per image with the model's explanations, and one page for all of them."""
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import pixels
from PIL import Image

import explain
from aoamodel import AOAModel
from captioning import checkpoint, decoding, grounding
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import build
from captioning.errors import InputError
from captioning.explanation.methods import METHODS, SPLIT, Method
from captioning.metrics.object_words import Objects
from captioning.report import explained_image, explanations
from captioning.report.explained_image import ExplainedImage
from gridTDmodel import GridTDModel

ROOT = Path(__file__).parents[1]
WORDS = build([["a", "dog", "runs", "fast"]], 1)
ORIENTATION = 0x0112        # EXIF tag
ATTENTION = ("--methods", "attention", "--caption", "a dog")


def make_model(kind, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "embed_dim": 8, "hidden_dim": 8, "encoder": "small"}
    if kind == "gridtd":
        return GridTDModel(**sizes | options, attention_dim=6)
    return AOAModel(**sizes | options, num_head=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("gridtd", "aoa"):
        checkpoint.save(folder / f"{kind}.pth", make_model(kind), WORDS)
    of_regions = make_model("gridtd", encoder=None, feature_dim=5)
    checkpoint.save(folder / "regions.pth", of_regions, WORDS)
    return folder


def make_image(path, size=(90, 60), seed=0):
    """Writes an image of random pixels; size: width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def make_images(folder, names):
    return [make_image(folder / f"{name}.png", seed=i) for i, name in enumerate(names)]


def arguments(weight, images, save_path, *flags):
    return explain.get_args_parser().parse_args(
        ["--weight", str(weight), "--images", *map(str, images), "--save_path", str(save_path),
         "--device", "cpu", "--max_len", "4", *flags])


def run(*args):
    explain.main(arguments(*args))


def run_data_set(weight, data, save_path, *flags):
    explain.main(explain.get_args_parser().parse_args(
        ["--weight", str(weight), "--dataset", "demo", "--data_folder", str(data), "--save_path",
         str(save_path), "--device", "cpu", *ATTENTION, *flags]))


def page_entries(folder):
    html = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(html.split('type="application/json" id="data">')[1].split("</script>")[0])


def page_names(folder):
    return [entry["name"] for entry in page_entries(folder)]


def stored(folder):
    """The arrays of a folder's explanation."""
    with np.load(folder / "explanation.npz") as arrays:
        return dict(arrays)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


# -- arrays and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_arrays_equal_the_models_explanations(weights, tmp_path, kind, capsys):
    paths = [make_image(tmp_path / "in" / f"{name}.png", (90 - 20 * i, 60), i)
             for i, name in enumerate("abc")]
    run(weights / f"{kind}.pth", paths, tmp_path / "out", "--methods", "lrp", "grad_cam",
        "attention", "--caption", "A dog runs!", "--batch_size", "2")
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    captions = torch.tensor([WORDS.encode(["a", "dog", "runs"], 3)])
    output = capsys.readouterr().out
    for path in paths:
        expected = model.lrp(preprocess(read_image(path), 112)[None], captions)
        arrays = stored(tmp_path / "out" / path.stem)
        assert list(arrays["words"]) == ["<start>", "a", "dog", "runs", "<end>"]
        values = {"lrp_words": expected.words[0], "lrp_regions": expected.features[0].sum(-1),
                  "logits": expected.targets[0], "attention": expected.attention[0],
                  "conservation": expected.conservation[0],
                  **{f"lrp_{part}": getattr(expected, part)[0] for part in SPLIT}}
        for name, value in values.items():
            error = 1e-5 * value.abs().max().item()
            assert np.allclose(arrays[name], value, rtol=1e-4, atol=error), name
        relevance = expected.pixels[0].sum(1).numpy()      # rounded
        error = np.abs(arrays["lrp_pixels"] - relevance).max((1, 2))
        assert (error > 0).all() and (error <= np.abs(relevance).max((1, 2)) / 255).all()
        assert arrays["grad_cam_pixels"].shape == (4, 112, 112)
        assert "attention_pixels" not in arrays
        assert str(arrays["image"]) == str(path) and bool(arrays["upright"])

        lines = output.split(f"{path.name}: a dog runs\n")[1].splitlines()[:5]
        assert lines[0].split() == ["word", "probability", "image", "words", "<start>", "rest"]
        for t, word in enumerate(["a", "dog", "runs", "<end>"]):
            p = expected.logits[0, t].softmax(0)[captions[0, t + 1]]
            numbers = [p, expected.image[0, t], expected.previous[0, t], expected.start[0, t],
                       expected.rest[0, t]]
            shown = lines[t + 1].split()
            assert shown[0] == word
            assert np.allclose([float(number) for number in shown[1:]], numbers, atol=0.0051)


def test_files_of_an_image_and_their_loading(weights, tmp_path):
    run(weights / "gridtd.pth", [make_image(tmp_path / "a.png")], tmp_path / "out", "--methods",
        *METHODS, "--caption", "a dog")
    folder = tmp_path / "out" / "a"
    others = {"explanation.npz", "entry.html", "thumbnail.webp"}
    assert names_in(folder) == others | {f"{method}.png" for method in METHODS}
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 3
    loaded = ExplainedImage.load(folder)
    assert loaded.words == ["a", "dog", "<end>"] and [*loaded.methods] == [*METHODS]
    assert loaded.image.size == (90, 60) and loaded.heatmap("dog", "attention").shape == (60, 90)
    loaded.save(tmp_path / "again", with_page=False)
    again = stored(tmp_path / "again")
    for name, array in stored(folder).items():
        assert np.array_equal(array, again[name]), name


def test_a_method_that_is_registered_at_run_time(weights, tmp_path, monkeypatch):
    """Squared gradients: shown and stored as any other method, without further code."""
    def squared(model, *inputs, **options):
        explanation = model.gradient(*inputs, **options)
        explanation.pixels = explanation.pixels ** 2
        explanation.words = None
        return explanation
    monkeypatch.setitem(METHODS, "squared_gradient", Method(
        squared, "The squared gradient.", signed=False, has_words=False, labels=("none", "much")))
    path = make_image(tmp_path / "a.png")
    run(weights / "aoa.pth", [path], tmp_path / "out", "--methods", "squared_gradient", "lrp",
        "--caption", "a dog")
    folder = tmp_path / "out" / "a"
    model, _ = checkpoint.load(weights / "aoa.pth")
    captions = torch.tensor([WORDS.encode(["a", "dog"], 2)])
    expected = model.gradient(preprocess(read_image(path), 112)[None], captions).pixels[0]
    expected = (expected ** 2).sum(1).numpy()
    assert np.allclose(stored(folder)["squared_gradient_pixels"], expected,
                       atol=expected.max() / 255)
    assert "squared_gradient_words" not in stored(folder)
    assert pixels(folder / "squared_gradient.png").std() > 3
    entry = page_entries(tmp_path / "out")[0]
    shown = entry["methods"]["squared_gradient"]
    assert [*entry["methods"]] == ["squared_gradient", "lrp"] and len(shown["maps"]) == 3
    assert shown["help"] == "The squared gradient." and shown["labels"] == ["none", "much"]


def test_captions_of_different_lengths_in_one_batch(weights, tmp_path, monkeypatch):
    rows = torch.tensor([WORDS.encode(["a", "dog"], 4) + [0, 0],
                         WORDS.encode(["a", "dog", "runs", "fast"], 4)])
    monkeypatch.setattr(explain, "captions_of", lambda *_: rows)
    run(weights / "aoa.pth", make_images(tmp_path, "ab"), tmp_path / "out", "--methods", "lrp")
    short, long = (stored(tmp_path / "out" / name) for name in "ab")
    assert short["lrp_words"].shape == (3, 3) and long["lrp_words"].shape == (5, 5)
    assert short["lrp_pixels"].shape == (3, 112, 112) and short["attention"].shape == (3, 2, 49)


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_contrast(weights, tmp_path, kind):
    path = make_image(tmp_path / "a.png")
    run(weights / f"{kind}.pth", [path], tmp_path / "out", "--caption", "a dog", "--contrast",
        "runs", "--methods", *METHODS)
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    images = preprocess(read_image(path), 112)[None]
    captions = torch.tensor([WORDS.encode(["a", "dog"], 2)])
    other = WORDS.wordmap["runs"]
    arrays = stored(tmp_path / "out" / "a")
    logits = model(images, captions)[0].detach()
    difference = logits[range(3), captions[0, 1:]] - logits[:, other]
    assert np.allclose(arrays["logits"], difference, atol=1e-5)
    of_word = model.gradient(images, captions).pixels[0].sum(1)
    captions[0, 1] = other
    of_contrast = model.gradient(images, captions).pixels[0].sum(1)
    expected = (of_word[0] - of_contrast[0]).numpy()
    assert np.abs(arrays["gradient_pixels"][0] - expected).max() <= np.abs(expected).max() / 255
    probabilities = logits.softmax(1)[:, other]
    assert np.allclose(arrays["contrast_probabilities"], probabilities, atol=1e-6)
    contrast = page_entries(tmp_path / "out")[0]["contrast"]
    assert contrast["word"] == "runs" and np.allclose(contrast["p"], probabilities, atol=1e-3)


def test_attention_alone_needs_no_backward_pass(weights, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a backward pass was run")
    monkeypatch.setattr(torch.autograd, "grad", fail)
    monkeypatch.setattr(torch.autograd, "backward", fail)
    path = make_image(tmp_path / "a.png")
    for kind in ("gridtd", "aoa"):
        run(weights / f"{kind}.pth", [path], tmp_path / kind, "--methods", "attention",
            "--contrast", "runs")
        with pytest.raises(AssertionError, match="backward"):
            run(weights / f"{kind}.pth", [path], tmp_path / kind, "--methods", "gradient")


def test_the_progress_bar_advances_within_a_batch(weights, tmp_path, monkeypatch):
    updates = []

    class Bar(explain.tqdm):
        def update(self, n=1):
            updates.append(n)
            super().update(n)

        def close(self):
            assert self.n == self.total == sum(updates)
            super().close()
    monkeypatch.setattr(explain, "tqdm", Bar)
    paths = make_images(tmp_path, "abc")
    paths[1].write_bytes(b"not an image")
    run(weights / "gridtd.pth", paths, tmp_path / "out", "--methods", "lrp", "gradient",
        "attention", "--skip_broken")
    # the broken image, three methods of two images, drawing each
    assert updates == [4, 2, 2, 2, 1, 1]


# -- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, options", [
    (["--decoding", "greedy", "--block_trigrams"], {"method": "greedy", "block_trigrams": True}),
    ([], {"method": "beam_search", "beam_size": 3}),
    (["--length_penalty", "2", "--beam_size", "5"],
     {"method": "beam_search", "beam_size": 5, "length_penalty": 2}),
    (["--decoding", "diverse_beam_search", "--diversity", "9"],
     {"method": "diverse_beam_search", "diversity": 9.0}),
    (["--decoding", "sample", "--temperature", "3", "--top_k", "4", "--top_p", "0.9"],
     {"method": "sample", "temperature": 3, "top_k": 4, "top_p": 0.9})])
def test_captions_are_decoded_as_the_flags_specify(weights, tmp_path, flags, options):
    path = make_image(tmp_path / "a.png")
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "attention", *flags,
        "--max_len", "12")
    torch.manual_seed(1)        # the default of --seed; as there, before the model is loaded
    model, _ = checkpoint.load(weights / "gridtd.pth")
    with torch.no_grad():
        features = model.encode(preprocess(read_image(path), 112)[None])
        tokens = decoding.decode(model, features, WORDS, max_len=12, **options)[0].tolist()
    words = ["<start>", *(WORDS.words[i] for i in tokens if i)]
    assert list(stored(tmp_path / "out" / "a")["words"]) == words


def write_captions(path, captions):
    """{file name or image id: caption} as a file of captions."""
    path.write_text(json.dumps([{"image_id" if isinstance(key, int) else "image": key,
                                 "caption": text} for key, text in captions.items()]))
    return str(path)


def test_captions_of_other_systems(weights, tmp_path, capsys):
    paths = make_images(tmp_path, ["COCO_val_0000000007", "b"])
    file = tmp_path / "results.json"
    write_captions(file, {7: "A dog runs.", "b.png": "a", "c.png": "x"})
    flags = ("--methods", "attention", "--captions", str(file), "--quiet", "--shared_scale")
    run(weights / "aoa.pth", paths, tmp_path / "out", *flags)
    output = capsys.readouterr().out
    assert "b.png: a\n" in output and "COCO_val_0000000007.png: a dog runs\n" in output
    assert "probability" not in output
    assert list(stored(tmp_path / "out" / "b")["words"]) == ["<start>", "a", "<end>"]
    assert bool(stored(tmp_path / "out" / "b")["shared_scale"])
    write_captions(file, {7: "a dog runs", "b.png": "a dog"})
    run(weights / "aoa.pth", paths, tmp_path / "out", *flags)
    assert list(stored(tmp_path / "out" / "b")["words"]) == ["<start>", "a", "dog", "<end>"]


def test_captions_with_unknown_words_are_skipped(weights, tmp_path):
    paths = make_images(tmp_path, "ab")
    file = write_captions(tmp_path / "results.json", {"a.png": "a zebra", "b.png": "a dog"})
    flags = ("--methods", "attention", "--captions", file)
    message = r"1 of 2 images were skipped.*the caption of a\.png 'a zebra'.*: zebra"
    with pytest.raises(InputError, match=message):
        run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)
    assert page_names(tmp_path / "out") == ["b"]
    paths.append(make_image(tmp_path / "c.png"))
    with pytest.raises(InputError, match=r"lacks captions for 1 of 3 images, c\.png first"):
        run(weights / "gridtd.pth", paths, tmp_path / "out", *flags)


@pytest.fixture
def calibrated(weights, tmp_path):
    """A checkpoint by whose calibration each "dog", the only object word, is flagged."""
    path = tmp_path / "model.pth"
    path.write_bytes((weights / "gridtd.pth").read_bytes())
    grounding.save(path, checkpoint.load(path)[0], 2.0, 2.0, Objects({"dog": "dog"}))
    return path


def test_flags(calibrated, tmp_path, capsys):
    images = [make_image(tmp_path / "a.png")]
    flags = ("--methods", "lrp", "--caption", "a dog runs")
    run(calibrated, images, tmp_path / "out", *flags)
    assert stored(tmp_path / "out" / "a")["flags"].tolist() == [False, True, False, False]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "from language" in line] == ["dog"]
    run(calibrated, images, tmp_path / "out", *flags, "--contrast", "fast")
    assert "flags" not in stored(tmp_path / "out" / "a")


def test_grounded_captions(calibrated, weights, tmp_path, monkeypatch):
    def preferring_dogs(model, *inputs, **options):
        model.W_o.bias.data[WORDS.wordmap["dog"]] = 9
        return decoding.decode(model, *inputs, **options)
    monkeypatch.setattr(grounding, "decode", preferring_dogs)
    image = make_image(tmp_path / "a.png")
    run(calibrated, [image], tmp_path / "out", "--methods", "attention", "--grounded")
    assert "dog" not in stored(tmp_path / "out" / "a")["words"]
    with pytest.raises(InputError, match=r"gridtd_grounding\.json is missing: --grounded requires"):
        run(weights / "gridtd.pth", [image], tmp_path / "out", "--grounded")
    with pytest.raises(InputError, match="at most one of"):
        run(calibrated, [image], tmp_path / "out", "--grounded", "--caption", "a dog")


# -- what an explanation depends on ----------------------------------------------------------------


def test_the_identity_covers_all_that_an_explanation_depends_on(tmp_path):
    path = make_image(tmp_path / "a.png")
    model = make_model("gridtd")

    def identity(*flags, model=model, words=WORDS, calibrations=(None, None), regions=None,
                 **target):
        args = arguments("x", [path], "y", *flags)
        target = explain.Target(path, caption=args.caption, **target)
        explain.identify([target], args, args.methods, model, words, calibrations, regions)
        return target.identity

    def calibration(threshold, word="dog"):
        return grounding.Calibration(threshold, Objects({word: "dog"}))

    sampling = ("--decoding", "sample")
    for flags in (("--block_trigrams",), ("--length_penalty", "1"), ("--max_len", "9"),
                  ("--beam_size", "2"), ("--grounded",), ("--shared_scale",), ("--eps", "0.1"),
                  ("--methods", "lrp"), ("--contrast", "dog"), ("--caption", "a dog"), sampling):
        assert identity(*flags) != identity(), flags
    for flags in (("--temperature", "2"), ("--top_k", "3"), ("--top_p", "0.5"), ("--seed", "2")):
        assert identity(*sampling, *flags) != identity(*sampling), flags
    assert identity("--seed", "2") == identity()        # nothing is random in beam search
    assert identity("--caption", "a", "--beam_size", "2") == identity("--caption", "a")

    box = {"categories": {"dog": 1}, "bbox": {"1": [[0, 0, 4, 4]]}, "shape": [90, 60]}
    features = SimpleNamespace(features=path)
    different = [
        identity(), identity(model=make_model("aoa")), identity(words=build([["a", "cat"]], 1)),
        identity(calibrations=[calibration(0.1), None]),
        identity(calibrations=[calibration(0.2), None]),
        identity(calibrations=[calibration(0.1, "cat"), None]),
        identity(calibrations=[None, calibration(0.1)]),
        identity(references=["a dog"]), identity(boxes=box), identity(regions=features)]
    make_image(path, seed=1)
    different += [identity(), identity(regions=features)]
    assert len(set(different)) == len(different)
    path.unlink()
    os.mkfifo(path)         # which would block its reader
    assert identity() == ""


def test_existing_explanations_are_not_computed_again(weights, tmp_path, monkeypatch):
    paths = make_images(tmp_path, "abc")
    sizes = []
    explain_batch = explain.explain_batch

    def counting(model, vocabulary, images, *others):
        sizes.append(len(images))
        return explain_batch(model, vocabulary, images, *others)
    monkeypatch.setattr(explain, "explain_batch", counting)
    file = tmp_path / "out" / "a" / "explanation.npz"
    run(weights / "gridtd.pth", paths[:2], tmp_path / "out", *ATTENTION)
    before = file.stat().st_mtime_ns
    run(weights / "gridtd.pth", paths, tmp_path / "out", *ATTENTION)
    assert sizes == [2, 1] and file.stat().st_mtime_ns == before
    assert page_names(tmp_path / "out") == ["a", "b", "c"]
    make_image(paths[1], seed=9)        # the file is replaced by another image
    run(weights / "gridtd.pth", paths, tmp_path / "out", *ATTENTION)
    run(weights / "gridtd.pth", paths, tmp_path / "out", *ATTENTION, "--overwrite")
    run(weights / "aoa.pth", paths, tmp_path / "out", *ATTENTION)
    assert sizes == [2, 1, 1, 3, 3]


def rewrite(**changes):
    """A function that replaces or, if None, removes arrays of an .npz file."""
    def damage(path):
        arrays = stored(path.parent) | changes
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return damage


def flip_bytes(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for i in range(middle, middle + 50):
        content[i] ^= 255
    path.write_bytes(content)


DAMAGES = {"empty": lambda path: path.write_bytes(b""), "deleted": Path.unlink,
           "flipped": flip_bytes, "missing": rewrite(logits=None),
           "wrong type": rewrite(words=np.zeros(4)), "wrong shape": rewrite(logits=np.zeros(4)),
           "not finite": rewrite(logits=np.full(3, np.nan))}


@pytest.fixture(scope="module")
def explained(weights, tmp_path_factory):
    """The folder of an explained image, which the tests leave as it was."""
    folder = tmp_path_factory.mktemp("explained")
    run(weights / "gridtd.pth", [make_image(folder / "a.png")], folder / "out", *ATTENTION)
    return folder / "out" / "a"


@pytest.mark.parametrize("damage", [*DAMAGES, "image", "pipe", "earlier version"])
def test_a_damaged_explanation_is_noticed(explained, tmp_path, damage):
    folder = tmp_path / "a"
    folder.mkdir()
    for path in explained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    identity = str(stored(folder)["identity"])
    assert explanations.is_explained(folder, identity)
    assert not explanations.is_explained(folder, "other")
    if damage == "image":
        (folder / "attention.png").write_bytes((folder / "attention.png").read_bytes()[:-100])
    elif damage == "pipe":
        (folder / "entry.html").unlink()
        os.mkfifo(folder / "entry.html")
    elif damage == "earlier version":
        text = (folder / "entry.html").read_text(encoding="utf-8")
        (folder / "entry.html").write_text(text.replace('"format":2', '"format":1'))
    else:
        DAMAGES[damage](folder / "explanation.npz")
    assert not explanations.is_explained(folder, identity)


# -- folders and the page --------------------------------------------------------------------------


def test_a_damaged_explanation_is_replaced_but_no_other_file(weights, tmp_path):
    path, folder = make_image(tmp_path / "a.png"), tmp_path / "out" / "a"
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "grad_cam", "--caption", "a")
    (folder / "mine.txt").write_text("notes")
    (folder / "explanation.npz").write_bytes(b"cut short")
    run(weights / "gridtd.pth", [path], tmp_path / "out", *ATTENTION)
    assert names_in(folder) == {"attention.png", "explanation.npz", "mine.txt", "entry.html",
                                "thumbnail.webp"}
    assert list(stored(folder)["words"]) == ["<start>", "a", "dog", "<end>"]
    assert names_in(tmp_path / "out") == {"a", "index.html", "log.txt", "settings.json"}


def test_images_with_the_same_stem_get_different_folders(tmp_path):
    paths = ["x/a.jpg", "y/a.jpg", "a.png", "b.jpg", "a.jpg_0.png", "z/a.jpg_0.png"]
    for names in (paths, ["x/a.jpg", "y/a.jpg", "a.jpg_0.png"]):
        folders = explanations.choose_folders([Path(name) for name in names], tmp_path)
        assert len(set(folders)) == len(names)
        assert "b.jpg" not in names or folders[3].name == "b"


def test_later_commands_do_not_overwrite_other_images_of_the_same_name(weights, tmp_path):
    first, second, third = (make_image(tmp_path / name / "a.png", seed=i)
                            for i, name in enumerate("xyz"))
    run(weights / "gridtd.pth", [first], tmp_path / "out", *ATTENTION)
    before = stored(tmp_path / "out" / "a")
    run(weights / "gridtd.pth", [second], tmp_path / "out", *ATTENTION)
    after = stored(tmp_path / "out" / "a")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # `second` keeps its folder
    run(weights / "gridtd.pth", [third, second], tmp_path / "out", *ATTENTION)
    images = {folder.name: str(stored(folder)["image"])
              for folder in explanations.stored_folders(tmp_path / "out")}
    assert images == {"a": str(first), "a_2": str(second), "a.png_0": str(third)}
    assert page_names(tmp_path / "out") == ["a.png_0", "a_2", "a"]


def test_the_page_shows_the_explanations_of_earlier_commands(weights, tmp_path, capsys):
    a, b, c, d, e = make_images(tmp_path, "abcde")
    run(weights / "gridtd.pth", [c, a], tmp_path / "out", "--methods", "grad_cam", "--caption", "a")
    run(weights / "gridtd.pth", [b, d, e], tmp_path / "out", *ATTENTION)
    shown = [(entry["name"], entry["caption"], *entry["methods"])
             for entry in page_entries(tmp_path / "out")]
    assert shown == [("b", "a dog", "attention"), ("d", "a dog", "attention"),
                     ("e", "a dog", "attention"), ("a", "a", "grad_cam"), ("c", "a", "grad_cam")]

    # explanations that cannot be shown are omitted
    a.unlink()         # which the page does not need
    (tmp_path / "out" / "b" / "explanation.npz").write_bytes(b"cut short")
    (tmp_path / "out" / "c" / "entry.html").unlink()
    (tmp_path / "out" / "e").rename(tmp_path / "out" / "e.elsewhere.123.tmp")       # was killed
    capsys.readouterr()
    run(weights / "gridtd.pth", [d], tmp_path / "out", *ATTENTION)
    assert page_names(tmp_path / "out") == ["d", "a"]
    lines = capsys.readouterr().out.splitlines()
    sentence, = (line for line in lines if line.startswith("omitted from "))
    assert "b (its explanation.npz cannot be read)" in sentence
    assert "c (its entry.html or thumbnail.webp is missing" in sentence


def test_a_new_folder_appears_only_when_complete(weights, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(explained_image.np, "savez_compressed", fail)
    with pytest.raises(InputError, match="No space"):
        run(weights / "gridtd.pth", [make_image(tmp_path / "a.png")], tmp_path / "out", *ATTENTION)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_names_of_images_cannot_lead_out_of_the_output_folder(weights, tmp_path):
    """The stem of "...jpg" is "..", and that of "index.html.jpg" is the name of the page."""
    make_image(tmp_path / "precious.png")
    names = ["...jpg", "..jpg", ". .jpg", "index.html.jpg", "$\\frac{$.jpg", "a.1.tmp.jpg",
             os.fsdecode(b"\xff.jpg")]
    for i, name in enumerate(names):
        make_image(tmp_path / "in" / "x.jpg", seed=i).rename(tmp_path / "in" / name)
    before = names_in(tmp_path)
    out = tmp_path / "out" / "inner"
    for _ in range(2):
        run(weights / "gridtd.pth", [tmp_path / "in" / name for name in names], out, *ATTENTION)
    assert names_in(tmp_path) == before | {"out"} and names_in(tmp_path / "out") == {"inner"}
    folders = [path for path in out.iterdir() if path.is_dir()]
    assert len(folders) == len(page_entries(out)) == len(names)


# -- images ----------------------------------------------------------------------------------------


def rotated_jpeg(path):
    """A JPEG of 60×90 pixels, displayed upright, stored as 90×60 with EXIF orientation 6."""
    ramp = np.linspace(0, 255, 90).astype(np.uint8)[:, None].repeat(60, 1)
    upright = Image.fromarray(np.dstack([ramp, ramp, 255 - ramp]))
    exif = Image.Exif()
    exif[ORIENTATION] = 6       # the viewer rotates by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    return upright


def shown_size(folder, index):
    """Width and height of the image of the page's entry."""
    data = page_entries(folder)[index]["image"].split("base64,")[1]
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def test_images_are_explained_and_shown_upright(weights, tmp_path):
    path = tmp_path / "portrait.jpg"
    upright = np.asarray(rotated_jpeg(path)).astype(int)
    run(weights / "gridtd.pth", [path], tmp_path / "out", "--methods", "lrp", "--caption", "a dog")
    image = read_image(path, upright=True)
    assert np.abs(image.permute(1, 2, 0).numpy() - upright).mean() < 3
    model, _ = checkpoint.load(weights / "gridtd.pth")
    captions = torch.tensor([WORDS.encode(["a", "dog"], 2)])
    expected = model.lrp(preprocess(image, 112)[None], captions).pixels[0].sum(1).numpy()
    relevance = stored(tmp_path / "out" / "portrait")["lrp_pixels"]
    assert np.allclose(relevance, expected, atol=np.abs(expected).max() / 255)
    assert ExplainedImage.load(tmp_path / "out" / "portrait").image.size == (60, 90)
    assert shown_size(tmp_path / "out", 0) == (60, 90)


def test_images_of_a_data_set_keep_their_stored_orientation(weights, tmp_path, monkeypatch):
    rotated_jpeg(tmp_path / "portrait.jpg")
    monkeypatch.setattr(explain, "CaptionDataset", lambda *_: SimpleNamespace(
        image_folder=tmp_path, paths=["portrait.jpg"], names=["x"], references=[["a dog"]]))
    run_data_set(weights / "gridtd.pth", tmp_path, tmp_path / "out")
    assert not bool(stored(tmp_path / "out" / "portrait")["upright"])
    assert shown_size(tmp_path / "out", 0) == (90, 60)


def test_images_of_a_folder_are_sorted_and_unique(tmp_path):
    for name in ("b.png", "a.PNG", "c.png", "notes.txt"):
        (tmp_path / name).write_text("")
    paths = explain.find_images([str(tmp_path), str(tmp_path / "c.png")])
    assert [path.name for path in paths] == ["a.PNG", "b.png", "c.png"]


def test_images_of_a_split(weights, demo_data, tmp_path):
    weight = weights / "gridtd.pth"
    run_data_set(weight, demo_data, tmp_path, "--split", "val", "--max_images", "3")
    assert page_names(tmp_path) == ["val_00000", "val_00001", "val_00002"]
    boxes = load_boxes(demo_data / "demo" / "boxes_demo.json")["val_00001.png"]
    entry = page_entries(tmp_path)[1]
    assert entry["references"] == CaptionDataset(demo_data, "demo", "val").references[1]
    assert entry["settings"]["captions"] == "given"
    assert {item["name"] for item in entry["objects"]} == set(boxes["categories"])
    corners = np.concatenate(list(boxes["bbox"].values())) / 112
    assert sorted(item["box"] for item in entry["objects"]) == sorted(corners.round(4).tolist())
    assert stored(tmp_path / "val_00001")["object_boxes"].shape == corners.shape
    assert "explain.py" in json.loads((tmp_path / "settings.json").read_text())
    with pytest.raises(InputError, match="either --images"):
        run_data_set(weight, demo_data, tmp_path, "--images", "x.png")


def test_images_that_cannot_be_read_are_skipped(weights, tmp_path, capsys):
    good, bad = make_image(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match=r"1 of 2 images were skipped.*bad\.png") as caught:
        run(weights / "gridtd.pth", [bad, good], tmp_path / "out", *ATTENTION)
    assert "\n" not in str(caught.value) and page_names(tmp_path / "out") == ["good"]
    run(weights / "gridtd.pth", [bad, good], tmp_path / "out", "--skip_broken", *ATTENTION)
    assert "skipped: " in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the images"):
        run(weights / "gridtd.pth", [bad], tmp_path / "out", "--skip_broken")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--caption", "a zebra runs past"], "vocabulary.*: zebra, past"),
    (["--caption", "?!"], "contains no words"),
    (["--contrast", "zebra"], "--contrast 'zebra'.*vocabulary.*: zebra"),
    (["--contrast", "a dog"], "must be one word"), (["--images", "nowhere.jpg"], "does not exist"),
    (["--weight", "nowhere.pth"], "cannot be read"), (["--images", "empty"], "contains no images"),
    (["--weight", "regions.pth"], "region features")])
def test_bad_input_is_reported_in_one_sentence(weights, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    flags = [str(weights / flag) if flag == "regions.pth" else flag for flag in flags]
    with pytest.raises(InputError, match=message) as caught:
        run(weights / "gridtd.pth", [make_image(Path("a.png"))], "out", *flags)
    assert "\n" not in str(caught.value)


def test_exit_status_and_standard_error(weights, tmp_path):
    command = [sys.executable, "explain.py", "--weight", str(weights / "gridtd.pth"), "--device",
               "cpu", "--caption", "a zebra", "--images", str(make_image(tmp_path / "a.png")),
               "--save_path", str(tmp_path / "out")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout.startswith("settings: --weight ")
    assert process.stderr.startswith("error: --caption 'a zebra'")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--methods magic", "--decoding magic", "--beam_size 0"])
def test_invalid_flags(flag, capsys):
    with pytest.raises(SystemExit) as end:
        arguments("x", ["y"], "z", *flag.split())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_real_photographs(weights, shared_data, tmp_path):
    paths = sorted((shared_data / "coco_sample" / "val2017").glob("*.jpg"))[:2]
    run(weights / "aoa.pth", paths, tmp_path, "--caption", "a dog runs")
    for path in paths:
        colour = pixels(tmp_path / path.stem / "lrp.png")
        assert (np.ptp(colour, axis=2) > 100).mean() > 0.01
