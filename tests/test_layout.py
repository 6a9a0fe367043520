"""The layout explains itself: imports go downwards, modules are short, tests import no tests."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# as in captioning/__init__.py
LAYERS = ("data", "explanation", "metrics", "training", "report", "experiments")
PACKAGE = sorted((ROOT / "captioning").rglob("*.py"))
FOLDERS = ("captioning", "pycocoevalcap", "bert", "benchmarks", "studies")
PRODUCT = [*ROOT.glob("*.py")]
for folder in FOLDERS:
    PRODUCT += (ROOT / folder).rglob("*.py")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path, level=ast.walk):
    """Names of the modules that a file imports; level: which statements count."""
    modules = set()
    for node in level(parsed(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def layer(parts):
    """Position of a module's sub-package among the layers; -1 if it is directly in captioning."""
    return LAYERS.index(parts[1]) if len(parts) > 2 and parts[1] in LAYERS else -1


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_sub_packages_import_only_lower_ones_and_no_script(path):
    parts = path.relative_to(ROOT).parts
    for module in imported_modules(path):
        imported = module.split(".")
        if imported[0] == "captioning" and parts[1] in LAYERS:
            assert layer([*imported, ""]) <= layer(parts), f"{path} imports {module}"
        # the models are imported where they are created, not at module level
        is_script = imported[0] in SCRIPTS - {"gridTDmodel", "aoamodel"}
        assert not is_script, f"{path} imports {module}"


def test_module_level_imports_have_no_cycles():
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE}
    edges = {}
    for path, name in names.items():
        modules = imported_modules(path, lambda tree: tree.body)
        edges[name] = set()
        for other in names.values():
            if other != name and any(f"{module}.".startswith(f"{other}.") for module in modules):
                edges[name].add(other)
    while edges:
        leaves = {name for name, modules in edges.items() if not modules & edges.keys()}
        assert leaves, f"these modules import each other: {sorted(edges)}"
        edges = {name: modules for name, modules in edges.items() if name not in leaves}


def test_no_module_is_longer_than_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_no_test_module_imports_another():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {module.split(".")[0] for module in imported_modules(path)} & tests, path


def test_every_package_states_what_belongs_there():
    for path in (ROOT / "captioning").rglob("__init__.py"):
        assert "mport" in ast.get_docstring(parsed(path)), path
