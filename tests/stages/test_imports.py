"""Processes import torch only where they need it."""

import subprocess
import sys

import pytest


def printed(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_planning_a_run_imports_neither_torch_nor_ray():
    heavy = "torch", "ray", "matplotlib"
    code = f"import sys, rayseg.pipelines.predict; print([name for name in {heavy} if name in sys.modules])"
    assert printed(code) == "[]\n"


@pytest.mark.parametrize(
    "stage",
    ["read", "to_rgb", "propose", "enlarge", "classify_plots", "score", "write", "decide_cues"],
)
def test_processes_that_read_and_write_do_not_import_torch(stage):
    """Each would take seconds, and hundreds of megabytes, of its own."""
    assert printed(f"import sys, rayseg.stages.{stage}; print('torch' in sys.modules)") == "False\n"
