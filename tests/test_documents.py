"""Documents and scripts agree with the code: links lead somewhere, and every flag exists."""
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.measure import get_parser

ROOT = Path(__file__).parents[1]
SHELL = sorted([*ROOT.glob("configs/*.sh"), *ROOT.glob("studies/*/run.sh")])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*.md"),
                    *ROOT.glob("studies/*/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def anchors(text):
    """The anchors of a Markdown document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


def test_all_figures_are_shown():
    text = "".join(path.read_text("utf-8") for path in DOCUMENTS)
    for figure in (ROOT / "docs" / "figures").iterdir():
        assert figure.name in text, figure


def flags(script):
    """The flags of a script; it is called in the repository."""
    name = script.removesuffix(".py").replace("/", ".")
    module = import_module(name)
    if name.startswith("benchmarks."):
        parser = get_parser(module.__doc__, flags=getattr(module, "FLAGS", None))
    else:
        parser = module.get_args_parser()
    return set(parser._option_string_actions)


@pytest.mark.parametrize("path", [*SHELL, *DOCUMENTS], ids=lambda path: path.name)
def test_commands_have_existing_flags(path):
    text = path.read_text("utf-8").replace("\\\n", " ")
    pattern = r"(?:python|torchrun[^\n]*?) +((?:\w+/)*\w+\.py)([^\n`]*)"
    for script, arguments in re.findall(pattern, text):
        assert (ROOT / script).exists(), script
        given = set(re.findall(r"(?<![\w-])--[a-z_]+", arguments.split(";")[0].split("#")[0]))
        assert given <= flags(script) | {"--help"}, (script, given - flags(script))


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_have_valid_syntax(path):
    subprocess.run(["bash", "-n", shlex.quote(str(path))], check=True)


def test_numbers_of_cases_are_those_that_pytest_counts():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = re.findall(r"\| `pytest ([^`]+)` \| (\d+) \|", text)
    files = " ".join(names for names, _ in rows).split()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    counted = [(names, str(sum(f"\n{collected}".count(f"\n{name}::") for name in names.split())))
               for names, _ in rows]
    assert len(rows) > 3 and counted == rows
