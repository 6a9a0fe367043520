"""The DataLoader for training, captioning and experiments."""
import atexit
import multiprocessing
import signal

from torch.utils.data import DataLoader

STOP = (signal.SIGINT, signal.SIGTERM)


def collate(batch):
    """The identity, since CaptionDataset returns whole batches."""
    return batch


class Loader(DataLoader):
    """A DataLoader whose workers start while signals wait: Python would ignore a
    KeyboardInterrupt that is raised while a process is forked."""

    def __iter__(self):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def make_loader(data, batches, workers, device):
    """A DataLoader over `data`, which lists of indices, the `batches`, index."""
    return Loader(data, batch_sampler=batches, collate_fn=collate,
                  num_workers=min(workers, len(batches)), pin_memory=device.type == "cuda",
                  worker_init_fn=ignore_signals)


def ignore_signals(_):
    """Ctrl-C reaches every process of a terminal: the main process alone stops the workers."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Ends the workers that an exception left behind, for which Python would wait forever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        # otherwise PyTorch would report that they were killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in workers:
        process.kill()
