"""Commands with damaged files and unusual flags end with valid output or with one sentence."""
import shlex
import shutil
from pathlib import Path

import pytest
from fuzz import damage, workspace
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).with_name("corpus.txt")
# share of the cases for each command: fast ones get most
WEIGHTS = [4 if command.startswith(("preparedataset", "evaluation --device")) else 1
           for command in workspace.COMMANDS]
# they start processes or use the network
DOWNLOADS = ("--workers", "--detector", "--corenlp", "--bert_model")
FLAG_VALUES = ["", "0", "-1", "1", "2", "nan", "inf", "1e400", "1e-320", "1" + "0" * 20, "9" * 5000,
               "1000000000", "none", ".", "missing", "missing/missing", "images", "words.txt",
               "/dev/null", "\udcff", "a\nb", "$\\frac{$", "x" * 300]


@pytest.fixture(scope="module")
def copies(small_files, tmp_path_factory):
    """A function that returns a copy of small_files, always in the same folder."""
    folder = shutil.copytree(small_files, tmp_path_factory.mktemp("fuzz") / "copy")
    intact = workspace.states(folder)

    def copy():
        nonlocal intact
        intact = workspace.restore(folder, small_files, intact)
        return folder
    return copy


def cases(config, share):
    """Settings of hypothesis for this share of all cases, the same unless --hypothesis-seed."""
    return settings(max_examples=max(1, round(share * config.getoption("fuzz_cases"))),
                    deadline=None, database=None,
                    derandomize=config.getoption("--hypothesis-seed") is None, print_blob=True,
                    phases=[Phase.generate, Phase.shrink] if config.getoption("fuzz_shrink")
                    else [Phase.generate],
                    suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("command", workspace.COMMANDS, ids=[str(i) for i in range(len(WEIGHTS))])
def test_commands_succeed_with_intact_files(copies, command):
    assert workspace.check(command, copies()) == 0


@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_damaged_files(copies, pytestconfig, number):
    command, patterns = list(workspace.COMMANDS.items())[number]

    @cases(pytestconfig, 0.7 * WEIGHTS[number] / sum(WEIGHTS))
    @given(st.data())
    def test(data):
        folder = copies()
        paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
        path = data.draw(st.sampled_from(paths), label="file")
        damage.tamper(data.draw, path)
        workspace.check(command, folder, with_plots=has_plots(data))
    test()


def has_plots(data):
    """Whether the case draws plots: one in eight."""
    return data.draw(st.integers(0, 7), label="plots if 0") == 0


def flags_of(script):
    return [action.option_strings[0]
            for action in workspace.SCRIPTS[script].get_args_parser()._actions
            if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_unusual_flags(copies, pytestconfig, number):
    command = list(workspace.COMMANDS)[number].split()
    flags = [flag for flag in flags_of(command[0]) if flag not in DOWNLOADS]

    @cases(pytestconfig, 0.3 / len(WEIGHTS))
    @given(st.data(), st.sampled_from(flags), st.sampled_from(FLAG_VALUES))
    def test(data, flag, value):
        workspace.check([*command, flag, value], copies(), with_plots=has_plots(data))
    test()


@pytest.mark.parametrize("line", CORPUS.read_text(encoding="utf-8").splitlines())
def test_inputs_that_once_failed(copies, line):
    """Each line: the number of a command, a file and its new content, or a flag and its value."""
    number, name, value = shlex.split(line)
    command, folder = list(workspace.COMMANDS)[int(number)].split(), copies()
    if name.startswith("--"):
        assert workspace.check([*command, name, value], folder, [name, value[:40]]) == 2
    else:
        (folder / name).write_text(value)
        assert workspace.check(command, folder, [name]) == 2
