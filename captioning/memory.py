"""Checks before memory is allocated, so that a mistyped size ends with one sentence."""
import os
from pathlib import Path

from captioning.errors import InputError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_size():
    """Bytes of main memory that this process may use: the machine's or its container's; infinite if unknown."""
    limits = [float("inf")]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in map(Path, CGROUP_LIMITS):
        text = path.read_text().strip() if path.exists() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def check_memory(size, what, remedy):
    """InputError if `size` bytes exceed the main memory. what: the subject of the sentence; remedy: its end."""
    if size > memory_size():
        raise InputError(f"{what} needs {readable(size)} of memory, of which this machine has "
                         f"{readable(memory_size())}: {remedy}")


def readable(size):
    """A number of bytes as text: 3.1 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
