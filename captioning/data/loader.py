"""The DataLoader for training, captioning and experiments, and its worker processes."""
import atexit
import multiprocessing
import os
import shutil
import signal
import threading
from functools import cache

from torch.utils.data import DataLoader

SHARED = "/dev/shm"
NEEDED = 0.5e9      # bytes
FILES = 64          # that a process without workers may open
FILES_PER_WORKER = 16
STOP = (signal.SIGINT, signal.SIGTERM)


def collate(batch):
    """The identity, since CaptionDataset returns whole batches."""
    return batch


class Loader(DataLoader):
    """A DataLoader whose workers start while signals wait: Python would ignore a
    KeyboardInterrupt that is raised while a process is forked."""

    def __iter__(self):
        if os.name == "nt":     # which forks no process
            return super().__iter__()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def make_loader(data, batches, workers, device, collate=collate):
    """A DataLoader over `data`, which lists of indices, the `batches`, index. collate: what workers
    compute of a batch, which is the list of its items unless `data` returns whole batches."""
    workers = possible_workers(min(workers, len(batches)))
    # batches reach the main process through shared memory; without space they would never arrive
    if workers and os.path.isdir(SHARED) and shutil.disk_usage(SHARED).free < NEEDED:
        _print_once(f"--workers 0, as {SHARED} has less than {NEEDED / 1e9:.1f} GB (docker run "
                    "--shm-size)")
        workers = 0
    return Loader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                  pin_memory=device.type == "cuda", worker_init_fn=start_worker)


def possible_workers(workers):
    """The number of workers, or how many can be reached through the files that may be open."""
    if os.name == "nt":
        return workers
    import resource  # which Windows lacks
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = max(0, limit - FILES) // FILES_PER_WORKER
    if limit == resource.RLIM_INFINITY or workers <= possible:
        return workers
    _print_once(f"--workers {possible}, as only {limit} files may be open (ulimit -n)")
    return possible


@cache
def _print_once(text):
    print(text, flush=True)


def start_worker(_):
    """Ctrl-C reaches every process of a terminal: the main process alone stops the workers, which
    end even amid their work as soon as it has ended."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


@atexit.register
def end_workers():
    """Ends the workers that an exception left behind, for which Python would wait forever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        # otherwise PyTorch would report that they were killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in workers:
        process.kill()
