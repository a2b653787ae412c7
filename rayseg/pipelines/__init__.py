"""The pipelines by name: the only list of them, read by the command line and by the server.

A pipeline is a module with `Config`, `check`, `forecast` and `run`. It is imported when it is needed, because PyTorch
takes seconds to import.
"""

import importlib
from types import ModuleType

from rayseg.errors import ConfigError

PIPELINES = {
    "gpc": "rayseg.pipelines.gpc",
    "agri": "rayseg.pipelines.agri",
    "superpixel": "rayseg.pipelines.superpixel",
    "landcover": "rayseg.pipelines.landcover",
    "al-s4gan": "rayseg.pipelines.al_s4gan.pipeline",
}
"""Name on the command line -> module."""
COMMANDS = {
    "predict": "rayseg.pipelines.predict",
    "remap": "rayseg.pipelines.remap",
    "correct": "rayseg.pipelines.correct",
    "diff": "rayseg.pipelines.diff",
}
"""The pipelines of commands of their own: their runs can be retried, `rayseg run pipeline` does not list them."""


def pipeline_of(name: str) -> ModuleType:
    """The module of a pipeline.

    Raises:
        ConfigError: no pipeline has this name.
    """
    # A dict and not entry points: a typo then names the pipelines that exist.
    module = (PIPELINES | COMMANDS).get(name)
    if module is None:
        raise ConfigError(f"pipeline {name!r} is unknown, expected one of: {', '.join(PIPELINES)}")
    return importlib.import_module(module)
