"""from captioning import explain: what it returns, and the notebook that shows it."""
import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused, small_model
from made_up import random_image

from captioning import checkpoint, explain
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import build
from captioning.report.explained_image import ExplainedImage

ROOT = Path(__file__).parents[1]
WORDS = build([["a", "dog", "runs", "fast"]], 1)


@pytest.fixture(scope="module")
def weight(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "aoa.pth"
    checkpoint.save(path, small_model("aoa", WORDS), WORDS)
    return path


@pytest.fixture
def photograph(tmp_path):
    random_image().save(tmp_path / "holiday.png")
    return tmp_path / "holiday.png"


def test_an_explanation_is_that_of_the_model(weight, photograph):
    state = torch.get_rng_state()
    explanation = explain(photograph, weight=weight, caption="a dog runs",
                          methods=("lrp", "attention"), device="cpu")
    assert explanation.words == ["a", "dog", "runs", "<end>"]
    assert explanation.image.size == (90, 60)
    model, _ = checkpoint.load(weight)
    captions = torch.tensor([WORDS.encode(["a", "dog", "runs"], 3)])
    expected = model.lrp(preprocess(read_image(photograph), 112)[None], captions)
    heat = explanation.heatmap("dog")
    relevance = expected.pixels[0, 1].sum(0)
    assert heat.shape == (60, 90) and heat.dtype == np.float32
    assert heat.sum() == pytest.approx(relevance.sum().item(), rel=1e-4, abs=1e-4)
    left = relevance[:, :56].sum().item()
    assert heat[:, :45].sum() == pytest.approx(left, rel=1e-4, abs=1e-4)
    assert np.array_equal(heat, explanation.heatmap(1))
    assert not np.array_equal(heat, explanation.heatmap("runs"))
    assert explanation.heatmap("dog", "attention").min() >= 0
    overlay = np.asarray(explanation.overlay("dog")).astype(int)
    assert overlay.shape == (60, 90, 3) and np.ptp(overlay, axis=2).max() > 100
    assert repr(explanation) == f"holiday.png: a dog runs\n{explanation.table()}"
    page = explanation._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "&quot;holiday.png&quot;" in page

    # random numbers of the program that calls it go on as before, also for the model's own caption
    torch.set_rng_state(state)
    explain(photograph, weight, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_every_kind_and_own_captions(weight, photograph):
    first, *others = [explain(image, weight, device="cpu") for image in
                      (photograph, random_image(), np.asarray(random_image()))]
    assert all(np.array_equal(first.heatmap(0), other.heatmap(0)) for other in others)
    folder, listed = (explain(images, weight, device="cpu")
                      for images in (photograph.parent, [photograph, random_image()]))
    assert [each.name for each in folder] == ["holiday.png"]
    assert [each.caption for each in listed] == [first.caption] * 2 == [folder[0].caption] * 2
    assert first.words[-1] == "<end>" or len(first.words) == 50


def test_files(weight, photograph, tmp_path):
    explanation = explain(photograph, weight, "a dog", ("lrp", "grad_cam"), contrast="runs",
                          device="cpu")
    explanation.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "lrp.png", "grad_cam.png", "explanation.npz", "entry.html", "thumbnail.webp", "index.html"}
    explanation.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (tmp_path / "out" / "index.html").read_text()
    loaded = ExplainedImage.load(tmp_path / "out")
    assert repr(loaded).splitlines()[1:] == repr(explanation).splitlines()[1:]
    assert loaded.contrast == "runs" and loaded.image == explanation.image


def test_errors_are_those_of_the_command_line(weight, photograph, tmp_path):
    for arguments, message in [
            ({"caption": "a zebra"}, "words outside the model's vocabulary.*zebra"),
            ({"contrast": "zebra"}, "--contrast 'zebra'"), ({"methods": ["magic"]}, "magic"),
            ({"weight": tmp_path / "none.pth"}, "cannot be read"),
            ({"image": "nowhere.jpg"}, "nowhere.jpg")]:
        with refused(message):
            explain(**{"image": photograph, "weight": weight, "device": "cpu"} | arguments)
    explanation = explain(photograph, weight, "a dog", device="cpu")
    for call in (lambda: explanation.heatmap("cat"), lambda: explanation.overlay(3),
                 lambda: explanation.heatmap("dog", "gradient")):
        with refused():
            call()


def run_cell(source, namespace):
    """Executes a notebook's cell; the value of its last line, if it is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    if last:
        return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    return None


def test_the_notebook(weight, photograph, tmp_path, capsys):
    pytest.importorskip("transformers")
    path = ROOT / "docs" / "explain_your_images.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result"} and sources[0].startswith("WEIGHT = ")
    values = [str(weight), str(photograph), "a dog", "dog", "runs", [str(photograph)] * 2,
              str(tmp_path / "out")]
    sources.insert(1, f"WEIGHT, IMAGE, CAPTION, WORD, CONTRAST, OTHERS, FOLDER = {values}")
    namespace = {}
    shown = [type(run_cell(source, namespace)).__name__ for source in sources]
    assert [kind for kind in shown if kind != "NoneType"] == [
        "ExplainedImage", "Image", "Image", "Image", "Image"]
    assert "a white flower in a vase" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").exists()


def test_the_package_contains_its_data():
    tomllib = pytest.importorskip("tomllib")     # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / "captioning"
    data = {path for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")}
    patterns = project["package-data"]["captioning"]
    assert data == {path for pattern in patterns for path in folder.glob(pattern)}
