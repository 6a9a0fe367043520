"""Several processes under torchrun: their ranks, sharing of work, and gathering of results."""
import datetime
import os
import sys
import warnings

import torch
from torch import distributed

from captioning.errors import InputError


def start():
    """Joins the processes of torchrun if there are several; only the first keeps writing."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or distributed.is_initialized():
        return
    try:
        # others that were never started would be waited for
        minutes = datetime.timedelta(minutes=10)
        store, own_rank, size = next(distributed.rendezvous("env://", timeout=minutes))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes that WORLD_SIZE announces cannot be joined ({error}): "
                         "start all of them with torchrun, or unset WORLD_SIZE") from error
    # PyTorch recommends a name instead that its older versions lack
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_reduce", FutureWarning)
    # the first process may wait for the slowest one for as long as that takes
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    days = datetime.timedelta(days=30)
    store.set_timeout(days)
    distributed.init_process_group(backend, store=store, rank=own_rank, world_size=size,
                                   timeout=days)
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
    parts = gather_each(items)
    return [parts[i % count()][i // count()] for i in range(sum(map(len, parts)))]


def gather_each(item):
    """List of the items that the processes gave, one each, in every process."""
    items = [item] * count()
    if count() > 1:
        distributed.all_gather_object(items, item)
    return items


def from_first(function, *args):
    """The result of function(*args), which the first process calls alone, in every process."""
    result = [None if rank() else function(*args)]
    if count() > 1:
        distributed.broadcast_object_list(result)
    return result[0]


def wait():
    """Returns when all processes have called it."""
    if count() > 1:
        distributed.barrier()


def total(values):
    """The sum of a tensor over all processes, in every process."""
    if count() > 1:
        distributed.all_reduce(values)
    return values


def any_of(condition):
    """Whether the condition is true in any process."""
    return total(torch.tensor(bool(condition), dtype=torch.int)).item() > 0


def sum_gradients(parameters):
    """Replaces the parameters' gradients by their sums over all processes, in one transfer."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sums = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, sums.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
