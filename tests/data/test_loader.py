"""Workers need shared memory and open files: with too few there are none, instead of a hang."""
import os
import resource
import signal

import pytest
import torch

from captioning.data import loader
from captioning.errors import run_script

CPU = torch.device("cpu")


class Data:
    def __getitems__(self, indices):
        return indices


def test_without_shared_memory_there_are_no_workers(monkeypatch, capsys):
    assert loader.make_loader(Data(), [[0], [1]], 1, CPU).num_workers == 1
    monkeypatch.setattr(loader, "NEEDED", 1e18)
    for _ in range(2):
        batches = loader.make_loader(Data(), [[0], [1]], 1, CPU)
        assert batches.num_workers == 0 and list(batches) == [[0], [1]]
    assert capsys.readouterr().out.count("--workers 0, as /dev/shm has less than") == 1


@pytest.mark.parametrize(("limit", "asked", "possible"), [
    (16, 2, 0), (96, 2, 2), (96, 3, 2), (1024, 64, 60), (1024, 60, 60),
    (resource.RLIM_INFINITY, 256, 256)])
def test_as_many_workers_as_open_files_allow(monkeypatch, capsys, limit, asked, possible):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    loader._print_once.cache_clear()
    assert loader.possible_workers(asked) == possible
    said = f"--workers {possible}, as only {limit} files may be open" in capsys.readouterr().out
    assert said == (possible < asked)


class Killed:
    def __getitems__(self, indices):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_script_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        run_script(lambda _: list(loader.make_loader(Killed(), [[0]], 1, CPU)), None)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1
    assert errors.startswith("error: a worker process has ended") and "lower --workers" in errors
