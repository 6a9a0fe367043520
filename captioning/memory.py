"""Kept until all callers import captioning.files."""
from captioning.files import check_memory, readable  # noqa: F401
