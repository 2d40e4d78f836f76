"""Tuning of glibc's allocator: keep the memory that every step needs again."""

import ctypes
import sys

# Parameters of mallopt, as <malloc.h> numbers them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Keep freed memory in the process instead of returning it to the system.

    XLA on CPU allocates the temporaries of every step anew, and the page faults of
    fresh memory cost much of the CPU time. The function must be called before NumPy or
    JAX is imported. It does nothing where libc is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    # The arenas of further threads are small and always return their memory.
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 2**28)
