"""Weights that another code trained, as bundles: `rayseg models import`."""

import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from rayseg.config import Bands, Config, load
from rayseg.errors import ConfigError
from rayseg.io.class_tables import Classes
from rayseg.models import bundle, published_weights
from rayseg.models.bundle import Bundle, Scaling
from rayseg.models.encoders import read_checkpoint
from rayseg.models.pretrained_weights import IMAGENET
from rayseg.models.published_weights import Renames
from rayseg.steps import models
from rayseg.steps.plots import CLASSES as PLOT_CLASSES
from rayseg.steps.plots import SCALING as PLOT_SCALING
from rayseg.store import StorePath
from rayseg.train.classifier import ClassifierConfig
from rayseg.train.supervised import SupervisedConfig
from rayseg.vision.color import hex_of

GPC_SCALING = {"mean": [98.3519, 96.9567, 95.5713], "std": [52.7343, 45.8798, 44.3465]}
PHOTOS = {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}
YES, NO = {"value": 0, "name": "gpc", "color": "#009E73"}, {"value": 1, "name": "nongpc", "color": "#000000"}
NETTING = [{"value": 0, "name": "background", "color": "#000000"}, {"value": 1, "name": "gpc", "color": "#009E73"}]
PLOTS = [{"value": value, "name": name, "color": hex_of(color)} for value, name, color in PLOT_CLASSES]
KINDS: dict[str, dict[str, Any]] = {
    "gpc-classifier": {
        "classifier": {"encoder": "regnety_040", "size": 512},
        "classes": {"classes": [YES, NO]},
        "scaling": GPC_SCALING,
    },
    "gpc-segmenter": {
        "segmenter": {"architecture": "unet", "encoder": "regnety_040"},
        "classes": {"classes": NETTING},
        "scaling": GPC_SCALING,
        "one": True,
    },
    "landcover": {"segmenter": {"architecture": "deeplab", "encoder": "resnet50"}, "classes": "deepglobe"},
    "al-classifier": {
        "classifier": {"network": "over-imagenet", "encoder": "resnet101", "size": 256, "positive": None},
        "classes": "deepglobe",
    },
    "s4gan": {
        "segmenter": {"architecture": "deeplabv2", "encoder": "resnet101"},
        "classes": "ucm",
        "scaling": {"mean": [122.67891434, 116.66876762, 104.00698793], "std": [1.0, 1.0, 1.0]},
    },
    "plots": {
        "classifier": {"network": "plots", "encoder": "resnet50", "size": 224},
        "classes": {"classes": PLOTS},
        "scaling": PLOT_SCALING.model_dump(),
    },
    "segmenter": {"segmenter": {"architecture": "unet", "encoder": "resnet34"}},
    "classifier": {"classifier": {"encoder": "resnet50"}},
}
"""Kind -> its settings; the last two are for state dicts of segmentation_models_pytorch, timm and torchvision."""
RENAMES: dict[str, Renames] = {
    "landcover": published_weights.LANDCOVER,
    "plots": published_weights.PLOTS,
    "s4gan": published_weights.S4GAN,
}
REMARKS = {
    "s4gan": "the published code feeds red, green, blue of UC Merced, but blue, green, red of DeepGlobe: for a model "
    "of DeepGlobe give --set classes=deepglobe6 --set bands='[blue, green, red]' --set "
    "'scaling={mean: [104.00698793, 116.66876762, 122.67891434], std: [1, 1, 1]}'",
    "plots": "hue and richness are computed from the image in 0..1 here, in the published code from its normalised "
    "values: measure the model with rayseg evaluate before use",
}


class ImportConfig(Config):
    """The network that a file holds, and the imagery that it accepts."""

    segmenter: SupervisedConfig | None = None
    """architecture and encoder of a segmenter."""
    classifier: ClassifierConfig | None = None
    """network, encoder and size of a classifier."""
    classes: Classes | None = None
    """Names and colours, in the order of the network's outputs: a table, or its name under configs/classes."""
    one: bool = False
    """The segmenter has one output, of the last class."""
    scaling: Scaling = Scaling(mean=tuple(PHOTOS["mean"]), std=tuple(PHOTOS["std"]))
    """From uint8 values to the network's input."""
    bands: Bands = models.RGB
    """Bands of a segmenter's imagery, in the order of the network's input."""
    patch: int = 640
    """Side in px of a segmenter's window."""
    stride: int = 512
    """Distance of these windows in px."""


def import_model(kind: str, path: str, out: StorePath, settings: Sequence[str] = ()) -> list[str]:
    """Write the weights in `path` as a bundle under `out`; return what was loaded, what was dropped, and why.

    Args:
        kind: a key of `KINDS`.
        path: a checkpoint of torch or a .safetensors file; a path or URL.
        out: prefix of the bundle.
        settings: of `ImportConfig`, as `key=value`.

    Raises:
        ConfigError: the kind is unknown, or a setting is invalid.
        ModelError: the file cannot be read, holds other objects than tensors, or lacks a tensor of the network.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown, expected one of: {', '.join(KINDS)}")
    # What a kind implies comes first, so that given settings replace it.
    defaults = [f"{key}={json.dumps(value)}" for key, value in KINDS[kind].items()]
    config = load(ImportConfig, None, [*defaults, *settings])
    described, model = _described(kind, config)
    state, aside = read_checkpoint(path)
    fitted = published_weights.fit(model, state, path, renames=RENAMES.get(kind, ()))
    model.load_state_dict(fitted.state)
    bundle.save(out, described, model.eval())
    # Every tensor is accounted for: a decoder that vanishes without a word looks like a bad model.
    loaded = len(state) - len(fitted.dropped)
    lines = [f"{described.name} in {out}: {loaded} of {len(state)} tensors loaded from {path}"]
    lines += [f"  by its shape: {key} <- {name}" for key, name in fitted.shaped.items()]
    dropped = dict.fromkeys(aside, "not weights") | fitted.dropped
    lines += [f"  dropped {name}: {why}" for name, why in dropped.items()]
    return lines + [f"  note: {REMARKS[kind]}" for _ in range(kind in REMARKS)]


def _described(kind: str, config: ImportConfig) -> tuple[Bundle, nn.Module]:
    """The bundle's description and its untrained network."""
    table = config.classes.table.classes if config.classes else ()
    channels = len(config.scaling.mean)
    if len(table) < 2:
        raise ConfigError(f"classes of {kind} are not set, expected two or more; give them with --set classes=TABLE")
    if config.classifier:
        described = models.classifier_bundle(config.classifier, table, name=kind, scaling=config.scaling)
        return described, config.classifier.build(classes=len(table), channels=channels, weights="none")
    if config.segmenter is None:
        raise ConfigError(f"{kind} has neither segmenter nor classifier, expected one of them; give it with --set")
    count = 1 if config.one else len(table)
    options = config.segmenter.options(classes=count, channels=channels)
    described = models.segmenter_bundle(
        config.segmenter,
        table,
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        bands=config.bands,
        options=options,
    ).model_copy(update={"name": kind})
    return described, config.segmenter.build(classes=count, channels=channels, weights="none")
