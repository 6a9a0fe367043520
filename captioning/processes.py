"""Several processes under torchrun: which one this is, and what they tell each other."""
import datetime
import os
import sys

from torch import distributed


def start():
    """Joins the processes of torchrun, if there are several; only the first goes on writing to the screen."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    # nobody is lost: the first may wait for the slowest for as long as that takes
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    if rank():
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def count():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own(items):
    """Every n-th of a list, for this one of n processes."""
    return items[rank()::count()]


def all_of(items):
    """The list whose every n-th item each of n processes holds."""
    if count() == 1:
        return items
    parts = [None] * count()
    distributed.all_gather_object(parts, items)
    return [parts[i % count()][i // count()] for i in range(sum(map(len, parts)))]


def wait():
    """Until all processes are here."""
    if count() > 1:
        distributed.barrier()
