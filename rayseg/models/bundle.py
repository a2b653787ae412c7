"""Bundles: a trained model with all that prediction and serving need, and no code that runs on loading.

<prefix>/model.safetensors   the weights
<prefix>/bundle.json         what this module's `Bundle` holds
<prefix>/item.json           a STAC item with the MLM extension; written last, so its presence means a whole bundle
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module, metadata
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import numpy as np
import pystac
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from safetensors import SafetensorError, deserialize

import rayseg
from rayseg.config import Config, added
from rayseg.errors import ModelError
from rayseg.models.input_statistics import InputStatistics
from rayseg.store import StorePath, put, upath

if TYPE_CHECKING:
    from torch import Tensor, nn

MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.5.2/schema.json"
FILE_SCHEMA = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
PROCESSING_SCHEMA = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
MLM_TASKS = {
    "classification": "scene-classification",
    "segmentation": "semantic-segmentation",
    "instances": "instance-segmentation",
}


_log = logging.getLogger(__name__)
FORMAT = 1
FACTORIES = {
    "appearance": ("rayseg.models.appearance", "build_appearance"),
    "classifier": ("rayseg.models.classifier", "build_classifier"),
    "corrected": ("rayseg.models.correction", "build_corrected"),
    "over-imagenet": ("rayseg.models.classifier", "build_over_imagenet"),
    "pixel-head": ("rayseg.models.pixel_head", "build_pixel_head"),
    "plots": ("rayseg.models.plot_classifier", "build_plot_classifier"),
    "refined": ("rayseg.models.crf", "build_refined"),
    "sam": ("rayseg.models.sam_bundle", "build_sam"),
    "segmenter": ("rayseg.models.segmenter", "build_segmenter"),
    "segments": ("rayseg.models.segment_labels", "build_segments"),
    "unsupervised": ("rayseg.models.unsupervised", "build_unsupervised"),
}

Precision = Literal["auto", "fp32", "bf16"]
ClassRow = tuple[int, str, tuple[int, int, int]]


def _finite(values: Any) -> Any:  # noqa: ANN401 - pydantic passes any input
    """The values without NaN and infinity, which JSON does not have."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if not isinstance(value, float) or isfinite(value)}


Metrics = Annotated[dict[str, float], BeforeValidator(_finite)]


class Scaling(Config):
    """How values become the model's input: x = (value * scale + offset - mean) / std, per band."""

    one_value = True

    scale: float = 1.0
    """From stored values to units, above 0."""
    offset: float = 0.0
    """Added after the scale."""
    mean: tuple[float, ...]
    """One per band, in units of value * scale + offset."""
    std: tuple[float, ...]
    """One per band, above 0."""

    @model_validator(mode="after")
    def _positive(self) -> "Scaling":
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means but {len(self.std)} stds, expected one of each per band")
        if not self.mean:
            raise ValueError("mean and std are empty, expected one of each per band")
        if self.scale <= 0 or any(std <= 0 for std in self.std):
            raise ValueError(f"scale {self.scale:g} and std {list(self.std)} must be above 0")
        return self

    @overload
    def normalize(self, image_CHW: NDArray[Any]) -> NDArray[np.float32]: ...
    @overload
    def normalize(self, image_CHW: "Tensor") -> "Tensor": ...
    def normalize(self, image_CHW: "NDArray[Any] | Tensor") -> "NDArray[np.float32] | Tensor":
        """The model's input, float32, from stored values: CHW or NCHW, bands in the model's order."""
        per_band = (self.mean, self.std)
        if isinstance(image_CHW, np.ndarray):
            mean_C11, std_C11 = (np.array(values, np.float32)[:, None, None] for values in per_band)
            scaled: NDArray[np.float32] = (image_CHW.astype(np.float32) * self.scale + self.offset - mean_C11) / std_C11
            return scaled
        import torch

        # On the image's device, as training normalises whole batches there.
        mean, std = (torch.tensor(values, device=image_CHW.device)[:, None, None] for values in per_band)
        return (image_CHW.float() * self.scale + self.offset - mean) / std


class Architecture(Config):
    """Which factory builds the network, and with which options."""

    factory: Literal[
        "appearance",
        "classifier",
        "corrected",
        "over-imagenet",
        "pixel-head",
        "plots",
        "refined",
        "sam",
        "segmenter",
        "segments",
        "unsupervised",
    ]
    options: dict[str, str | int | float]
    """Arguments of the factory, without the weights."""


class Bf16(Config):
    """What computing in bfloat16 changes in a model's map of validation images."""

    one_value = True

    changed: float
    """Share of the pixels whose class is another one."""
    lost: float
    """Mean IoU in float32 less that in bfloat16; 0 without masks."""

    @property
    def fits(self) -> bool:
        """Whether a map may be computed so: half a percent of the pixels, half a point of mean IoU."""
        return self.changed <= 0.005 and self.lost <= 0.005


class Provenance(Config):
    """Origin of a model."""

    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    software: str = f"rayseg {rayseg.__version__}"
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration of the training."""
    parents: tuple[str, ...] = ()
    """URIs of the items of its training data."""


MOST_SCALE = 1.5
"""Ratio of pixel sizes from which on a map is warned of: augmentation covers less."""


class Bundle(Config):
    """A trained model and the imagery that it accepts."""

    format: Literal[1] = 1
    name: str = Field(pattern="^[A-Za-z0-9\u0080-\U0010ffff][A-Za-z0-9._\u0080-\U0010ffff-]*$")
    task: Literal["classification", "segmentation", "instances"]
    architecture: Architecture
    classes: tuple[ClassRow, ...]
    """(value in the class raster, name, (red, green, blue)), in the order of the model's outputs."""
    in_masks: tuple[int, ...] = added(default=())
    """Values of the classes in the masks that the model learnt from, if they are others than those of its maps."""
    unlabelled: tuple[int, ...] = added(default=())
    """Values that mean "not labelled" in these masks, in addition to 255."""
    bands: tuple[str, ...] = Field(min_length=1)
    """Names of the bands in the model's order."""
    dtype: str
    """Data type of the imagery, as numpy names it."""
    scaling: Scaling
    units: tuple[tuple[float, float], ...] = ()
    """(scale, offset) that the training imagery stated for each of `bands`, if it did; its values are stored values."""
    patch: int = Field(gt=0)
    """Side of the model's input window in pixels."""
    stride: int = Field(gt=0)
    """Distance between neighbouring patches in pixels."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Probability above which a pixel is of the class, for models of one class."""
    level: Annotated[float | None, Field(ge=0, le=1)] = added(default=None)
    """Height of the ridges at which a watershed divides the map into plots, for models of boundaries."""
    metrics: Metrics = Field(default_factory=dict)
    """Of the training, without NaN and infinity, such as the IoU of an absent class."""
    metres: Annotated[float | None, Field(gt=0)] = added(default=None)
    """Pixel size on the ground of the images that the model learnt from; None if they had no georeference."""
    statistics: InputStatistics | None = added(default=None)
    """Of the training imagery; None for models of earlier versions and of other programs."""
    bf16: Bf16 | None = added(default=None)
    """What bfloat16 changes; None if it was not measured."""
    provenance: Provenance = Field(default_factory=Provenance)
    sha256: str = ""
    """Of `model.safetensors`; set by `save`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Bundle":
        counts = {len(self.bands), len(self.scaling.mean), len(self.scaling.std)}
        if len(counts) > 1:
            scaling = f"{len(self.scaling.mean)} means, {len(self.scaling.std)} stds"
            raise ValueError(f"{len(self.bands)} bands, {scaling}, expected as many of each")
        values = [value for value, _, _ in self.classes]
        if self.task == "segmentation" and values != list(range(len(values))):
            raise ValueError(f"class values are {values}, a segmenter's are 0, 1, 2, ... in the order of its outputs")
        # A larger stride would leave pixels between patches without a prediction.
        if self.stride > self.patch:
            raise ValueError(f"stride {self.stride} is above patch {self.patch}, expected at most the patch")
        return self

    @property
    def outputs(self) -> int:
        """Number of the model's logits per image or pixel; 1 for a class against the rest."""
        usual = {"appearance": 1, "corrected": 1, "refined": 1, "sam": 1, "segmenter": 1, "unsupervised": 32}
        return int(self.architecture.options.get("classes", usual.get(self.architecture.factory, 2)))

    def of(self, parents: Sequence[str], metrics: Metrics) -> "Bundle":
        """The bundle of a model that was trained on data at these URIs, with its measures."""
        provenance = self.provenance.model_copy(update={"parents": tuple(parents)})
        return self.model_copy(update={"provenance": provenance, "metrics": metrics})

    def scale_warning(self, metres: float | None) -> str:
        """What is wrong with imagery of this pixel size, in metres, for the model; "" if it is near, or unknown."""
        if not metres or not self.metres or max(metres, self.metres) / min(metres, self.metres) < MOST_SCALE:
            return ""
        return (
            f"the imagery has pixels of {metres:.3g} m, model {self.name} learnt from pixels of {self.metres:.3g} m: "
            "its map can be wrong; resample the imagery, or train on such imagery"
        )

    def normalize(self, image_CHW: NDArray[Any]) -> NDArray[np.float32]:
        """The model's input from stored values; see `Scaling.normalize`."""
        return self.scaling.normalize(image_CHW)

    def check_contract(
        self,
        bands: Sequence[str],
        dtype: str,
        *,
        units: Sequence[tuple[float, float]] = (),
        source: str = "the imagery",
    ) -> None:
        """Refuse imagery that this model does not accept.

        Args:
            bands: names of the imagery's bands, in any order; further bands are ignored.
            dtype: the imagery's data type, as numpy names it.
            units: (scale, offset) of each of `bands`, if known; a model of stored values accepts any.
            source: name of the imagery, for the message.

        Raises:
            ModelError: bands are missing, or the data type, scale or offset differ; both sides are named.
        """
        missing = [band for band in self.bands if band not in bands]
        if missing:
            raise ModelError(
                f"model {self.name} needs the bands {', '.join(self.bands)}, "
                f"{source} has {', '.join(bands) or 'none'}: {', '.join(missing)} missing; "
                "map names with --set 'map.bands={red: NAME, ...}' or use another model"
            )
        if dtype != self.dtype:
            raise ModelError(
                f"model {self.name} was trained on {self.dtype} values, {source} has {dtype}; "
                "convert the imagery to the model's units or use another model"
            )
        # Of stored values the scale is unknown: `expected` then has no band, and any unit fits.
        expected = self.band_units
        for band, unit in zip(bands, units, strict=False):
            own = expected.get(band, unit)
            if not np.allclose(unit, own, rtol=1e-6, atol=1e-12):
                raise ModelError(
                    f"model {self.name} expects values of stored x {own[0]:g} + {own[1]:g}, {source} declares {band} "
                    f"as stored x {unit[0]:g} + {unit[1]:g}; convert the imagery or use another model"
                )

    @property
    def band_units(self) -> dict[str, tuple[float, float]]:
        """Band -> (scale, offset) of the stored values that the model expects; empty if it is not known."""
        if (own := (self.scaling.scale, self.scaling.offset)) != (1.0, 0.0):
            return dict.fromkeys(self.bands, own)
        return dict(zip(self.bands, self.units, strict=False))


def item(bundle: Bundle, *, size: int, parameters: int) -> pystac.Item:
    """The STAC item of a model, with the extensions MLM, file and processing.

    Args:
        bundle: as saved.
        size: of the weights file in bytes.
        parameters: number of the model's weights.
    """
    # 1. what the model does, in MLM's words
    provenance, options = bundle.provenance, bundle.architecture.options
    described = pystac.Item(
        id=bundle.name,
        geometry=None,
        bbox=None,
        datetime=provenance.created,
        properties={
            "description": f"{bundle.task} into {', '.join(name for _, name, _ in bundle.classes)}",
            "processing:software": dict([provenance.software.rsplit(" ", 1)]),
            "bands": [{"name": band, "data_type": bundle.dtype} for band in bundle.bands],
            "mlm:name": bundle.name,
            "mlm:architecture": str(options.get("architecture", bundle.architecture.factory)),
            "mlm:tasks": [MLM_TASKS[bundle.task]],
            "mlm:framework": "pytorch",
            "mlm:framework_version": metadata.version("torch").partition("+")[0],
            "mlm:total_parameters": parameters,
            "mlm:accelerator_constrained": False,
            "mlm:hyperparameters": dict(options),
            "mlm:input": [_mlm_input(bundle)],
            "mlm:output": [_mlm_output(bundle)],
        },
        stac_extensions=[MLM_SCHEMA, FILE_SCHEMA, PROCESSING_SCHEMA],
    )
    # 2. its files and parents
    weights = pystac.Asset(
        "./model.safetensors",
        title=f"weights of {bundle.name}",
        media_type="application/octet-stream",
        roles=["mlm:model", "mlm:weights", "data"],
        extra_fields={
            "mlm:artifact_type": "safetensors.torch.save",
            "file:size": size,
            "file:checksum": f"1220{bundle.sha256}",  # a multihash: 12 = SHA-256, 20 = its 32 bytes
        },
    )
    described.add_asset("model", weights)
    described.add_asset("bundle", pystac.Asset("./bundle.json", media_type="application/json", roles=["metadata"]))
    for parent in provenance.parents:
        described.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, parent, media_type="application/json"))
    return described


def _mlm_input(bundle: Bundle) -> dict[str, Any]:
    """The input: the bundle's scaling is one z-score per band of the stored values."""
    scaling = bundle.scaling
    z_scores = [
        # MLM has no scale and offset before the z-score, so both are part of it.
        {"type": "z-score", "mean": (mean - scaling.offset) / scaling.scale, "stddev": std / scaling.scale}
        for mean, std in zip(scaling.mean, scaling.std, strict=True)
    ]
    return {
        "name": "image",
        "bands": list(bundle.bands),
        "input": {
            "shape": [-1, len(bundle.bands), bundle.patch, bundle.patch],
            "dim_order": ["batch", "bands", "height", "width"],
            "data_type": "float32",
        },
        "value_scaling": z_scores,
    }


def _mlm_output(bundle: Bundle) -> dict[str, Any]:
    spatial = bundle.task == "segmentation"
    return {
        "name": "logits",
        "tasks": [MLM_TASKS[bundle.task]],
        "result": {
            "shape": [-1, bundle.outputs, *([bundle.patch, bundle.patch] if spatial else [])],
            "dim_order": ["batch", "classes", *(["height", "width"] if spatial else [])],
            "data_type": "float32",
        },
        "classification:classes": [
            {"value": value, "name": name, "color_hint": bytes(color).hex().upper()}
            for value, name, color in bundle.classes
        ],
    }


def save(prefix: StorePath, bundle: Bundle, model: "nn.Module") -> Bundle:
    """Write the three files of a bundle under `prefix`; return the bundle with its checksum."""
    from safetensors.torch import save as write_tensors

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    weights = write_tensors(state)
    whole = bundle.model_copy(update={"sha256": hashlib.sha256(weights).hexdigest()})
    folder = upath(prefix)
    described = item(whole, size=len(weights), parameters=sum(weight.numel() for weight in model.parameters()))
    # The item is written last: `description` accepts a bundle only with all three files.
    put(folder / "model.safetensors", weights)
    put(folder / "bundle.json", whole.model_dump_json(indent=2).encode())
    put(folder / "item.json", json.dumps(described.to_dict()).encode())
    return whole


def description(prefix: StorePath) -> Bundle:
    """The description of the model under `prefix`, without its weights.

    Raises:
        ModelError: there is no bundle, it is incomplete, or another version of rayseg wrote it.
    """
    folder = upath(prefix)
    # The item is written last: without it a bundle is partial.
    present = {name for name in ("model.safetensors", "bundle.json", "item.json") if (folder / name).exists()}
    if not present:
        raise ModelError(f"{folder} holds no model bundle (no bundle.json); give the folder of a training")
    missing = {"model.safetensors", "bundle.json", "item.json"} - present
    if missing:
        raise ModelError(f"bundle {folder} is incomplete, {', '.join(sorted(missing))} missing; run its training again")
    try:
        values = json.loads((folder / "bundle.json").read_bytes())
    except ValueError:
        raise ModelError(f"{folder / 'bundle.json'} is not JSON, expected a model bundle; copy it again") from None
    # The format is checked first: values of another version may be invalid here.
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise ModelError(
            f"{folder / 'bundle.json'} has format {version!r}, this rayseg {rayseg.__version__} reads format {FORMAT}; "
            "use the version that wrote it, or train again"
        )
    try:
        return Bundle.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all values"
        raise ModelError(f"{folder / 'bundle.json'}: {where}: {first['msg']}; copy the bundle again") from None


UNFINISHED = ("warm-up", "network")
"""Models of gpc that its segmenter was made from."""


def find(prefixes: Iterable[StorePath]) -> Iterator[tuple[str, Bundle]]:
    """(prefix, bundle) of every whole bundle at or below some prefixes, sorted; unreadable ones are skipped.

    The unfinished models of a run (`UNFINISHED`) are left out next to its segmenter, unless a prefix names one.

    Raises:
        ModelError: one of the prefixes does not exist.
    """
    folders: set[str] = set()
    for prefix in map(upath, prefixes):
        if not prefix.is_dir():
            raise ModelError(f"{prefix} is not a folder; name the folder of a run")
        below = {path.parent for path in prefix.glob("**/bundle.json")}
        final = {path.parent for path in below if path.name == "segmenter"}
        folders |= {
            str(path) for path in below if path == prefix or path.name not in UNFINISHED or path.parent not in final
        }
    for folder in sorted(folders):
        with suppress(ModelError):
            yield folder, description(folder)


def whole(prefix: StorePath) -> tuple[Bundle, bytes]:
    """The bundle under `prefix` and the bytes of its weights.

    Raises:
        ModelError: see `description`; or the weights are damaged or belong to another bundle.
    """
    # A wrong checksum means damage, or the weights of another bundle: the message states which.
    bundle, path = description(prefix), upath(prefix) / "model.safetensors"
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() == bundle.sha256:
        return bundle, weights
    try:
        deserialize(weights)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ModelError(f"weights {path} ({len(weights)} bytes) are damaged: {error}; copy the bundle again") from None
    raise ModelError(f"weights {path} are not those of bundle.json (sha256 differs); copy the bundle again")


def build(prefix: StorePath) -> tuple[Bundle, "nn.Module"]:
    """The bundle under `prefix` and its model, on the CPU and in evaluation mode.

    Raises:
        ModelError: see `whole`; or the weights do not fit the architecture, or are not finite.
    """
    from safetensors.torch import load as read_tensors

    bundle, weights = whole(prefix)
    try:
        model, tensors = _untrained(bundle), read_tensors(weights)
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"bundle {upath(prefix)} does not fit its architecture: {reason}; train again") from None
    # A training that diverged leaves NaN, which would make every pixel of a map one class without an error.
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ModelError(
            f"weights of {upath(prefix)} have NaN or infinity in {wrong[0]} and {len(wrong) - 1} other tensors, "
            "expected finite numbers; train again with a lower learning rate, or import the original weights"
        )
    return bundle, model.eval()


def take_over(net: "nn.Module", prefix: StorePath) -> None:
    """Load the weights of a bundle into a network; layers of another shape keep theirs, with a warning.

    Raises:
        ModelError: see `build`; or the bundle is of another network: its encoder does not fit.
    """
    described, model = build(prefix)
    given, wanted = model.state_dict(), net.state_dict()
    fitting = {key: tensor for key, tensor in given.items() if key in wanted and wanted[key].shape == tensor.shape}
    other = [key for key in wanted if key not in fitting]
    # Heads may differ, as they depend on the classes; without its encoder nothing useful is taken over.
    if wrong := [key for key in other if "encoder." in key]:
        raise ModelError(
            f"model {described.name} under {upath(prefix)} does not fit: {wrong[0]} is missing or of another shape; "
            "start from a bundle of the same encoder and architecture"
        )
    if other:
        _log.warning(
            "%s: %d of %d tensors are taken over, not %s", upath(prefix), len(fitting), len(wanted), ", ".join(other)
        )
    net.load_state_dict(fitting, strict=False)


def blank(bundle: Bundle) -> "nn.Module":
    """The model of the bundle with all weights 0: as slow and as large as the trained one."""
    model = _untrained(bundle)
    for weight in model.parameters():
        weight.data.zero_()
    return model.eval()


def _untrained(bundle: Bundle) -> "nn.Module":
    module, factory = FACTORIES[bundle.architecture.factory]
    model: nn.Module = getattr(import_module(module), factory)(**bundle.architecture.options, weights="none")
    return model
