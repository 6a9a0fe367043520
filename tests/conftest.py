"""Fixtures that several test modules share.

Imports of PyTorch are late: the process that only distributes tests needs none."""
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda", "mps"], default="cpu",
                     help="device of the tests in tests/test_device.py; the others need a CPU")
    group = parser.getgroup("reliability", "longer tests of reliability (docs/reliability.md)")
    group.addoption("--fuzz_cases", type=int, default=1000,
                    help="damaged inputs that the fuzz tests generate")
    group.addoption("--fuzz_shrink", action="store_true", help="simplify a failing case")
    group.addoption("--crash_runs", type=int, default=12,
                    help="how often the crash tests stop a script")
    group.addoption("--models", type=int, default=48,
                    help="random models that the numerical tests explain")
    group.addoption("--captions", type=int, default=100_000,
                    help="captions of COCO whose tokens are compared with the original tokeniser's")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        return
    from captioning.device import pick_device
    from captioning.errors import InputError
    try:
        pick_device(config.getoption("--device"))
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process has to wait for them at the end."""
    longest = ("test_distributed.py", "test_real_photographs.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="session")
def device(pytestconfig):
    """torch.device of --device."""
    from captioning.device import pick_device
    return pick_device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small models gain nothing from more, and lose much where processes compete for the cores."""
    import torch
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A data folder with a small demo data set, features of a random encoder and random regions."""
    from helpers import call, prepare_flags, write_region_features

    import preparedataset
    folder = tmp_path_factory.mktemp("data")
    call(preparedataset, *prepare_flags(folder))
    write_region_features(folder)
    return folder


@pytest.fixture(scope="session")
def trained(demo_data, tmp_path_factory):
    """The folder of a model that train.py trained on region features for an epoch."""
    from helpers import REGIONS, train_run
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_run(demo_data, folder, *REGIONS, "--epochs", "1")
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real photographs beside the repository; skips the test if there is none."""
    if not SHARED.exists():
        pytest.skip(f"no real photographs at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def small_files(tmp_path_factory):
    """A folder with a small file of every format."""
    from fuzz import workspace
    folder = tmp_path_factory.mktemp("small") / "files"
    with pytest.MonkeyPatch.context() as patch:     # the scripts replace stdout
        patch.setattr(sys, "stdout", sys.stdout)
        patch.chdir(folder.parent)
        workspace.build(folder)
    return folder
