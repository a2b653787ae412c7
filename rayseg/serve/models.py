"""The served models: found by name, loaded at first use, with patches of several requests in one batch."""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from itertools import chain
from multiprocessing import get_context
from time import monotonic
from typing import Any, Protocol

import numpy as np
from botocore.exceptions import BotoCoreError

from rayseg.errors import ConfigError, ModelError
from rayseg.geo.grid import slug
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.serve.problems import Unavailable, busy
from rayseg.serve.uploads import Image
from rayseg.stages.predict import Predict, decide, lattice_of, patches_of
from rayseg.store import StorePath, upath
from rayseg.vision.blend import Blend

Prediction = tuple[np.ndarray, np.ndarray]
Classes = tuple[list[float], np.ndarray | None]
RECHECK = 5.0
"""Seconds between two searches for models."""
_log = logging.getLogger("rayseg.serve")
_BATCHES_AHEAD = 4  # batches of one image in flight: not all of its patches are in memory


@dataclass(frozen=True)
class Served:
    """A served bundle.

    Attributes:
        name: by which requests name it.
        prefix: where it lies.
        bundle: its description.
    """

    name: str
    prefix: str
    bundle: Bundle

    @cached_property
    def key(self) -> str:
        """Identifies the bundle with its content: another one under the same prefix has another key."""
        return f"{self.prefix}@{_digest(self.bundle)}"


def _digest(described: Bundle) -> str:
    return hashlib.sha256(described.model_dump_json().encode()).hexdigest()[:16]


class Backend(Protocol):
    """Runs models, in this process or in replicas on a cluster."""

    async def segment(self, model: Served, image: Image) -> Prediction:
        """Classes (height, width) and scores (bands, height, width) of a model over an image, as `Predict` returns."""

    async def classify(self, model: Served, image: Image, *, explain: bool) -> Classes:
        """Probability of each class of a classifier for the centre of an image, and its Grad-CAM++ if requested."""

    async def instances(self, model: Served, image: Image, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Masks of a Segment Anything model; see `rayseg.serve.prompts.masks`."""

    async def labels(self, image: Image, options: dict[str, Any]) -> np.ndarray:
        """Labels (height, width) without a model; see `rayseg.serve.prompts.labels`."""

    async def follow(self, *arguments: object) -> np.ndarray | None:
        """Classes (256, 256) of a web tile that follows clicks; see `rayseg.serve.follow.web_tile`."""

    async def ready(self) -> bool:
        """Whether models can be asked now, and those to be loaded at the start are loaded."""


class ModelIndex:
    """The served bundles, looked for again every few seconds: added, replaced and removed ones follow.

    Args:
        prefixes: every bundle at or below them is served.

    Raises:
        ModelError: a prefix does not exist.
        ConfigError: two bundles have the same name.
    """

    def __init__(self, prefixes: Sequence[StorePath] = ()) -> None:
        self.prefixes = tuple(prefixes)
        self.entries = served_below(self.prefixes)
        # One thread: a store that does not answer must not occupy those of other work.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._looked, self._took = monotonic(), 0.0

    async def all(self) -> dict[str, Served]:
        """Name -> bundle, as of a few seconds ago."""
        if self._due(RECHECK):
            await asyncio.get_running_loop().run_in_executor(self._thread, self._look, RECHECK)
        return self.entries

    async def one(self, name: str) -> Served | None:
        """The bundle of a name; an unknown name is looked for at once, as it can be new."""
        wait = RECHECK if name in self.entries else 1.0
        if self._due(wait):
            looked = asyncio.get_running_loop().run_in_executor(self._thread, self._look, wait)
            if name not in self.entries:
                await looked
        return self.entries.get(name)

    def sam(self) -> Served | None:
        """The first Segment Anything model."""
        return next((model for model in self.entries.values() if model.bundle.architecture.factory == "sam"), None)

    def _due(self, wait: float) -> bool:
        # A large or distant prefix takes long to search, so it is searched less often.
        return bool(self.prefixes) and monotonic() - self._looked >= max(wait, 20 * self._took)

    def _look(self, wait: float) -> None:
        if not self._due(wait):
            return  # another request has just looked
        began = monotonic()
        try:
            present = [prefix for prefix in self.prefixes if upath(prefix).is_dir()]
            self.entries = served_below(present)
        except (ConfigError, ModelError, OSError, BotoCoreError) as error:  # the ones of before are served on
            _log.warning("the models cannot be listed", extra={"facts": {"error": " ".join(str(error).split())}})
        self._looked, self._took = monotonic(), monotonic() - began


def served_below(prefixes: Sequence[StorePath]) -> dict[str, Served]:
    """Every bundle at or below some prefixes, by name.

    A name is the bundle's path below its prefix without `models`: `demo-segmenter` for
    `runs/demo/models/segmenter` below `runs`; a prefix that is a bundle keeps the bundle's own name.

    Raises:
        ModelError: a prefix does not exist.
        ConfigError: two bundles have the same name.
    """
    entries: dict[str, Served] = {}
    for prefix in prefixes:
        for folder, described in bundle.find([prefix]):
            parts = upath(folder).path.removeprefix(upath(prefix).path).split("/")
            name = "-".join(slug(part) for part in parts if part and part != "models") or described.name
            # The same bundle can lie below two prefixes.
            if name in entries and entries[name].prefix != folder:
                raise ConfigError(
                    f"models {entries[name].prefix} and {folder} are both named {name}; serve only one of them"
                )
            entries[name] = Served(name, folder, described)
    return entries


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


class Batches:
    """Joins the inputs of concurrent requests for one model: those that arrive while others are computed form a batch.

    Args:
        compute: inputs -> results, in order.
        size: maximum inputs per batch.
        at_once: maximum batches that are computed at once.
        wait: seconds that a batch waits for further inputs.
    """

    def __init__(
        self,
        compute: Callable[[list[np.ndarray]], Awaitable[Sequence[np.ndarray]]],
        *,
        size: int,
        at_once: int,
        wait: float = 0.0,
    ) -> None:
        self._compute, self._size, self._wait = compute, size, wait
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self._idle = at_once
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop holds tasks by weak references only

    async def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The result of each input."""
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[np.ndarray]] = [loop.create_future() for _ in inputs]
        self._waiting.extend(zip(inputs, results, strict=True))
        if self._idle:
            self._idle -= 1
            self._tasks.add(task := loop.create_task(self._run()))
            task.add_done_callback(self._tasks.discard)
        return await asyncio.gather(*results)

    async def _run(self) -> None:
        """Compute batches until no input waits."""
        try:
            while self._waiting:
                if self._wait and len(self._waiting) < self._size:
                    await asyncio.sleep(self._wait)
                taken = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
                # Requests whose client has left are cancelled, and so are their results.
                batch = [(given, result) for given, result in taken if not result.done()]
                if batch:
                    await self._answer(batch)
        finally:
            self._idle += 1

    async def _answer(self, batch: list[tuple[np.ndarray, "asyncio.Future[np.ndarray]"]]) -> None:
        computing = asyncio.ensure_future(self._compute([given for given, _ in batch]))  # noqa: RUF006 - awaited at once
        await asyncio.wait([computing])
        error = computing.exception()
        outputs: Sequence[np.ndarray] = () if error else computing.result()
        if not error and len(outputs) != len(batch):  # a request without a result would wait for ever
            error = ModelError(f"the model has {len(outputs)} results for {len(batch)} inputs; its code is at fault")
        for at, (_, result) in enumerate(batch):
            if result.done():
                continue
            if error:
                result.set_exception(error)
            else:
                result.set_result(outputs[at])


class LocalBackend:
    """A `Backend` in this process with a pool of threads: one thread for tests and `rayseg view`.

    The replicas of the models extend it; they unload models.

    Args:
        batch: patches per batch, over all requests for one model.
        exact: return the bits of `Predict`, for which a GPU pads its batches.
        threads: maximum concurrent calls of models.
        wait: seconds that a batch waits for further patches.
    """

    def __init__(self, *, batch: int = 8, exact: bool = True, threads: int = 1, wait: float = 0.0) -> None:
        self.batch, self.exact = batch, exact
        self._pool = ThreadPoolExecutor(threads)
        self._loaded: dict[str, Any] = {}
        self._batches_of = partial(Batches, size=batch, at_once=threads, wait=wait)
        self._batches: dict[str, Batches] = {}

    async def model(self, key: str) -> Any:  # noqa: ANN401 - a model of any kind
        """A loaded model: a `SamProposer`, a `Classify`, or a `Predict` whose threads and batch size are set up."""
        if key not in self._loaded:
            self._loaded[key] = await self.run(self.load, key)
        return self._loaded[key]

    async def forward(self, key: str, inputs: list[np.ndarray]) -> Sequence[np.ndarray]:
        """Probabilities of each input, in batches with those of other requests for the model."""
        if key not in self._batches:
            self._batches[key] = self._batches_of(partial(self._forward, key))
        return await self._batches[key](inputs)

    async def _forward(self, key: str, inputs: list[np.ndarray]) -> Sequence[np.ndarray]:
        probabilities: list[np.ndarray] = await self.run(self.probabilities, await self.model(key), inputs)
        return probabilities

    async def segment(self, model: Served, image: Image) -> Prediction:
        """See `Backend`."""
        loaded = await self.model(model.key)
        return await segmented(
            loaded.bundle, image, loaded.input, partial(self.forward, model.key), ahead=_BATCHES_AHEAD * self.batch
        )

    async def classify(self, model: Served, image: Image, *, explain: bool) -> Classes:
        """See `Backend`."""
        loaded = await self.model(model.key)
        classes: Classes = await self.run(partial(loaded.single, image.image_CHW, image.valid_HW, explain=explain))
        return classes

    async def instances(self, model: Served, image: Image, options: dict[str, Any]) -> list[dict[str, Any]]:
        """See `Backend`."""
        loaded = await self.model(model.key)
        from rayseg.serve import prompts  # PyTorch is loaded with the model

        masks: list[dict[str, Any]] = await self.run(prompts.masks, loaded, image, options)
        return masks

    async def ready(self) -> bool:
        """See `Backend`."""
        return True

    async def labels(self, image: Image, options: dict[str, Any]) -> np.ndarray:
        """See `Backend`."""
        prompts = await self.run(import_module, "rayseg.serve.prompts")  # PyTorch takes seconds to import
        labels_HW: np.ndarray = await self.run(prompts.labels, image, options)
        return labels_HW

    async def follow(self, *arguments: object) -> np.ndarray | None:
        """See `Backend`."""
        classes_HW: np.ndarray | None = await self.run(followed, *arguments)
        return classes_HW

    def load(self, key: str) -> Any:  # noqa: ANN401 - a model of any kind
        """Load the model of a `Served.key`; takes seconds.

        Raises:
            Unavailable: its files are gone or damaged, or those of another model.
        """
        prefix, _, digest = key.rpartition("@")
        try:
            return _loaded(prefix, digest)
        except (ModelError, OSError, BotoCoreError) as error:
            # Clients learn no path of the server; the log names it.
            _log.error("a model cannot be loaded", extra={"facts": {"error": " ".join(str(error).split())}})
            raise Unavailable(
                "the model cannot be loaded: its files are missing, damaged or being replaced; retry later, and if "
                "this lasts, the administrator finds the reason in the server's log"
            ) from None

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


class ChildBackend(LocalBackend):
    """The `Backend` of `rayseg view`: a map follows clicks in a process of its own, which starts with the first click.

    PyTorch takes seconds to import and to compute, in which this process answers others.
    """

    def __init__(self) -> None:
        super().__init__()
        # Not a fork: threads of this process may hold locks.
        self._child = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    async def follow(self, *arguments: object) -> np.ndarray | None:
        """See `Backend`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._child, followed, *arguments)
        except BrokenProcessPool as error:
            self._child = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            raise busy("the process that follows clicks died; retry") from error


def followed(*arguments: Any) -> np.ndarray | None:  # noqa: ANN401
    """`rayseg.serve.follow.web_tile`, imported where it runs."""
    classes_HW: np.ndarray | None = import_module("rayseg.serve.follow").web_tile(*arguments)
    return classes_HW


def _loaded(prefix: str, digest: str) -> Any:  # noqa: ANN401 - a model of any kind
    described = bundle.description(prefix)
    if _digest(described) != digest:
        raise ModelError(f"{prefix} holds another model since this one was asked for; retry the request")
    if described.architecture.factory == "sam":
        from rayseg.serve import prompts

        return prompts.load(prefix)
    if described.task == "classification":
        from rayseg.stages.classify import Classify

        classify = Classify(prefix)
        assert classify.bundle == described  # loads it
        return classify
    predict = Predict(prefix)
    # At once, while nobody waits: the check computes three patches.
    predict.help_one()
    return predict
