"""Garbage collection, OpenMP threads and the heap of a process."""

import os
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from rayseg.engine import tuning
from rayseg.engine.tuning import ARENAS, SPINS, reused_memory
from rayseg.models.sam import SamConfig, SamProposer, _nothing
from rayseg.stages.label import LabelTile
from rayseg.stages.predict import Predict
from rayseg.train import session


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
    with ExitStack() as first, ExitStack() as last:
        first.enter_context(reused_memory())
        last.enter_context(reused_memory())
        before = resident_mib()
        first.close()
        torch.ones(256 << 18)
        assert resident_mib() > before + 200
        last.close()
        assert resident_mib() < before + 32


def in_a_block(seen):
    """A replacement for the work that records how many blocks are open."""

    def note(*_, **__):
        seen.append(tuning._blocks)
        return {}

    return note


def test_tiles_sam_and_trainings_reuse_their_memory(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Predict, "_tile", in_a_block(seen))
    monkeypatch.setattr(LabelTile, "_tile", in_a_block(seen))
    Predict("")([{}])
    LabelTile(margin=0, sieve=0)([{}])
    monkeypatch.setattr("rayseg.models.sam.amg.generate_crop_boxes", lambda *_: ([[0, 0, 1, 1]], [0]))
    monkeypatch.setattr("rayseg.models.sam.amg.build_all_layer_point_grids", lambda *_: [None])
    monkeypatch.setattr(SamProposer, "_crop", lambda *_: in_a_block(seen)() or _nothing("cpu"))
    SamProposer(None, SamConfig())(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), bool))
    session.fit(in_a_block(seen), {}, session.Setup(tmp_path), name="x")
    assert seen == [1, 1, 1, 1]
    assert tuning._blocks == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_a_command_has_one_heap_and_its_children_inherit_the_settings():
    settings, arenas = begun({})
    assert settings == ["1", "3000", "False"]
    assert arenas == 1
    assert begun({"GOMP_SPINCOUNT": "7", "MALLOC_ARENA_MAX": "odd"})[0] == ["odd", "7", "False"]
    assert begun({"OMP_WAIT_POLICY": "passive"})[0] == ["1", "-", "False"]


def begun(environment):
    """(environment of children and whether PyTorch is imported, heaps) of a process that starts as commands do."""
    code = """
import ctypes, os, sys, threading
import rayseg.cli
threads = [threading.Thread(target=lambda: [bytes(10_000) for _ in range(100)]) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
print(os.environ["MALLOC_ARENA_MAX"], os.environ.get("GOMP_SPINCOUNT", "-"), "torch" in sys.modules)
"""
    outside = {name: value for name, value in os.environ.items() if name not in {SPINS[0], ARENAS[0]}}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=outside | environment, capture_output=True, text=True, check=True)
    return done.stdout.split(), done.stderr.count("Arena ")
