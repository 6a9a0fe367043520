"""Batches for training, captioning and experiments, read by worker processes."""
import signal

from torch.utils.data import DataLoader


def collate(batch):
    """The identity: CaptionDataset gives whole batches."""
    return batch


def make_loader(data, batches, workers, device):
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=min(workers, len(batches)),
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def ignore_signals(_):
    """Ctrl-C reaches a terminal's whole process group: the main process decides when its workers stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
