"""Several processes under torchrun: their ranks, sharing of work, and gathering of results."""
import datetime
import os
import sys

from torch import distributed


def start():
    """Joins the processes of torchrun if there are several; only the first keeps writing to standard output."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    # the first process may wait for the slowest one for as long as that takes
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    if rank():
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115


def rank():
    """Index of this process, 0 without torchrun."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count():
    """Number of processes, 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def shard(items):
    """Every n-th item of a list, for this one of n processes."""
    return items[rank()::count()]


def gather(items):
    """The list of which each of n processes has the items of its `shard`, in every process."""
    if count() == 1:
        return items
    parts = [None] * count()
    distributed.all_gather_object(parts, items)
    return [parts[i % count()][i // count()] for i in range(sum(map(len, parts)))]


def wait():
    """Returns when all processes have called it."""
    if count() > 1:
        distributed.barrier()
