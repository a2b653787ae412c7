"""Models that a pipeline trains: bundle metadata, checks before training, storage."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayseg.config import ray_address
from rayseg.engine import cluster
from rayseg.errors import ConfigError
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bf16, Bundle, Provenance, Scaling
from rayseg.models.encoders import encoder_name, read_state
from rayseg.models.input_statistics import MOST, InputStatistics
from rayseg.models.pretrained_weights import NO_FILES, input_range, packaged_state
from rayseg.store import StorePath, put, upath
from rayseg.train import probe

if TYPE_CHECKING:
    from torch import nn

    from rayseg.engine.run import Step
    from rayseg.train.batches import Chips
    from rayseg.train.classifier import ClassifierConfig
    from rayseg.train.s4gan import S4ganConfig
    from rayseg.train.segmenter import SegmenterConfig
    from rayseg.train.session import Setup
    from rayseg.train.supervised import SupervisedConfig

    Segmenter = SegmenterConfig | SupervisedConfig | S4ganConfig

Pair = tuple[NDArray[Any], NDArray[np.uint8] | None]
RGB = ("red", "green", "blue")
SAMPLES = 8
"""Validation images on which a kept model is computed in bfloat16, too: some 3 Mpx, seconds."""
Classes = tuple[tuple[int, str, tuple[int, int, int]], ...]
"""(value, name, colour) of every class."""


def classifier_bundle(
    settings: "ClassifierConfig",
    classes: Classes,
    *,
    name: str,
    scaling: Scaling,
    parents: tuple[str, ...] = (),
) -> Bundle:
    """Bundle metadata of a classifier of RGB chips of `settings.size` px.

    Args:
        settings: the network and its training.
        classes: the classes of the labels.
        name: of the model.
        scaling: from uint8 values to the network's input.
        parents: URIs of the training data.
    """
    return Bundle(
        name=name,
        task="classification",
        architecture=Architecture(
            factory=settings.factory, options=settings.options(classes=len(classes), channels=len(RGB))
        ),
        classes=classes,
        bands=RGB,
        dtype="uint8",
        scaling=scaling,
        patch=settings.size,
        stride=settings.size,
        provenance=Provenance(config=settings.model_dump(mode="json"), parents=parents),
    )


def segmenter_bundle(
    settings: "Segmenter",
    classes: Classes,
    *,
    scaling: Scaling,
    patch: int,
    stride: int,
    bands: tuple[str, ...] = RGB,
    dtype: str = "uint8",
    options: Mapping[str, str | int | float] | None = None,
) -> Bundle:
    """Bundle metadata of the model `segmenter`.

    Args:
        settings: the network and its training.
        classes: the classes of the map.
        scaling: from the imagery's values to the network's input.
        patch: side in px of the model's input window.
        stride: distance between these windows in px.
        bands: of the imagery, in order.
        dtype: of the imagery.
        options: of the architecture; by default those of `settings`.

    Raises:
        ConfigError: the values of the classes are not 0, 1, 2, ...
    """
    # The network's outputs are the classes in order, so values and positions must agree.
    values = [value for value, _, _ in classes]
    if values != list(range(len(classes))):
        raise ConfigError(f"class values are {values}, expected 0, 1, 2, ... for a segmenter; renumber them")
    options = dict(options or settings.options(classes=len(classes), channels=len(bands)))
    if settings.factory == "pixel-head":
        options["lab"] = int(is_rgb8(bands, dtype, scaling))
    return Bundle(
        name="segmenter",
        task="segmentation",
        architecture=Architecture(factory=settings.factory, options=options),
        classes=classes,
        bands=bands,
        dtype=dtype,
        scaling=scaling,
        patch=patch,
        stride=stride,
        provenance=Provenance(config=settings.model_dump(mode="json")),
    )


def is_rgb8(bands: tuple[str, ...], dtype: str, scaling: Scaling) -> bool:
    """Whether a model sees red, green and blue of 0..255, whose colour has a meaning of its own."""
    return bands == RGB and dtype == "uint8" and (scaling.scale, scaling.offset) == (1.0, 0.0)


def expect_windows(bands: tuple[str, ...], scaling: Scaling, *, patch: int, stride: int, reduce: int) -> None:
    """Check that a segmenter can use the windows and the scaling.

    Args:
        bands: of the network's input.
        scaling: of the band values.
        patch: side of a window in px.
        stride: distance between windows in px.
        reduce: factor by which the input is downsampled before the network.

    Raises:
        ValueError: the values do not fit together; pydantic validators report it.
    """
    if stride > patch:
        raise ValueError(f"stride {stride} is above patch {patch}: windows would leave gaps; lower it")
    # Encoders downsample by 32 (five stages of stride 2).
    if patch % (32 * reduce):
        raise ValueError(f"patch {patch} is not a multiple of 32 x segmenter.reduce {reduce}; change one of them")
    if len(bands) != len(scaling.mean):
        raise ValueError(f"{len(bands)} bands but scaling of {len(scaling.mean)}; give one for each")


def expect_weights(settings: "ClassifierConfig | Segmenter", scaling: Scaling | None = None) -> None:
    """Check that the encoder exists, that its weights can be read, and that the scaling is of their kind.

    Args:
        settings: the network and its training.
        scaling: from uint8 values to the network's input; None if the values have another data type.

    Raises:
        ConfigError: the encoder is unknown, or pretrained weights expect another input.
        ModelError: the weights are missing, damaged, or not a table of tensors.
    """
    # Read now and not when training begins, which can be hours after the run was started.
    encoder_name(settings.encoder)
    if settings.start:
        if getattr(settings, "network", "decoder") in {"linear", "frozen"}:
            raise ConfigError(
                "start is set, but a head on a frozen encoder is always fitted from scratch; leave start out"
            )
        bundle.description(settings.start)
        return
    # Weights of the three kinds: of a package, of a library by name, or of a file.
    if settings.weights == "packaged":
        packaged_state(settings.encoder)
    elif settings.weights not in NO_FILES:
        read_state(settings.weights)
    if scaling and settings.weights in {"imagenet", "packaged"}:
        _expect_input(settings.encoder, scaling)


def _expect_input(encoder: str, scaling: Scaling) -> None:
    """Refuse a mean more than a deviation away, or a deviation that differs by more than a factor of 1.6."""
    # A data set's own mean and deviation, as in the paper of gpc, stay within these bounds.
    wanted = input_scaling(encoder)
    if len(scaling.mean) != len(wanted.mean):
        return
    mean, std, per = np.array(wanted.mean), np.array(wanted.std), np.array(scaling.std) / scaling.scale
    away = np.abs((np.array(scaling.mean) - scaling.offset) / scaling.scale - mean)
    if (away > std).any() or (np.maximum(per / std, std / per) > 1.6).any():
        raise ConfigError(
            f"scaling has mean {list(scaling.mean)} and std {list(scaling.std)}, but the pretrained weights of "
            f"{encoder} expect mean {list(wanted.mean)} and std {list(wanted.std)} of values 0..255; "
            "leave scaling out or set it so"
        )


def input_scaling(encoder: str) -> Scaling:
    """The scaling from uint8 values to the input that pretrained weights of an encoder expect."""
    mean, std = input_range(encoder)
    return Scaling(mean=mean, std=std)


def scaling_of(validated: Mapping[str, Any]) -> Scaling:
    """Default of a pipeline's `scaling`: what the encoder of its `segmenter` expects, else that of ImageNet."""
    segmenter = validated.get("segmenter")
    return input_scaling(segmenter.encoder if segmenter else "")


def training_setup(
    step: "Step",
    *,
    workers: int,
    expect: Callable[..., object],
    described: Bundle | None = None,
    prefix: StorePath | None = None,
) -> "Setup":
    """Where the network of a step trains; `<prefix>/setup.json` records it for the report.

    Without a number of workers the command's own process trains, unless the run has joined a cluster: there each GPU
    has a worker of Ray Train, as far as the batch can be shared, and a cluster without GPUs has one worker.

    Args:
        step: which trains.
        workers: processes of Ray Train; 0 chooses them.
        expect: `expect(workers=N)` raises ConfigError if N workers cannot train together.
        described: the model, for `<prefix>/model.json`, by which weights are measured before the training has ended.
        prefix: of the training's files; by default the step's.

    Raises:
        ConfigError: this machine has fewer GPUs, or without any fewer CPUs, than workers.
    """
    import ray
    import torch

    from rayseg.train.session import Setup

    prefix = prefix or step.prefix
    if not workers and step.engine.kind == "ray" and ray_address(step.engine.address) != "local":
        cluster.connect(step.engine.address)
        counts = range(int(ray.cluster_resources().get("GPU", 0)), 1, -1)
        workers = next((count for count in counts if _can(expect, count)), 1)
    if workers:
        cluster.connect(step.engine.address)
        known = ray.cluster_resources()
        kind = "GPU" if known.get("GPU") else "CPU"
        # Ray would wait for more: a cluster may get them from its autoscaler, this machine does not.
        if known[kind] < workers and ray_address(step.engine.address) == "local":
            raise ConfigError(
                f"workers is {workers}, but this machine has {known[kind]:g} {kind}, expected one for each worker; "
                "lower workers"
            )
        setup = Setup(prefix, workers, use_gpu=kind == "GPU")
    else:
        setup = Setup(prefix, use_gpu=torch.cuda.is_available())
    if described:
        put(upath(prefix) / "model.json", described.model_dump_json().encode())
    put(upath(prefix) / "setup.json", json.dumps({"workers": workers, "gpu": setup.use_gpu}).encode())
    return setup


def _can(expect: Callable[..., object], workers: int) -> bool:
    try:
        expect(workers=workers)
    except ConfigError:
        return False
    return True


def statistics_of(chips: "Chips") -> InputStatistics | None:
    """Statistics of the centres of chips that a model learns from, spread over all of them."""
    places = np.linspace(0, len(chips) - 1, min(len(chips), MOST)).round().astype(int)
    return InputStatistics.of(chips.read(place).transpose(2, 0, 1) for place in probe.batches(places, len(places)))


def keep_model(step: "Step", described: Bundle, model: "nn.Module", *, samples: Iterable[Pair] = ()) -> str:
    """Save a trained model as `models/<its name>` below the run; return its prefix.

    Args:
        step: of the run.
        described: the bundle.
        model: the trained model.
        samples: validation images (bands, height, width) as they are stored, and their classes (height, width), 255
            where not labelled, or None. Of a decoder, the bundle records what bfloat16 changes in them.
    """
    if described.architecture.factory == "segmenter":  # heads on features and rules of colour gain nothing
        described = described.model_copy(update={"bf16": _bf16(described, model.cpu().eval(), samples)})
    # Outside the step's folder, where serve and people look for models.
    prefix = str(upath(step.root) / "models" / described.name)
    bundle.save(prefix, described, model)
    return prefix


def _bf16(described: Bundle, model: "nn.Module", samples: Iterable[Pair]) -> Bf16 | None:
    from rayseg.models.precision import compared  # torch

    unit = 32 * int(described.architecture.options.get("reduce", 1))

    def inputs() -> Iterator[Pair]:
        for image_CHW, classes_HW in islice(samples, SAMPLES):
            height, width = (min(described.patch, side // unit * unit) for side in image_CHW.shape[1:])
            if height and width:
                part = slice(0, height), slice(0, width)
                yield described.normalize(image_CHW[:, *part]), None if classes_HW is None else classes_HW[part]

    return compared(model, inputs(), threshold=described.threshold, classes=len(described.classes))
