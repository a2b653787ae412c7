"""timm and torchvision without torch's compiler, which they import for its decorators alone.

It takes as long to import as torch itself, in every process that holds a model, and nothing here compiles. Import this
module before either of them; the compiler is imported when something first calls it.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch._compile

_ASKED = "torch._dynamo.utils"


@contextmanager
def _compiler_deferred() -> Iterator[None]:
    """Stand in for what the two libraries ask of the compiler, unless it is there already."""
    if _ASKED in sys.modules:
        yield
        return
    disable = torch.compiler.disable
    torch.compiler.disable = torch._compile._disable_dynamo  # type: ignore[assignment] # torch's own lazy one
    sys.modules[_ASKED] = stand_in = ModuleType(_ASKED)
    stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del sys.modules[_ASKED]


def _is_compile_supported(device_type: str) -> bool:
    return bool(importlib.import_module(_ASKED).is_compile_supported(device_type))


with _compiler_deferred():
    import timm  # noqa: F401
    import torchvision  # noqa: F401
