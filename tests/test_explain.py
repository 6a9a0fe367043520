"""explain.py: one folder per image with the model's explanations, and one page for all of them."""
import base64
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import OWN_METHODS, call, pixels, refused, small_model
from made_up import random_image
from PIL import Image

import explain
from captioning import checkpoint, decoding, grounding
from captioning.data.boxes import load_boxes
from captioning.data.dataset import CaptionDataset
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import build
from captioning.explanation.methods import METHODS, SPLIT, Method
from captioning.metrics.object_words import Objects
from captioning.report import explained_image, explanations
from captioning.report.explained_image import ExplainedImage

ROOT = Path(__file__).parents[1]
WORDS = build([["a", "dog", "runs", "fast"]], 1)
ORIENTATION = 0x0112        # EXIF tag
ATTENTION = ("--methods", "attention", "--caption", "a dog")
DOG = torch.tensor([WORDS.encode(["a", "dog"], 2)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("gridtd", "aoa"):
        checkpoint.save(folder / f"{kind}.pth", small_model(kind, WORDS), WORDS)
    of_regions = small_model("gridtd", WORDS, encoder=None, feature_dim=5)
    checkpoint.save(folder / "regions.pth", of_regions, WORDS)
    return folder


def make_images(folder, names):
    """Writes images of random pixels."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png" for name in names]
    for seed, path in enumerate(paths):
        random_image(seed=seed).save(path)
    return paths


@pytest.fixture
def image(tmp_path):
    """The path of one image of random pixels."""
    return make_images(tmp_path, "a")[0]


@pytest.fixture
def run(weights, tmp_path):
    """A function that explains images, or the demo data in a folder -> the output folder."""
    def run(weight, images, *flags):
        if isinstance(images, Path):
            source = ["--dataset", "demo", "--data_folder", images, *ATTENTION]
        else:
            source = ["--images", *images]
        call(explain, "--weight", (weights / weight).with_suffix(".pth"), "--save_path",
             tmp_path / "out", "--device", "cpu", "--max_len", "4", *source, *flags)
        return tmp_path / "out"
    return run


def page_entries(folder):
    html = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(html.split('type="application/json" id="data">')[1].split("</script>")[0])


def page_names(folder):
    return [entry["name"] for entry in page_entries(folder)]


def stored(folder):
    """The arrays of a folder's explanation."""
    with np.load(folder / "explanation.npz") as arrays:
        return dict(arrays)


def words_of(folder):
    return " ".join(stored(folder)["words"])


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def is_rounded(values, expected):
    """Whether stored maps are those expected, rounded."""
    expected = expected.numpy()
    return np.abs(values - expected).max() <= np.abs(expected).max() / 255


# -- arrays and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_arrays_equal_the_models_explanations(weights, run, tmp_path, kind, capsys):
    paths = make_images(tmp_path, "abc")
    random_image((50, 60)).save(paths[2])
    out = run(kind, paths, "--methods", "lrp", "grad_cam", "attention", "--caption", "A dog runs!",
              "--batch_size", "2")
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    captions = torch.tensor([WORDS.encode(["a", "dog", "runs"], 3)])
    output = capsys.readouterr().out
    for path in paths:
        expected = model.lrp(preprocess(read_image(path), 112)[None], captions)
        arrays = stored(out / path.stem)
        assert list(arrays["words"]) == ["<start>", "a", "dog", "runs", "<end>"]
        values = {"lrp_words": expected.words[0], "lrp_regions": expected.features[0].sum(-1),
                  "logits": expected.targets[0], "attention": expected.attention[0],
                  "conservation": expected.conservation[0],
                  **{f"lrp_{part}": getattr(expected, part)[0] for part in SPLIT}}
        for name, value in values.items():
            error = 1e-5 * value.abs().max().item()
            assert np.allclose(arrays[name], value, rtol=1e-4, atol=error), name
        for relevance, map_ in zip(arrays["lrp_pixels"], expected.pixels[0].sum(1), strict=True):
            assert is_rounded(relevance, map_) and (relevance != map_.numpy()).any()
        assert arrays["grad_cam_pixels"].shape == (4, 112, 112)
        assert "attention_pixels" not in arrays
        assert str(arrays["image"]) == str(path) and bool(arrays["upright"])

        lines = output.split(f"{path.name}: a dog runs\n")[1].splitlines()[:5]
        assert lines[0].split() == ["word", "probability", "image", "previous", "<start>", "rest"]
        for t, word in enumerate(["a", "dog", "runs", "<end>"]):
            p = expected.logits[0, t].softmax(0)[captions[0, t + 1]]
            numbers = [p, expected.image[0, t], expected.previous[0, t], expected.start[0, t],
                       expected.rest[0, t]]
            shown = lines[t + 1].split()
            assert shown[0] == word
            assert np.allclose([float(number) for number in shown[1:]], numbers, atol=0.0051)


def test_files_of_an_image_and_their_loading(run, image, tmp_path):
    folder = run("gridtd", [image], "--methods", *OWN_METHODS, "--caption", "a dog") / "a"
    others = {"explanation.npz", "entry.html", "thumbnail.webp"}
    assert names_in(folder) == others | {f"{method}.png" for method in OWN_METHODS}
    for path in folder.glob("*.png"):
        assert pixels(path).std() > 3
    loaded = ExplainedImage.load(folder)
    assert loaded.words == ["a", "dog", "<end>"] and [*loaded.methods] == [*OWN_METHODS]
    assert loaded.image.size == (90, 60) and loaded.heatmap("dog", "attention").shape == (60, 90)
    loaded.save(tmp_path / "again", with_page=False)
    again = stored(tmp_path / "again")
    for name, array in stored(folder).items():
        # drawn from rounded maps
        assert name == "files" or np.array_equal(array, again[name]), name


def test_a_method_that_is_registered_at_run_time(weights, run, image, monkeypatch):
    """Squared gradients: shown and stored as any other method, without further code."""
    def squared(model, *inputs, **options):
        explanation = model.gradient(*inputs, **options)
        explanation.pixels = explanation.pixels ** 2
        explanation.words = None
        return explanation
    monkeypatch.setitem(METHODS, "squared", Method(
        squared, "The squared gradient.", signed=False, has_words=False, labels=("none", "much")))
    out = run("aoa", [image], "--methods", "squared", "lrp", "--caption", "a dog")
    model, _ = checkpoint.load(weights / "aoa.pth")
    gradient = model.gradient(preprocess(read_image(image), 112)[None], DOG).pixels[0]
    arrays = stored(out / "a")
    assert is_rounded(arrays["squared_pixels"], (gradient ** 2).sum(1))
    assert "squared_words" not in arrays and pixels(out / "a" / "squared.png").std() > 3
    methods = page_entries(out)[0]["methods"]
    assert [*methods] == ["squared", "lrp"] and len(methods["squared"]["maps"]) == 3
    assert methods["squared"]["help"] == "The squared gradient."
    assert methods["squared"]["labels"] == ["none", "much"]


def test_captions_of_different_lengths_in_one_batch(run, tmp_path, monkeypatch):
    rows = torch.tensor([WORDS.encode(["a", "dog"], 4) + [0, 0],
                         WORDS.encode(["a", "dog", "runs", "fast"], 4)])
    monkeypatch.setattr(explain, "captions_of", lambda *_: rows)
    out = run("aoa", make_images(tmp_path, "ab"), "--methods", "lrp", "--batch_size", "2")
    short, long = (stored(out / name) for name in "ab")
    assert short["lrp_words"].shape == (3, 3) and long["lrp_words"].shape == (5, 5)
    assert short["lrp_pixels"].shape == (3, 112, 112) and short["attention"].shape == (3, 2, 49)


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_contrast(weights, run, image, kind):
    out = run(kind, [image], "--caption", "a dog", "--contrast", "runs", "--methods", *OWN_METHODS)
    model, _ = checkpoint.load(weights / f"{kind}.pth")
    inputs = preprocess(read_image(image), 112)[None]
    other = WORDS.wordmap["runs"]
    arrays = stored(out / "a")
    logits = model(inputs, DOG)[0].detach()
    difference = logits[range(3), DOG[0, 1:]] - logits[:, other]
    assert np.allclose(arrays["logits"], difference, atol=1e-5)
    changed = DOG.clone()
    changed[0, 1] = other
    of_word, of_contrast = (model.gradient(inputs, captions).pixels[0, 0].sum(0)
                            for captions in (DOG, changed))
    assert is_rounded(arrays["gradient_pixels"][0], of_word - of_contrast)
    probabilities = logits.softmax(1)[:, other]
    assert np.allclose(arrays["contrast_probabilities"], probabilities, atol=1e-6)
    contrast = page_entries(out)[0]["contrast"]
    assert contrast["word"] == "runs" and np.allclose(contrast["p"], probabilities, atol=1e-3)


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_attention_alone_needs_no_backward_pass(run, image, kind, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a backward pass was run")
    monkeypatch.setattr(torch.autograd, "grad", fail)
    monkeypatch.setattr(torch.autograd, "backward", fail)
    run(kind, [image], "--methods", "attention", "--contrast", "runs")
    with pytest.raises(AssertionError, match="backward"):
        run(kind, [image], "--methods", "gradient")


def test_the_progress_bar_advances_within_a_batch(run, tmp_path, monkeypatch):
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
    run("gridtd", paths, "--methods", "lrp", "gradient", "attention", "--skip_broken",
        "--batch_size", "3")
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
def test_captions_are_decoded_as_the_flags_specify(weights, run, image, flags, options):
    out = run("gridtd", [image], "--methods", "attention", *flags, "--max_len", "12")
    model, _ = checkpoint.load(weights / "gridtd.pth")
    seeds = decoding.image_seeds([str(stored(out / "a")["identity"])], 1)
    with torch.no_grad():
        features = model.encode(preprocess(read_image(image), 112)[None])
        tokens = decoding.decode(model, features, WORDS, max_len=12, seeds=seeds, **options)[0]
    words = ["<start>", *(WORDS.words[i] for i in tokens.tolist() if i)]
    assert list(stored(out / "a")["words"]) == words


def test_captions_of_other_systems(run, tmp_path, capsys):
    paths = make_images(tmp_path, ["COCO_val_0000000007", "b"])
    file = tmp_path / "results.json"
    flags = ("--methods", "attention", "--captions", file, "--quiet", "--shared_scale")
    file.write_text(json.dumps({7: "A dog runs.", "b.png": "a", "c.png": "x"}))
    out = run("aoa", paths, *flags)
    output = capsys.readouterr().out
    assert "b.png: a\n" in output and "COCO_val_0000000007.png: a dog runs\n" in output
    assert "probability" not in output and bool(stored(out / "b")["shared_scale"])
    assert words_of(out / "b") == "<start> a <end>"
    file.write_text(json.dumps({7: "a dog runs", "b.png": "a dog"}))
    assert words_of(run("aoa", paths, *flags) / "b") == "<start> a dog <end>"

    # unknown words are explained as <unk>, and marked
    file.write_text(json.dumps({7: "a zebra", "b.png": "a"}))
    run("aoa", paths, *flags)
    assert words_of(out / "COCO_val_0000000007") == "<start> a zebra[unk] <end>"
    assert words_of(out / "b") == "<start> a <end>"
    assert "7.png: explained as <unk>, since the model does not know them: zebra" in (
        capsys.readouterr().out)
    file.write_text(json.dumps({7: "a zebra", "b.png": "...!"}))
    with refused(r"the caption of b\.png '\.\.\.!' contains no words"):
        run("aoa", paths, *flags)
    file.write_text('[{"image": "b.png", "caption": "a"}, {"image": "b", "caption": "dog"}]')
    with refused(r"more than one caption for b\.png"):
        run("aoa", paths[1:], *flags)
    file.write_text(json.dumps({7: "a zebra", "b.png": "a"}))
    with refused(r"lacks captions for 1 of 3 images: c\.png"):
        run("aoa", [*paths, *make_images(tmp_path, "c")], *flags)
    with refused("several images are called b.png"):
        run("aoa", [*paths, *make_images(tmp_path / "other", "b")], *flags)


@pytest.fixture
def calibrated(weights, tmp_path):
    """A checkpoint by whose calibration each "dog", the only object word, is flagged."""
    path = tmp_path / "model.pth"
    shutil.copy(weights / "gridtd.pth", path)
    zeros = dict.fromkeys(("constant", *grounding.SCORES), 0.0)
    grounding.save(path, checkpoint.load(path)[0], 2.0, 2.0, Objects({"dog": "dog"}), zeros, {})
    return path


def test_flags(calibrated, run, image, capsys):
    flags = ("--methods", "lrp", "--caption", "a dog runs")
    out = run(calibrated, [image], *flags)
    assert stored(out / "a")["flags"].tolist() == [False, True, False, False]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "in the image: 50% (doubtful)" in line] == ["dog"]
    assert np.isnan(stored(out / "a")["presence"]).tolist() == [True, False, True, True]
    run(calibrated, [image], *flags)        # words without a presence do not spoil the explanation
    assert "1 of 1 images are already explained" in capsys.readouterr().out
    assert np.isnan(ExplainedImage.load(out / "a").presence[0])
    run(calibrated, [image], *flags, "--contrast", "fast")
    assert "flags" not in stored(out / "a")


def test_grounded_captions(calibrated, run, image, monkeypatch):
    def preferring_dogs(model, *inputs, **options):
        model.W_o.bias.data[WORDS.wordmap["dog"]] = 9
        return decoding.decode(model, *inputs, **options)
    monkeypatch.setattr(grounding, "decode", preferring_dogs)
    out = run(calibrated, [image], "--methods", "attention", "--grounded")
    assert "dog" not in stored(out / "a")["words"]
    with refused(r"gridtd_grounding\.json is missing: --grounded requires"):
        run("gridtd", [image], "--grounded")
    with refused("at most one of"):
        run(calibrated, [image], "--grounded", "--caption", "a dog")


# -- what an explanation depends on ----------------------------------------------------------------


def test_the_identity_covers_all_that_an_explanation_depends_on(image, tmp_path):
    weight = tmp_path / "model.pth"
    model = small_model("gridtd", WORDS)

    def identity(*flags, model=model, words=WORDS, regions=None, **target):
        args = explain.get_args_parser().parse_args(
            ["--weight", str(weight), "--max_len", "4", "--images", str(image), *flags])
        target = explain.Target(image, caption=args.caption, **target)
        explain.identify([target], args, model, words, regions)
        return target.identity

    def calibrated(*thresholds, word="dog"):
        zeros = dict.fromkeys(("constant", *grounding.SCORES), 0.0)
        grounding.save(weight, model, *thresholds, Objects({word: "dog"}), zeros, {})
        return identity()

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
    features, others = (SimpleNamespace(content_hash=lambda index, text=text: f"{text} {index}")
                        for text in "ab")
    different = [
        identity(), identity(model=small_model("aoa", WORDS)), identity(references=["a dog"]),
        identity(words=build([["a", "cat"]], 1)), identity(boxes=box), identity(regions=features),
        identity(regions=others), identity(regions=features, index=1), calibrated(0.1, 0.1),
        calibrated(0.2, 0.1), calibrated(0.1, 0.2), calibrated(0.1, 0.1, word="cat")]
    random_image(seed=1).save(image)
    different += [identity(), identity(regions=features)]
    assert len(set(different)) == len(different)
    image.unlink()
    os.mkfifo(image)         # which would block its reader
    assert identity() == ""


def test_existing_explanations_are_not_computed_again(run, tmp_path, monkeypatch):
    paths = make_images(tmp_path, "abc")
    flags = (*ATTENTION, "--batch_size", "8")
    sizes = []
    explain_batch = explain.explain_batch

    def counting(model, vocabulary, images, *others):
        sizes.append(len(images))
        return explain_batch(model, vocabulary, images, *others)
    monkeypatch.setattr(explain, "explain_batch", counting)
    out = run("gridtd", paths[:2], *flags)
    before = (out / "a" / "explanation.npz").stat().st_mtime_ns
    run("gridtd", paths, *flags)
    # the whole batch, so that the last digits of others do not depend on what existed
    assert sizes == [2, 3] and (out / "a" / "explanation.npz").stat().st_mtime_ns == before
    assert page_names(out) == ["a", "b", "c"]
    random_image(seed=9).save(paths[1])         # the file is replaced by another image
    run("gridtd", paths, *flags)
    run("gridtd", paths, *flags, "--overwrite")
    run("aoa", paths, *flags)
    assert sizes == [2, 3, 3, 3, 3]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def earlier_version(path):
    path.write_text(path.read_text("utf-8").replace('"format":3', '"format":2'), "utf-8")


@pytest.mark.parametrize("name, damage", [
    ("explanation.npz", Path.touch), ("explanation.npz", Path.unlink),
    ("explanation.npz", lambda path: path.write_bytes(b"")),
    # one byte in the middle; the arrays' file is compressed
    ("explanation.npz", flip), ("attention.png", flip), ("entry.html", flip),
    ("thumbnail.webp", flip),
    # arrays that are missing, of a wrong type or shape, or not finite
    ("explanation.npz", {"logits": None}), ("explanation.npz", {"words": np.zeros(4)}),
    ("explanation.npz", {"logits": np.zeros(4)}),
    ("explanation.npz", {"logits": np.full(3, np.nan)}),
    ("attention.png", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    ("entry.html", replace_by_pipe), ("entry.html", earlier_version)])
def test_a_damaged_explanation_is_noticed(run, image, name, damage):
    folder = run("gridtd", [image], *ATTENTION) / "a"
    arrays = stored(folder)
    identity = str(arrays["identity"])
    assert not explanations.is_explained(folder, "other")
    if isinstance(damage, dict):
        arrays |= damage
        kept = {key: value for key, value in arrays.items() if value is not None}
        np.savez(folder / name, **kept)
    else:
        damage(folder / name)
    assert explanations.is_explained(folder, identity) == (damage is Path.touch)


# -- folders and the page --------------------------------------------------------------------------


def test_files_of_the_user_are_kept(run, image, tmp_path):
    """A folder that has such a file is avoided by explain.py, and refused by `save`."""
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "attention.png").write_text("mine")
    run("gridtd", [image], *ATTENTION)
    assert names_in(out) == {"a", "a_2", "index.html", "log.txt", "settings.json"}
    assert (out / "a" / "attention.png").read_text() == "mine" and len(names_in(out / "a")) == 1
    with refused("attention.png is not of an explanation"):
        ExplainedImage.load(out / "a_2").save(out / "a")
    (out / "index.html").write_text("<title>My page</title>")
    with refused("index.html is not a page of explanations"):
        run("gridtd", [image], *ATTENTION)
    assert (out / "index.html").read_text() == "<title>My page</title>"


def test_an_entry_that_somebody_changed_cannot_run_a_script(run, image):
    folder = run("gridtd", [image], *ATTENTION) / "a"
    changed = (folder / "entry.html").read_text("utf-8").replace(
        '"caption":"', '"caption":"</script><script>alert(1)</script>')
    (folder / "entry.html").write_text(changed, "utf-8")
    explanations.write_index(folder.parent, [folder])
    assert "<script>alert" not in (folder.parent / "index.html").read_text("utf-8")


def test_a_damaged_explanation_is_replaced_but_no_other_file(run, image):
    out = run("gridtd", [image], "--methods", "grad_cam", "--caption", "a")
    (out / "a" / "mine.txt").write_text("notes")
    (out / "a" / "explanation.npz").write_bytes(b"cut short")
    run("gridtd", [image], *ATTENTION)
    assert names_in(out / "a") == {"attention.png", "explanation.npz", "mine.txt", "entry.html",
                                   "thumbnail.webp"}
    assert words_of(out / "a") == "<start> a dog <end>"
    assert names_in(out) == {"a", "index.html", "log.txt", "settings.json"}


def test_images_with_the_same_stem_get_different_folders(run, tmp_path):
    names = ["x/a.jpg", "y/a.jpg", "a.png", "b.jpg", "a_2.png", "z/a_2.png"]
    folders = explanations.choose_folders([Path(name) for name in names], tmp_path)
    assert [folder.name for folder in folders] == ["a", "a_2", "a_3", "b", "a_2_2", "a_2_3"]

    # later commands do not overwrite other images of the same name
    first, second, third = (make_images(tmp_path / name, "a")[0] for name in "xyz")
    out = run("gridtd", [first], *ATTENTION)
    before = stored(out / "a")
    run("gridtd", [second], *ATTENTION)
    after = stored(out / "a")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    run("gridtd", [third, second], *ATTENTION)      # `second` keeps its folder
    images = {folder.name: str(stored(folder)["image"])
              for folder in explanations.stored_folders(out)}
    assert images == {"a": str(first), "a_2": str(second), "a_3": str(third)}
    assert page_names(out) == ["a_3", "a_2", "a"]


def test_the_page_shows_the_explanations_of_earlier_commands(run, tmp_path, capsys):
    a, b, c, d, e = make_images(tmp_path, "abcde")
    run("gridtd", [c, a], "--methods", "grad_cam", "--caption", "a")
    out = run("gridtd", [b, d, e], *ATTENTION)
    shown = [(entry["name"], entry["caption"], *entry["methods"]) for entry in page_entries(out)]
    assert shown == [("b", "a dog", "attention"), ("d", "a dog", "attention"),
                     ("e", "a dog", "attention"), ("a", "a", "grad_cam"), ("c", "a", "grad_cam")]

    # explanations that cannot be shown are omitted
    a.unlink()         # which the page does not need
    (out / "b" / "explanation.npz").write_bytes(b"cut short")
    (out / "c" / "entry.html").unlink()
    (out / "e").rename(out / "e.elsewhere.123.0123abcd.tmp")     # was killed
    capsys.readouterr()
    run("gridtd", [d], *ATTENTION)
    assert page_names(out) == ["d", "a"]
    lines = capsys.readouterr().out.splitlines()
    sentence, = (line for line in lines if line.startswith("omitted from "))
    assert "b (its explanation.npz cannot be read)" in sentence
    assert "c (its entry.html or thumbnail.webp is missing" in sentence


def test_a_new_folder_appears_only_when_complete(run, image, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(explained_image.np, "savez_compressed", fail)
    with refused("No space"):
        run("gridtd", [image], *ATTENTION)
    assert not [path for path in (image.parent / "out").iterdir() if path.is_dir()]


def test_names_of_images_cannot_lead_out_of_the_output_folder(run, image, tmp_path):
    """The stem of "...jpg" is "..", and that of "index.html.jpg" is the name of the page."""
    names = ["...jpg", "..jpg", ". .jpg", "index.html.jpg", "$\\frac{$.jpg", "a.1.tmp.jpg",
             os.fsdecode(b"\xff.jpg")]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(image, tmp_path / "in" / name)
    for _ in range(2):
        out = run("gridtd", [tmp_path / "in" / name for name in names], *ATTENTION)
    assert names_in(tmp_path) == {"a.png", "in", "out"}
    folders = [path for path in out.iterdir() if path.is_dir()]
    assert len(folders) == len(page_entries(out)) == len(names)


# -- images ----------------------------------------------------------------------------------------


@pytest.fixture
def portrait(tmp_path):
    """A JPEG of 60×90 pixels, displayed upright, stored as 90×60 with EXIF orientation 6."""
    ramp = np.linspace(0, 255, 90).astype(np.uint8)[:, None].repeat(60, 1)
    upright = Image.fromarray(np.dstack([ramp, ramp, 255 - ramp]))
    exif = Image.Exif()
    exif[ORIENTATION] = 6       # the viewer rotates by 90 degrees clockwise
    path = tmp_path / "portrait.jpg"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    return path, np.asarray(upright).astype(int)


def shown_size(folder):
    """Width and height of the image of the page's first entry."""
    data = page_entries(folder)[0]["image"].split("base64,")[1]
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def test_images_are_explained_and_shown_upright(weights, run, portrait):
    path, upright = portrait
    out = run("gridtd", [path], "--methods", "lrp", "--caption", "a dog")
    pixels = read_image(path, upright=True)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - upright).mean() < 3
    model, _ = checkpoint.load(weights / "gridtd.pth")
    expected = model.lrp(preprocess(pixels, 112)[None], DOG).pixels[0].sum(1)
    assert is_rounded(stored(out / "portrait")["lrp_pixels"], expected)
    assert ExplainedImage.load(out / "portrait").image.size == (60, 90) == shown_size(out)


def test_images_of_a_data_set_keep_their_stored_orientation(run, portrait, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "CaptionDataset", lambda *_: SimpleNamespace(
        image_folder=tmp_path, paths=["portrait.jpg"], names=["x"], references=[["a dog"]]))
    out = run("gridtd", tmp_path)
    assert not bool(stored(out / "portrait")["upright"]) and shown_size(out) == (90, 60)


def test_images_of_a_folder_are_sorted_and_unique(tmp_path):
    for name in ("b.png", "a.PNG", "c.png", "notes.txt"):
        (tmp_path / name).write_text("")
    paths = explain.find_images([str(tmp_path), str(tmp_path / "c.png")])
    assert [path.name for path in paths] == ["a.PNG", "b.png", "c.png"]


def test_images_of_a_split(run, demo_data):
    out = run("gridtd", demo_data, "--split", "val", "--max_images", "3")
    assert page_names(out) == ["val_00000", "val_00001", "val_00002"]
    boxes = load_boxes(demo_data / "demo" / "boxes_demo.json")["val_00001.png"]
    entry = page_entries(out)[1]
    assert entry["references"] == CaptionDataset(demo_data, "demo", "val").references[1]
    assert entry["settings"]["captions"] == "given"
    assert {item["name"] for item in entry["objects"]} == set(boxes["categories"])
    corners = np.concatenate(list(boxes["bbox"].values())) / 112
    assert sorted(item["box"] for item in entry["objects"]) == sorted(corners.round(4).tolist())
    assert stored(out / "val_00001")["object_boxes"].shape == corners.shape
    assert "explain.py" in json.loads((out / "settings.json").read_text())
    with refused("either --images"):
        run("gridtd", demo_data, "--images", "x.png")


def test_images_that_cannot_be_read_are_skipped(run, tmp_path, capsys):
    good, bad = make_images(tmp_path, ["good", "bad"])
    bad.write_bytes(good.read_bytes()[:200])
    with refused(r"1 of 2 images were skipped.*bad\.png"):
        run("gridtd", [bad, good], *ATTENTION)
    out = run("gridtd", [bad, good], "--skip_broken", *ATTENTION)
    assert "skipped: " in capsys.readouterr().out and page_names(out) == ["good"]
    with refused("none of the images.*bad.png is damaged"):
        run("gridtd", [bad], "--skip_broken")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--caption", "a zebra runs past"], "vocabulary.*: zebra, past"),
    (["--caption", "?!"], "contains no words"),
    (["--contrast", "zebra"], "--contrast 'zebra'.*vocabulary.*: zebra"),
    (["--contrast", "a dog"], "must be one word"), (["--images", "nowhere.jpg"], "no such file"),
    (["--weight", "nowhere.pth"], "cannot be read"), (["--images", "empty"], "contains no images"),
    (["--weight", "regions.pth"], "region features")])
def test_bad_input_is_reported_in_one_sentence(weights, run, image, monkeypatch, flags, message):
    monkeypatch.chdir(image.parent)
    Path("empty").mkdir()
    flags = [weights / flag if flag == "regions.pth" else flag for flag in flags]
    with refused(message):
        run("gridtd", [image], *flags)
