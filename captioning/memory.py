"""Kept until all callers import captioning.files."""
from captioning.files import check_memory, memory_size, readable  # noqa: F401
