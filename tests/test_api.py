"""from captioning import explain: what it returns, and the notebook that shows it."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captioning
from aoamodel import AOAModel
from captioning import checkpoint, explain
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import build
from captioning.errors import InputError

ROOT = Path(__file__).parents[1]
WORDS = build([["a", "dog", "runs", "fast"]], 1)


@pytest.fixture(scope="module")
def weight(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "aoa.pth"
    checkpoint.save(path, AOAModel(len(WORDS), embed_dim=8, hidden_dim=8, num_head=2, encoder="small"), WORDS)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "holiday.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def test_an_explanation_is_that_of_the_model(weight, photograph):
    explanation = explain(photograph, weight=weight, caption="a dog runs", methods=("lrp", "attention"), device="cpu")
    assert explanation.words == ["a", "dog", "runs", "<end>"] and explanation.image.size == (90, 60)
    model, _ = checkpoint.load(weight)
    expected = model.lrp(preprocess(read_image(photograph), 112)[None], torch.tensor([WORDS.encode(["a", "dog", "runs"],
                                                                                                   3)]))
    heat = explanation.heatmap("dog")
    relevance = expected.pixels[0, 1].sum(0)
    assert heat.shape == (60, 90) and heat.dtype == np.float32
    assert heat.mean() == pytest.approx(relevance.mean().item(), rel=0.2, abs=0.02 * relevance.abs().max().item())
    assert np.array_equal(heat, explanation.heatmap(1)) and not np.array_equal(heat, explanation.heatmap("runs"))
    assert explanation.heatmap("dog", "attention").min() >= 0
    overlay = np.asarray(explanation.overlay("dog")).astype(int)
    assert overlay.shape == (60, 90, 3) and np.ptp(overlay, axis=2).max() > 100
    lines = repr(explanation).splitlines()
    assert lines[0] == "holiday.png: a dog runs" and len(lines) == 6 and lines[3].split()[0] == "dog"
    assert float(lines[3].split()[2]) == pytest.approx(expected.image[0, 1].item(), abs=0.006)
    page = explanation._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "&quot;holiday.png&quot;" in page


def test_images_of_every_kind_and_own_captions(weight, photograph):
    with Image.open(photograph) as image:
        explanations = [explain(source, weight, device="cpu") for source in (photograph, image, np.asarray(image))]
    assert all(np.array_equal(explanations[0].heatmap(0), other.heatmap(0)) for other in explanations[1:])
    assert explanations[0].words[-1] == "<end>" or len(explanations[0].words) == 50


def test_files(weight, photograph, tmp_path):
    explanation = explain(photograph, weight, "a dog", ("lrp", "grad_cam"), contrast="runs", device="cpu")
    explanation.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"lrp.png", "words_lrp.png", "grad_cam.png", "words_grad_cam.png", "explanation.npz", "entry.html",
                     "thumbnail.webp", "index.html"}
    explanation.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (tmp_path / "out" / "index.html").read_text()


def test_errors_are_those_of_the_command_line(weight, photograph, tmp_path):
    for arguments, message in [({"caption": "a zebra"}, "words outside the model's vocabulary.*zebra"),
                               ({"contrast": "zebra"}, "--contrast 'zebra'"), ({"methods": ["magic"]}, "magic"),
                               ({"weight": tmp_path / "none.pth"}, "cannot be read")]:
        with pytest.raises(InputError, match=message):
            explain(photograph, **{"weight": weight, "device": "cpu"} | arguments)
    with pytest.raises(InputError, match="nowhere.jpg"):
        explain("nowhere.jpg", weight, device="cpu")
    explanation = explain(photograph, weight, "a dog", device="cpu")
    for call in (lambda: explanation.heatmap("cat"), lambda: explanation.overlay(3),
                 lambda: explanation.heatmap("dog", "gradient")):
        with pytest.raises(InputError):
            call()
    with pytest.raises(AttributeError):
        _ = captioning.nothing


def run_cell(source, namespace):
    """Executes a notebook's cell; the value of its last line, if it is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace) if last else None


def test_the_notebook(weight, photograph, tmp_path, capsys):
    path = ROOT / "docs" / "explain_your_images.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"]) and sources[0].startswith("WEIGHT = ")
    own = f"WEIGHT, IMAGE, CAPTION, CONTRAST, FOLDER = {[str(weight), str(photograph), 'a dog', 'runs', str(tmp_path)]}"
    namespace = {}
    results = [run_cell(source, namespace) for source in (sources[0], own, *sources[1:])]
    shown = [result for result in results if result is not None]
    assert [type(result).__name__ for result in shown] == ["ImageExplanation", "Image", "Image", "ImageExplanation"]
    assert "a dog" in capsys.readouterr().out and (tmp_path / "index.html").exists()


def test_the_package_contains_what_it_imports(tmp_path):
    tomllib = pytest.importorskip("tomllib")     # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = project["package-data"]["captioning"]
    data = {path for path in (ROOT / "captioning").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == {path for pattern in patterns for path in (ROOT / "captioning").glob(pattern)}
    # importable from elsewhere, with what an editable installation puts on the path
    code = "import gridTDmodel, aoamodel; from captioning import explain; print(explain.__name__)"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                             capture_output=True, text=True)
    assert process.stdout == "explain\n", process.stderr
