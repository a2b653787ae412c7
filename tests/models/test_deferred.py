"""What is not imported until it is needed."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import is_compile_supported

import rayseg.models.deferred  # noqa: F401


def test_planning_a_run_imports_neither_torch_nor_ray():
    found = (
        "import sys, rayseg.pipelines.predict; print([n for n in ('torch', 'ray', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", found], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "stages", ["read", "to_rgb", "propose", "enlarge", "classify_plots", "score", "write", "decide_cues"]
)
def test_processes_that_read_and_write_do_not_import_torch(stages):
    """Each would take seconds, and hundreds of megabytes, of its own."""
    found = f"import sys, rayseg.stages.{stages}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", found], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_segmenter_is_built_without_torchs_compiler():
    found = "import sys, rayseg.models.segmenter; print('torch._dynamo.utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", found], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_compiler_itself_is_left_as_it_was():
    assert torch.compiler.disable.__module__ == "torch.compiler"
    assert is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
