"""The models that are served: found by name, loaded when asked for, and asked for patches of several requests."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rayseg.errors import ConfigError
from rayseg.geo.grid import Window, slug
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.serve.uploads import Image
from rayseg.stages.predict import Predict, decide, lattice_of, patches_of
from rayseg.store import StorePath, upath
from rayseg.vision.blend import Blend

Answer = tuple[np.ndarray, np.ndarray]
_AHEAD = 4  # batches of one image under way at once: its patches are not all in memory


class Backend(Protocol):
    """What answers for models, in this process or in replicas of a cluster."""

    async def segment(self, name: str, image: Image) -> Answer:
        """Classes (height, width) and scores (bands, height, width) of a model over an image, as `Predict` gives."""

    async def instances(self, name: str, image: Image, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """Masks of a Segment Anything model; see `rayseg.serve.prompts.found`."""

    async def labels(self, image: Image, asked: dict[str, Any]) -> np.ndarray:
        """Labels (height, width) without a model."""


@dataclass(frozen=True)
class Shelf:
    """The bundles that are served, name -> (prefix, description)."""

    entries: dict[str, tuple[str, Bundle]]

    @classmethod
    def of(cls, prefixes: Sequence[StorePath]) -> "Shelf":
        """Every bundle at or below the prefixes.

        A name is where the bundle lies below its prefix, without `models`: `demo-segmenter` of
        `runs/demo/models/segmenter` below `runs`; of a prefix that is a bundle it is the bundle's own.

        Raises:
            ModelError: a prefix is not there.
            ConfigError: two bundles have one name.
        """
        entries: dict[str, tuple[str, Bundle]] = {}
        for prefix in prefixes:
            for folder, described in bundle.find([prefix]):
                name = _name(prefix, folder) or described.name
                if entries.get(name, (folder,))[0] != folder:
                    raise ConfigError(f"models {entries[name][0]} and {folder} would both be {name}; serve one of them")
                entries[name] = (folder, described)
        return cls(entries)

    def of_sam(self) -> str | None:
        """Name of the first Segment Anything model."""
        return next((name for name, (_, found) in self.entries.items() if found.architecture.factory == "sam"), None)


def _name(prefix: StorePath, folder: str) -> str:
    parts = upath(folder).path.removeprefix(upath(prefix).path).split("/")
    return "-".join(slug(part) for part in parts if part and part != "models")


# -- one model ---------------------------------------------------------------------------------------------------------


class Segmenter:
    """A bundle's model that predicts patches of any number of images together, in the pixels of `rayseg predict`.

    Args:
        prefix: of the bundle.
        exact: whether the bits are to be those of `Predict`; a GPU then fills up its batches.
    """

    def __init__(self, prefix: str, *, exact: bool = True) -> None:
        self.predict = Predict(prefix)
        self.predict.help_one()
        self.bundle, self._exact = self.predict.bundle, exact

    def probabilities(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Probabilities of each of some inputs."""
        most = self.predict.batch
        assert most is not None
        parts = [inputs[start : start + most] for start in range(0, len(inputs), most)]
        return [one for part in parts for one in self.predict.forward(part, exact=self._exact).cpu().numpy()]


async def segmented(
    described: Bundle,
    image: Image,
    see: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ask: Callable[[list[np.ndarray]], Awaitable[Sequence[np.ndarray]]],
    *,
    ahead: int,
) -> Answer:
    """Classes and scores of an image, by the lattice, the blending and the decision of `Predict`.

    Args:
        described: the model's bundle.
        image: in the bundle's bands.
        see: `Predict.input`.
        ask: inputs -> probabilities, in order; where patches of several images meet.
        ahead: patches that are asked for at once.
    """
    reach, image_CHW, valid_HW = await asyncio.to_thread(_with_halo, described, image)
    patches = patches_of(described, image.tile, valid_HW, reach)
    blend = Blend(image.tile.window, described.outputs, lattice_of(described, image.tile))
    for start in range(0, len(patches), ahead):
        part = patches[start : start + ahead]
        places = [patch.slices(reach) for patch in part]
        inputs = [await asyncio.to_thread(see, image_CHW[:, *at], valid_HW[at]) for at in places]
        for patch, found in zip(part, await ask(inputs), strict=True):
            await asyncio.to_thread(blend.add, patch, found)
    return await asyncio.to_thread(lambda: decide(blend.result(), image.valid_HW, described.threshold))


def _with_halo(described: Bundle, image: Image) -> tuple[Window, np.ndarray, np.ndarray]:
    """The image on the window that its patches reach, not valid around it."""
    window = image.tile.window
    reach = lattice_of(described, image.tile).reach(window)
    rows, cols = window.slices(reach)
    image_CHW = np.zeros((len(image.image_CHW), reach.height, reach.width), image.image_CHW.dtype)
    valid_HW = np.zeros((reach.height, reach.width), bool)
    image_CHW[:, rows, cols], valid_HW[rows, cols] = image.image_CHW, image.valid_HW
    return reach, image_CHW, valid_HW


# -- in this process ---------------------------------------------------------------------------------------------------


class Here:
    """A `Backend` in this process: one thing after the other, models kept once loaded; for tests and for a look."""

    def __init__(self, shelf: Shelf, *, batch: int = 8) -> None:
        self._shelf, self._batch = shelf, batch
        self._pool = ThreadPoolExecutor(1)
        self._loaded: dict[str, Any] = {}

    async def segment(self, name: str, image: Image) -> Answer:
        """See `Backend`."""
        model = await self._in_turn(self._model, name, Segmenter)

        async def ask(inputs: list[np.ndarray]) -> list[np.ndarray]:
            found: list[np.ndarray] = await self._in_turn(model.probabilities, inputs)
            return found

        return await segmented(model.bundle, image, model.predict.input, ask, ahead=_AHEAD * self._batch)

    async def instances(self, name: str, image: Image, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """See `Backend`."""
        from rayseg.serve import prompts

        model = await self._in_turn(self._model, name, prompts.load)
        found: list[dict[str, Any]] = await self._in_turn(prompts.found, model, image, asked)
        return found

    async def labels(self, image: Image, asked: dict[str, Any]) -> np.ndarray:
        """See `Backend`."""
        from rayseg.serve import prompts

        found: np.ndarray = await self._in_turn(prompts.labels, image, asked)
        return found

    def _model(self, name: str, load: Callable[[str], Any]) -> Any:  # noqa: ANN401 - a model of any kind
        if name not in self._loaded:
            self._loaded[name] = load(self._shelf.entries[name][0])
        return self._loaded[name]

    async def _in_turn(self, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
