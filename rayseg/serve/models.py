"""The served models: found by name, loaded at first use, with patches of several requests in one batch."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any, Protocol

import numpy as np

from rayseg.errors import ConfigError
from rayseg.geo.grid import slug
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.serve.uploads import Image
from rayseg.stages.predict import Predict, decide, lattice_of, patches_of
from rayseg.store import StorePath, upath
from rayseg.vision.blend import Blend

Prediction = tuple[np.ndarray, np.ndarray]
Classes = tuple[list[float], np.ndarray | None]
_BATCHES_AHEAD = 4  # batches of one image in flight: not all of its patches are in memory


class Backend(Protocol):
    """Runs models, in this process or in replicas on a cluster."""

    async def segment(self, name: str, image: Image) -> Prediction:
        """Classes (height, width) and scores (bands, height, width) of a model over an image, as `Predict` returns."""

    async def classify(self, name: str, image: Image, *, explain: bool) -> Classes:
        """Probability of each class of a classifier for the centre of an image, and its Grad-CAM++ if requested."""

    async def instances(self, name: str, image: Image, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Masks of a Segment Anything model; see `rayseg.serve.prompts.masks`."""

    async def labels(self, image: Image, options: dict[str, Any]) -> np.ndarray:
        """Labels (height, width) without a model; see `rayseg.serve.prompts.labels`."""


@dataclass(frozen=True)
class ModelIndex:
    """The served bundles, name -> (prefix, description)."""

    entries: dict[str, tuple[str, Bundle]]

    @classmethod
    def of(cls, prefixes: Sequence[StorePath]) -> "ModelIndex":
        """Every bundle at or below the prefixes.

        A name is the bundle's path below its prefix without `models`: `demo-segmenter` for
        `runs/demo/models/segmenter` below `runs`; a prefix that is a bundle keeps the bundle's own name.

        Raises:
            ModelError: a prefix does not exist.
            ConfigError: two bundles have the same name.
        """
        entries: dict[str, tuple[str, Bundle]] = {}
        for prefix in prefixes:
            for folder, described in bundle.find([prefix]):
                parts = upath(folder).path.removeprefix(upath(prefix).path).split("/")
                name = "-".join(slug(part) for part in parts if part and part != "models") or described.name
                if entries.get(name, (folder,))[0] != folder:
                    raise ConfigError(
                        f"models {entries[name][0]} and {folder} are both named {name}; serve only one of them"
                    )
                # The same bundle can lie below two prefixes.
                entries[name] = (folder, described)
        return cls(entries)

    def sam(self) -> str | None:
        """Name of the first Segment Anything model."""
        return next(
            (name for name, (_, described) in self.entries.items() if described.architecture.factory == "sam"), None
        )


async def segmented(
    described: Bundle,
    image: Image,
    prepare: Callable[[np.ndarray, np.ndarray], np.ndarray],
    forward: Callable[[list[np.ndarray]], Awaitable[Sequence[np.ndarray]]],
    *,
    ahead: int,
) -> Prediction:
    """Classes and scores of an image, with the lattice, blending and decision of `Predict`.

    Args:
        described: the model's bundle.
        image: in the bundle's bands.
        prepare: `Predict.input`.
        forward: inputs -> probabilities, in order; it batches the patches of concurrent images.
        ahead: patches in flight at once.
    """

    def padded() -> tuple[np.ndarray, np.ndarray]:
        rows, cols = image.tile.window.slices(reach)
        image_CHW = np.zeros((len(image.image_CHW), reach.height, reach.width), image.image_CHW.dtype)
        valid_HW = np.zeros((reach.height, reach.width), bool)
        image_CHW[:, rows, cols], valid_HW[rows, cols] = image.image_CHW, image.valid_HW
        return image_CHW, valid_HW

    # 1. the image on the window that its patches reach, invalid around it
    lattice = lattice_of(described, image.tile)
    reach = lattice.reach(image.tile.window)
    image_CHW, valid_HW = await asyncio.to_thread(padded)
    # 2. its patches, a few batches at a time
    patches = patches_of(described, image.tile, valid_HW, reach)
    blend = Blend(image.tile.window, described.outputs, lattice)
    # Only some patches are copied at a time: all of them take several times the image's memory.
    for start in range(0, len(patches), ahead):
        part = patches[start : start + ahead]
        places = [patch.slices(reach) for patch in part]
        inputs = [await asyncio.to_thread(prepare, image_CHW[:, *at], valid_HW[at]) for at in places]
        for patch, probabilities in zip(part, await forward(inputs), strict=True):
            await asyncio.to_thread(blend.add, patch, probabilities)
    # 3. classes and scores
    return await asyncio.to_thread(lambda: decide(blend.result(), image.valid_HW, described.threshold))


class LocalBackend:
    """A `Backend` in this process with a pool of threads: one thread for tests and `rayseg view`.

    The deployment of models extends it: it batches the patches of several requests and unloads models.

    Args:
        index: the served models.
        batch: patches per batch.
        exact: return the bits of `Predict`, for which a GPU pads its batches.
        threads: maximum concurrent calls of models.
    """

    def __init__(self, index: ModelIndex, *, batch: int = 8, exact: bool = True, threads: int = 1) -> None:
        self.index, self.batch, self.exact = index, batch, exact
        self._pool = ThreadPoolExecutor(threads)
        self._loaded: dict[str, Any] = {}

    async def model(self, name: str) -> Any:  # noqa: ANN401 - a model of any kind
        """A loaded model: a `SamProposer`, a `Classify`, or a `Predict` whose threads and batch size are set up."""
        if name not in self._loaded:
            self._loaded[name] = await self.run(self.load, name)
        return self._loaded[name]

    async def forward(self, name: str, inputs: list[np.ndarray]) -> Sequence[np.ndarray]:
        """Probabilities of each input."""
        probabilities: list[np.ndarray] = await self.run(self.probabilities, await self.model(name), inputs)
        return probabilities

    async def segment(self, name: str, image: Image) -> Prediction:
        """See `Backend`."""
        model = await self.model(name)
        return await segmented(
            model.bundle, image, model.input, partial(self.forward, name), ahead=_BATCHES_AHEAD * self.batch
        )

    async def classify(self, name: str, image: Image, *, explain: bool) -> Classes:
        """See `Backend`."""
        model = await self.model(name)
        classes: Classes = await self.run(partial(model.single, image.image_CHW, image.valid_HW, explain=explain))
        return classes

    async def instances(self, name: str, image: Image, options: dict[str, Any]) -> list[dict[str, Any]]:
        """See `Backend`."""
        model = await self.model(name)
        from rayseg.serve import prompts  # PyTorch is loaded with the model

        masks: list[dict[str, Any]] = await self.run(prompts.masks, model, image, options)
        return masks

    async def labels(self, image: Image, options: dict[str, Any]) -> np.ndarray:
        """See `Backend`."""
        prompts = await self.run(import_module, "rayseg.serve.prompts")  # PyTorch takes seconds to import
        labels_HW: np.ndarray = await self.run(prompts.labels, image, options)
        return labels_HW

    def load(self, name: str) -> Any:  # noqa: ANN401 - a model of any kind
        """Load a model; takes seconds."""
        prefix, described = self.index.entries[name]
        if described.architecture.factory == "sam":
            from rayseg.serve import prompts

            return prompts.load(prefix)
        if described.task == "classification":
            from rayseg.stages.classify import Classify

            return Classify(prefix)
        predict = Predict(prefix)
        # At once, while nobody waits: the check computes three patches.
        predict.help_one()
        return predict

    def probabilities(self, model: Predict, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Probabilities of each input, of any images, with the bits of `rayseg predict`."""
        size = model.batch
        assert size is not None
        batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        results = (model.forward(batch, exact=self.exact).cpu().numpy() for batch in batches)
        return list(chain.from_iterable(results))

    async def run(self, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        """Call a function in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
