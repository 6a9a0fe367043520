"""What announces several processes, but does not start them, ends with one sentence."""
import pytest
from helpers import refused

from captioning import processes


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "x"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "y"}])
def test_processes_that_cannot_be_joined(monkeypatch, environment):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with refused("WORLD_SIZE announces cannot be joined"):
        processes.start()
