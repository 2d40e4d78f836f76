"""Tuning of glibc's allocator: keep the memory that every step needs again."""

import ctypes
import sys
from typing import Any

# Parameters of mallopt, as <malloc.h> numbers them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Keep freed memory in the process instead of returning it to the system.

    XLA on CPU allocates the temporaries of every step anew, and the page faults of
    fresh memory cost much of the CPU time. The function must be called before NumPy or
    JAX is imported. It does nothing where libc is not glibc.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return
    # The arenas of further threads are small and always return their memory.
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 2**28)


def return_freed_memory() -> None:
    """Return memory that was kept until now; the next work may need larger pieces."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """Return a function of glibc, or None where libc is another one."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
