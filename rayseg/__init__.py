"""Map a land-cover class over a whole region from little or no labelled data.

    >>> import rayseg
    >>> run = rayseg.run("gpc", "demo", config="gpc/smoke", out="runs/demo")  # doctest: +SKIP
    >>> rayseg.open("runs/demo").classes  # doctest: +SKIP
    >>> rayseg.load_model("runs/demo/models/segmenter").predict("image.tif")  # doctest: +SKIP

Everything is imported when it is first used: `import rayseg` takes milliseconds, `rayseg.open` neither PyTorch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayseg.api.model import Model, Prediction
    from rayseg.api.model import Model as load_model
    from rayseg.api.results import Run
    from rayseg.api.results import Run as open  # noqa: A004 - rayseg.open, as rasterio.open
    from rayseg.api.running import correct, diff, refresh, remap, run

__version__ = "0.1.0"
__all__ = [
    "Model",
    "Prediction",
    "Run",
    "__version__",
    "correct",
    "diff",
    "load_model",
    "open",
    "refresh",
    "remap",
    "run",
]

_PLACES = {
    "Model": ("rayseg.api.model", "Model"),
    "Prediction": ("rayseg.api.model", "Prediction"),
    "Run": ("rayseg.api.results", "Run"),
    "diff": ("rayseg.api.running", "diff"),
    "load_model": ("rayseg.api.model", "Model"),
    "open": ("rayseg.api.results", "Run"),
    "correct": ("rayseg.api.running", "correct"),
    "refresh": ("rayseg.api.running", "refresh"),
    "remap": ("rayseg.api.running", "remap"),
    "run": ("rayseg.api.running", "run"),
}
"""Public name -> (module, name in it)."""


def __getattr__(name: str) -> Any:  # noqa: ANN401 - functions and classes
    """A public name, imported when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module 'rayseg' has no attribute {name!r}")
    module, inner = _PLACES[name]
    return getattr(import_module(module), inner)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
