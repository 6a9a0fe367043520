"""Fixtures that several test modules share."""
from pathlib import Path

import pytest
import torch
from helpers import prepare_flags

import preparedataset

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small models gain nothing from more threads, and lose much where other processes compete for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A data folder with a small demo data set and stored features of the randomly initialised small encoder."""
    folder = tmp_path_factory.mktemp("data")
    preparedataset.main(preparedataset.get_args_parser().parse_args(prepare_flags(folder)))
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real photographs beside the repository; tests that need it are skipped where it is missing."""
    if not SHARED.exists():
        pytest.skip(f"no real photographs at {SHARED}")
    return SHARED
