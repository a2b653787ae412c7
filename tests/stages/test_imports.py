"""Processes import torch only where they need it."""

import subprocess
import sys


def printed(code, *words):
    return subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True).stdout


def test_planning_a_run_imports_neither_torch_nor_ray():
    heavy = "torch", "ray", "matplotlib"
    code = f"import sys, rayseg.pipelines.predict; print([name for name in {heavy} if name in sys.modules])"
    assert printed(code) == "[]\n"


def test_processes_that_read_and_write_do_not_import_torch():
    """Each would take seconds, and hundreds of megabytes, of its own."""
    stages = ["read", "to_rgb", "propose", "enlarge", "classify_plots", "score", "write", "decide_cues"]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'rayseg.stages.{name}')\n"
    assert printed(code + "    print(name, 'torch' in sys.modules)", *stages).split() == [
        word for name in stages for word in (name, "False")
    ]
