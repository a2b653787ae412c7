"""What processes are told before they work."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayseg.process import FOR_CHILDREN, reused_memory


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system_when_the_block_ends():
    before = resident_mib()
    with reused_memory():
        for _ in range(2):
            assert torch.ones(64 << 18).sum() == 64 << 18
    assert resident_mib() < before + 32


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_kept_until_the_last_of_several_blocks_ends():
    size, other = 256 << 18, reused_memory()
    other.__enter__()
    before = resident_mib()
    with reused_memory():
        torch.ones(size)
    assert resident_mib() > before + 200
    other.__exit__(None, None, None)
    assert resident_mib() < before + 32


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_threads_of_a_command_share_one_heap_and_children_are_told():
    code = """
import ctypes, os, threading
from rayseg import process
process.prepare()
threads = [threading.Thread(target=lambda: [bytes(10_000) for _ in range(100)]) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
print(os.environ["MALLOC_ARENA_MAX"], os.environ["GOMP_SPINCOUNT"])
"""
    outside = {name: value for name, value in os.environ.items() if name not in FOR_CHILDREN}
    done = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3000"]
    assert done.stderr.count("Arena ") == 1
