"""Train a network on one scene alone, without labels (Chen et al. 2022).

    patches of all tiles, in random order --> step towards the labels voted in superpixels --> checkpoint per epoch
    (in the first epoch labels are clusters of colours, then the network's own)
    mean features of the labels --> groups of labels, the largest first --> bundle

`kmeans` and `isodata` give a network of one layer, which takes the same way.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial, reduce
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from sklearn.cluster import KMeans
from torch import Tensor, nn

from rayseg.config import Config, added
from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Tile, Window
from rayseg.io import rasters, segments
from rayseg.models import bundle, unsupervised
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.cpu import threads
from rayseg.models.encoders import recalibrate_batchnorm
from rayseg.models.unsupervised import RECIPES, Precision, Recipe
from rayseg.stages.rows import SceneRow, TileRow
from rayseg.store import upath
from rayseg.train.batches import made_ahead
from rayseg.train.pictures import Picture, visible
from rayseg.train.session import is_shown, load_checkpoint, save_checkpoint, tensorboard
from rayseg.vision.clusters import grouped, isodata
from rayseg.vision.color import label_table
from rayseg.vision.fill import mirrored

Patch = tuple[Tensor, Tensor | None, Tensor | None]
Raw = tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.uint32]]
PASSES, STEPS = 4, 128
"""Fewest passes and fewest steps of a training whose number of epochs is not given."""
ATTEMPTS = 3
"""Seeds that are tried before a network with a single label is reported."""
MOST_MEASURED = 32
"""Most patches from which features and sizes of the labels are computed."""
MOST_SAMPLES = 200_000
"""Most pixels that k-means and ISODATA cluster."""


class SceneConfig(Config):
    """The network of a scene and its training."""

    network: Literal["segments", "deepnet", "v1", "v2", "kmeans", "isodata"] = "segments"
    """segments clusters superpixels by colour and texture, without a network; deepnet is the paper's network, v1 and v2
    are made for single images; kmeans and isodata cluster pixels."""
    labels: Annotated[int, Field(gt=1, le=254)] = 32
    """Labels of the network; clusters of k-means and ISODATA."""
    epochs: Annotated[int, Field(gt=0)] | None = None
    """Passes over all patches; null is 4, and more until a network has taken 128 steps."""
    patch: Annotated[int, Field(gt=0, multiple_of=4)] = 512
    """Side of a patch in px."""
    stride: Annotated[int, Field(gt=0)] = 448
    """Distance between patches in px."""
    reduce: Annotated[int, Field(gt=0)] = 2
    """Side in px of the squares that are averaged to one input pixel of the network; the paper's is 1."""
    recalibrate: bool = True
    """Compute batch norm statistics again, over the whole scene, after the training; the paper does not."""
    patches: Annotated[int, Field(gt=0)] | None = 256
    """Patches per epoch, drawn for each; None uses all."""
    seed: int = 2021
    """Of the initial weights and the order of patches."""
    start: Annotated[int, Field(gt=1)] | None = 16
    """Clusters of colours (k-means; at most `labels`) that the first epoch learns; None starts from the untrained
    network's own labels, as the paper does."""
    merge_to: Annotated[int, Field(gt=1)] | None = 8
    """Groups into which labels are merged by the distance of their features; None keeps all labels."""
    precision: Precision = "float32"
    """bfloat16 is faster on machines that support it."""
    keep_every: Annotated[int, Field(ge=0)] = added(default=0)
    """Networks: epochs between models that are kept as models/SCENE-epoch-N, for `rayseg predict`; 0 keeps none."""
    memory: Annotated[int, Field(ge=0)] = 1 << 30
    """Bytes of patches kept in memory; other patches are read again in every epoch."""
    stall_seconds: Annotated[float, Field(gt=0)] = 86400.0
    """Seconds of training after which a scene is skipped and recorded as failed."""

    @model_validator(mode="after")
    def _whole_squares(self) -> "SceneConfig":
        if self.patch % (4 * self.reduce) or self.stride > self.patch:
            raise ValueError(
                f"patch {self.patch} must be a multiple of 4 x reduce ({4 * self.reduce}), stride at most the patch"
            )
        return self

    @property
    def clusters(self) -> bool:
        """Whether superpixels are clustered, without a network."""
        return self.network == "segments"

    def passes(self, patches: int) -> int:
        """Passes of a training on this many patches: a small scene needs as many steps as a large one."""
        return self.epochs or max(PASSES, -(-STEPS // min(patches, self.patches or patches)))

    def steps(self, patches: int) -> int:
        """Steps of all passes."""
        return self.passes(patches) * min(patches, self.patches or patches)

    @property
    def votes(self) -> bool:
        """Whether the training needs superpixels."""
        return self.network in RECIPES and RECIPES[self.network].votes

    @property
    def recipe(self) -> Recipe:
        """Architecture and optimizer of the network."""
        return dataclasses.replace(RECIPES[self.network], classes=self.labels)


class Patches:
    """The patches of a scene: windows of one size, `stride` apart, the last ones shifted back inside the scene.

    Args:
        tiles: the scene's tiles with their imagery.
        files: tile id -> file of its superpixels; empty if they are not needed.
        bands: names, in order.
        scaling: from values to the network's input.
        config: sizes and memory.
    """

    def __init__(
        self,
        tiles: Sequence[TileRow],
        files: dict[str, str],
        bands: Sequence[str],
        scaling: Scaling,
        config: SceneConfig,
    ) -> None:
        self.tiles = {row.tile.id: row for row in tiles}
        self.files, self.bands, self.scaling = files, tuple(bands), scaling
        self.memory, self.reduce = config.memory, config.reduce
        self.windows = list(_windows([row.tile for row in tiles], config))
        self._kept: dict[int, Raw | None] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, number: int) -> Patch | None:
        """(image_1CHW float32, superpixel of every pixel, positions of pixels with data or None for all).

        None if no pixel has data; pixels without data are filled by mirroring. All are reduced: a square of pixels
        is one pixel, with the superpixel and data of its first pixel.
        """
        # 1. from memory or files; patches without data are remembered as well
        raw = self._kept[number] if number in self._kept else self._read(*self.windows[number])
        if number not in self._kept:
            self._bytes += sum(array.nbytes for array in raw or ())
            if not raw or self._bytes <= self.memory:
                self._kept[number] = raw
        if raw is None:
            return None
        image_CHW, seen_HW, segments_HW = raw
        # 2. normalise and reduce
        normal_CHW = self.scaling.normalize(mirrored(image_CHW, seen_HW))
        first = np.s_[:: self.reduce, :: self.reduce]
        seen_HW, segments_HW = seen_HW[first], segments_HW[first]
        # 3. number the patch's superpixels from 0, as the vote counts in a table
        _, compact = np.unique(segments_HW, return_inverse=True)
        image = unsupervised.reduced(torch.from_numpy(normal_CHW)[None], self.reduce)
        image = image.contiguous(memory_format=torch.channels_last)
        seen = None if seen_HW.all() else torch.from_numpy(np.flatnonzero(seen_HW))
        return image, torch.from_numpy(compact.ravel()) if self.files else None, seen

    def _read(self, tile_id: str, window: Window) -> Raw | None:
        row = self.tiles[tile_id]
        image_CHW, seen_HW = rasters.read(row.sources, row.tile.grid, window, bands=self.bands)
        files = [(self.tiles[name].tile, path) for name, path in self.files.items()]
        near = [(other.window, path) for other, path in files if other.grid == row.tile.grid]
        segments_HW = segments.read_segments(near, window)
        seen_HW = seen_HW & (segments_HW > 0) if self.files else seen_HW
        return (image_CHW, seen_HW, segments_HW) if seen_HW[:: self.reduce, :: self.reduce].any() else None


def _windows(tiles: Sequence[Tile], config: SceneConfig) -> Iterator[tuple[str, Window]]:
    """(tile that contains the middle, window) of every patch, grid by grid."""
    for grid in dict.fromkeys(tile.grid for tile in tiles):
        members = [tile for tile in tiles if tile.grid == grid]
        extent = reduce(Window.union, (tile.window for tile in members))
        for row in _origins(extent.row, extent.height, config):
            for col in _origins(extent.col, extent.width, config):
                unit = 4 * config.reduce
                size = [max(2, -(-min(config.patch, side) // unit)) * unit for side in (extent.width, extent.height)]
                window = Window(col, row, *size)
                middle = Window(col + min(size[0], extent.width) // 2, row + min(size[1], extent.height) // 2, 1, 1)
                yield from ((tile.id, window) for tile in members if not tile.window.intersect(middle).empty)


def _origins(start: int, length: int, config: SceneConfig) -> list[int]:
    last = max(0, length - config.patch)
    return sorted({*(start + at for at in range(0, last, config.stride)), start + last})


def steps_of(tiles: Sequence[Tile], config: SceneConfig) -> int:
    """Steps of a training on these tiles: an upper limit, as patches without data are known only once they are read."""
    return config.steps(sum(1 for _ in _windows(tiles, config)))


class TrainScene:
    """`tiles, scaling -> facts`: a network trained on a scene's tiles, saved as the bundle `<models>/<scene>`.

    A network with a single label is trained again from another seed, twice; then the scene is recorded as failed.

    Args:
        config: the network and its training.
        prefix: of checkpoints.
        models: prefix of bundles.
        segments: prefix of the superpixels, `<segments>/<tile id>.tif`; None if they are not needed.
        bands: names, in order.
        dtype: of the imagery.
    """

    def __init__(
        self,
        config: SceneConfig,
        *,
        prefix: str,
        models: str,
        segments: str | None,
        bands: Sequence[str],
        dtype: str,
    ) -> None:
        self.config, self.prefix, self.models, self.segments = config, prefix, models, segments
        self.bands, self.dtype = tuple(bands), dtype

    @cached_property
    def device(self) -> torch.device:
        """The GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, rows: list[SceneRow]) -> list[Settled]:
        """Train on each scene; with a fixed number of threads, so that both engines give the same networks."""
        with threads():
            return [self._train(row) for row in rows]

    def _train(self, scene: SceneRow) -> Settled:
        scaling, ids = Scaling.model_validate_json(scene.scaling), [row.tile.id for row in scene.tiles]
        files = {tile: f"{self.segments}/{tile}.tif" for tile in ids} if self.segments else {}
        patches = Patches(scene.tiles, files, self.bands, scaling, self.config)
        if next(_some(patches, most=1), None) is None:
            raise DataError(
                "no patch of the scene has a pixel with data, expected at least one; check the nodata value"
            )
        effort = {"effort": self.config.steps(len(patches))}
        seeds = [self.config.seed + attempt for attempt in range(ATTEMPTS)]
        # A single label is a collapsed training, which depends on the initial weights.
        for seed in seeds:
            history: list[dict[str, float]] = []
            if self.config.network in RECIPES:
                prefix = f"{self.prefix}/{scene.id}/{seed}"
                keep = partial(self._keep_epoch, scene.id, patches, scaling)
                net, history = fit(patches, self.config, prefix=prefix, seed=seed, device=self.device, keep=keep)
            else:
                net = nearest(patches, self.config.labels, seed=seed, by_isodata=self.config.network == "isodata")
            net = net.to(self.device)
            features_KD, sizes_K = measured(net, patches, self.device)
            groups = grouped(features_KD, sizes_K, most=self.config.merge_to)
            if (labels := int(groups.max()) + 1) > 1:
                prefix = self._keep(scene.id, net, groups, scaling)
                return Settled(facts=effort | {"bundle": prefix, "labels": labels, "seed": seed, "history": history})
        reason = f"the network kept one label from each of the seeds {', '.join(map(str, seeds))}"
        reason += ": choose another network, more labels or fewer epochs"
        return Settled("failed", reason, effort)

    def _keep_epoch(self, scene: str, patches: Patches, scaling: Scaling, net: nn.Module, epochs: int) -> None:
        """Save a copy of the network in training, with its labels merged as those of the trained one."""
        copied = copy.deepcopy(net)
        if self.config.recalibrate:
            with torch.no_grad():
                recalibrate_batchnorm(copied, (image.to(self.device) for image, _, _ in _some(patches)))
        groups = grouped(*measured(copied, patches, self.device), most=self.config.merge_to)
        if int(groups.max()):  # a single label is not a map
            self._keep(f"{scene}-epoch-{epochs}", copied, groups, scaling)

    def _keep(self, scene: str, net: nn.Module, groups: NDArray[np.intp], scaling: Scaling) -> str:
        # The bundle merges the labels into groups itself, so prediction and serving see the groups alone.
        labels, classes = len(groups), int(groups.max()) + 1
        options: dict[str, str | int | float] = {
            "network": self.config.network if self.config.network in RECIPES else "nearest",
            "channels": len(self.bands),
            "labels": labels,
            "classes": classes,
            "groups": ",".join(map(str, groups)),
            "reduce": self.config.reduce,
        }
        described = Bundle(
            name=f"labels-{scene}",
            task="segmentation",
            architecture=Architecture(factory="unsupervised", options=options),
            classes=label_table(classes).classes[:classes],
            bands=self.bands,
            dtype=self.dtype,
            scaling=scaling,
            patch=self.config.patch,
            stride=self.config.stride,
            provenance=Provenance(config=self.config.model_dump(mode="json")),
        )
        labeller = unsupervised.Labeller(net.cpu(), groups.tolist(), reduce=self.config.reduce)
        bundle.save(prefix := str(upath(self.models) / scene), described, labeller)
        return prefix


def fit(
    patches: Patches,
    config: SceneConfig,
    *,
    prefix: str,
    seed: int,
    device: torch.device,
    keep: Callable[[nn.Module, int], None] | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """(network on the device, loss and labels of every epoch), trained on all patches, one patch per step.

    It resumes from `<prefix>/checkpoint.pt`, written after every epoch, and ends early when all targets of an epoch
    have the same label: nothing remains to learn. `keep` saves the network after every `keep_every` epochs.
    """
    recipe = config.recipe
    # Keys that do not change the weights are left out, so that changing them resumes the training.
    settings = f"{config.model_dump_json(exclude={'seed', 'merge_to', 'memory', 'stall_seconds', 'keep_every'})} {seed}"
    net = unsupervised.initial(recipe, bands=len(patches.bands), seed=seed).to(device)
    optimizer = recipe.optimizer(net.parameters())
    state = load_checkpoint(prefix, settings) or {"history": []}
    if state["history"]:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    history: list[dict[str, float]] = list(state["history"])
    teacher = None
    if config.start and not history:
        teacher = nearest(patches, min(config.start, config.labels), seed=seed).to(device)
    epochs = config.passes(len(patches))
    with tensorboard(prefix) as write, unsupervised.quick_and_reproducible(device, config.precision):
        while len(history) < epochs and not (history and history[-1]["labels"] == 1):
            last: list[Tensor] = []
            row = epoch(len(history), net, optimizer, patches, config, seed=seed, teacher=teacher, last=last)
            history.append(row)
            teacher = None
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            save_checkpoint(prefix, settings, state)
            if keep and config.keep_every and len(history) % config.keep_every == 0:
                keep(net, len(history))
            number, rate = len(history) - 1, float(optimizer.param_groups[0]["lr"])
            measures = {"loss": row["loss"], "labels": row["labels"], "learning_rate/0": rate}
            write(number, measures, _pictures(net, last) if is_shown(number, epochs) else {})
        if config.recalibrate:
            # After a short training the running averages still depend on their initial values.
            with torch.no_grad():
                recalibrate_batchnorm(net, (image.to(device) for image, _, _ in _some(patches)))
    return net, history


@torch.no_grad()
def _pictures(net: nn.Module, images: Sequence[Tensor]) -> dict[str, Picture]:
    """The labels of patches next to their first bands, for TensorBoard."""
    net.eval()
    device, shown = next(net.parameters()).device, {}
    for number, image in enumerate(images):
        labels_HW = net(image.to(device)).argmax(1)[0].cpu().numpy()
        colors = np.array(label_table(int(labels_HW.max()) + 1).colors, np.uint8)
        shown[f"patch-{number}"] = np.concatenate([visible(image[0].numpy()), colors[labels_HW]], axis=1)
    return shown


def epoch(
    number: int,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    patches: Patches,
    config: SceneConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    last: list[Tensor] | None = None,
) -> dict[str, float]:
    """One pass over the patches with data in an order drawn from (seed, number); returns loss and labels.

    Targets are the labels of `teacher`, or the network's own, voted in superpixels. The last patch is added to `last`:
    reading one more for pictures would cost as much as a step.
    """
    # A function of seed and number: a resumed training sees the patches it would have seen.
    order = np.random.default_rng((seed, number)).permutation(len(patches)).tolist()
    device = next(net.parameters()).device
    counts = torch.zeros(config.labels, dtype=torch.int64, device=device)
    losses = []
    net.train()
    # The next patch is read while the network takes a step.
    read = made_ahead(patches.read, order, threads=1, count=1)
    for image, superpixels, seen in _with_data(read, most=config.patches):
        segments, known = (part if part is None else part.to(device) for part in (superpixels, seen))
        targets, loss = unsupervised.step(
            net,
            optimizer,
            image.to(device),
            segments,
            recipe=config.recipe,
            precision=config.precision,
            seen=known,
            teacher=teacher,
        )
        counts += torch.bincount(targets[targets >= 0], minlength=config.labels)
        losses.append(loss)
    if last is not None:
        last.append(image)
    mean = float(torch.stack(losses).mean())
    return {"epoch": float(number + 1), "loss": mean, "labels": float(counts.count_nonzero())}


def _with_data(read: Iterable[Patch | None], *, most: int | None) -> Iterator[Patch]:
    """The first patches with data, at most `most`."""
    return islice((patch for patch in read if patch is not None), most)


def _some(patches: Patches, *, most: int = MOST_MEASURED) -> Iterator[Patch]:
    """Patches with data: evenly spread ones, and randomly drawn ones in place of those without data."""
    count = len(patches)
    spread = sorted({round(at) for at in np.linspace(0, count - 1, min(MOST_MEASURED, count))})
    others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(count), spread))
    return _with_data(map(patches.read, [*spread, *others.tolist()]), most=most)


@torch.inference_mode()
def measured(net: nn.Module, patches: Patches, device: torch.device) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(mean feature (K, D), number of pixels (K,)) of every label of the network, over some patches.

    Features are the input of its last convolution; for a network of one layer, the values themselves.
    """
    net.eval()
    # The last two layers of a recipe are the 1 x 1 convolution to labels and its batch norm.
    body, head = (net[:-2], net[-2:]) if isinstance(net, nn.Sequential) else (nn.Identity(), net)
    sums = sizes = np.zeros(0)
    for image, _, seen in _some(patches):
        features = body(image.to(device))
        labels = head(features).argmax(1).flatten()
        classes = head(features[..., :1, :1]).shape[1]
        flat = features.permute(0, 2, 3, 1).flatten(0, 2).float()
        if seen is not None:
            labels, flat = labels[seen.to(device)], flat[seen.to(device)]
        total = torch.zeros(classes, flat.shape[1], device=device).index_add_(0, labels, flat).double().cpu().numpy()
        counts = torch.bincount(labels, minlength=classes).cpu().numpy()
        sums, sizes = (total, counts) if not len(sums) else (sums + total, sizes + counts)
    return sums / np.maximum(sizes, 1)[:, None], sizes.astype(np.int64)


def nearest(patches: Patches, clusters: int, *, seed: int, by_isodata: bool = False) -> nn.Module:
    """The centres of k-means or ISODATA in pixels of some patches, as a network of one layer."""
    rng, parts = np.random.default_rng(seed), []
    for image, _, seen in _some(patches):
        pixels_NC = image[0].flatten(1).T.numpy()
        pixels_NC = pixels_NC if seen is None else pixels_NC[seen.numpy()]
        # As many pixels of each patch, so that memory does not grow with the scene.
        parts.append(pixels_NC[rng.permutation(len(pixels_NC))[: MOST_SAMPLES // min(MOST_MEASURED, len(patches))]])
    samples_NC = np.concatenate(parts)
    if by_isodata:
        return unsupervised.nearest(isodata(samples_NC, clusters=clusters, seed=seed))
    clusters = min(clusters, len(np.unique(samples_NC, axis=0)))
    centres_KC = KMeans(clusters, n_init=1, random_state=seed).fit(samples_NC).cluster_centers_
    return unsupervised.nearest(centres_KC)
