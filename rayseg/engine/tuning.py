"""Settings of a process for garbage collection, OpenMP threads and glibc's heap, whose defaults slow stages down."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = ("GOMP_SPINCOUNT", "3000")
ARENAS = ("MALLOC_ARENA_MAX", "1")
"""Environment variables that processes have when they start (docs/decisions/0012 and 0013)."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h
_lock = threading.Lock()
_blocks = 0
"""Blocks of `reused_memory` that are open in all threads together: a process has one heap."""


def prepare() -> None:
    """Set up this process and the environment of its child processes, before threads start or PyTorch is imported.

    The imports at the start of a command create millions of objects and free none: Python's default of one garbage
    collection for every 700 of them takes a sixth of the time of the imports.
    """
    gc.set_threshold(50_000)
    if "OMP_WAIT_POLICY" not in os.environ:  # the user's policy, which GOMP_SPINCOUNT would override
        os.environ.setdefault(*SPINS)
    libc = _glibc()
    if libc and ARENAS[0] not in os.environ:  # glibc has read the variable if it was set at the start
        os.environ.setdefault(*ARENAS)
        libc.mallopt(_ARENA_MAX, int(ARENAS[1]))


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keep freed memory for reuse inside this block instead of returning it to the operating system.

    glibc maps new memory for every tensor over 32 MB; the page faults of large layers then take as much time as their
    arithmetic. The setting affects the whole process, where all threads have one heap (`prepare`); memory is returned
    when the last such block ends. Without glibc it does nothing.
    """
    global _blocks
    libc = _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _blocks += 1
        # No block is mapped by itself, and the top of the heap is never trimmed.
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            # Blocks of several threads overlap: only the last one restores the defaults.
            if not _blocks:
                libc.mallopt(_MMAP_MAX, 65536)  # glibc's default; the thresholds are the largest that it sets itself
                libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
                libc.mallopt(_TRIM_THRESHOLD, 1 << 26)
                libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
