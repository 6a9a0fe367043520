"""Workers need shared memory: with too little of it there are none, instead of a hang."""
import torch

from captioning.data import loader

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
