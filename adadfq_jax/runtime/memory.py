"""The memory of the devices."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

# The limit of a container, which may be below the machine's memory.
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def of_each(devices: Sequence[jax.Device]) -> int | None:
    """Return the bytes of memory for each of this process's devices; None if unknown.

    CPU devices share the memory of the machine or of the container.
    """
    if devices[0].platform != "cpu":
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CONTAINER.is_file() and (limit := _CONTAINER.read_text().strip()).isdigit():
        whole = min(whole, int(limit))
    return whole // len(devices)
