"""What a process is told before it works: Python, OpenMP and glibc have habits that cost more than the work itself."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = ("GOMP_SPINCOUNT", "3000")
ARENAS = ("MALLOC_ARENA_MAX", "1")
"""What processes find in their environment when they begin (docs/decisions/0012 and 0013)."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h


def prepare() -> None:
    """Set this process up, and its environment for those that it starts; before threads are and PyTorch is imported.

    A command begins with seconds of imports, which make objects by the million and drop none: looking for garbage after
    every 700 of them, as Python does by default, takes a sixth of that time.
    """
    gc.set_threshold(50_000)
    if "OMP_WAIT_POLICY" not in os.environ:  # which says the same, and would no longer be heard
        os.environ.setdefault(*SPINS)
    libc = _glibc()
    if libc and ARENAS[0] not in os.environ:  # else this process has been told when it began
        os.environ.setdefault(*ARENAS)
        libc.mallopt(_ARENA_MAX, int(ARENAS[1]))


class _Users:
    """How many blocks reuse memory just now, in whatever threads; one for the process, as its heap is."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()


_USERS = _Users()


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let freed memory be used again inside this block instead of going back to the system.

    glibc maps every tensor over 32 MB afresh; the page faults of large layers then cost as much time as their
    arithmetic. Affects the whole process, where all threads have one heap (`prepare`); memory goes back when the last
    such block ends. Elsewhere it does nothing.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    with _USERS.lock:
        _USERS.count += 1
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _USERS.lock:
            _USERS.count -= 1
            if not _USERS.count:
                libc.mallopt(_MMAP_MAX, 65536)
                libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
                libc.mallopt(_TRIM_THRESHOLD, 1 << 26)
                libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
