"""Settings of a training that goes on from the model of a corrected map: the map's sure pixels teach it."""

from typing import Any

from rayseg.engine import run as runs
from rayseg.errors import ConfigError
from rayseg.models import bundle
from rayseg.steps.remap import polygons_of
from rayseg.store import split_location

SURE = 0.7
"""Score of a pixel's class in the corrected map from which it teaches; clicks that the head follows have more."""
DECODER = {
    "segmenter.epochs": 6,
    "segmenter.every": 2,
    "segmenter.schedule": {"kind": "cos", "rate": 1e-4},
    "segmenter.learning": {"batch": 4, "optimizer": "adamw", "weight_decay": 0.01, "freeze_batchnorm": "all"},
    "segmenter.augment": {"scale": [0.8, 1.25]},
}
"""Of a decoder that is trained already: a low rate, few epochs, its statistics as they are."""


def training_of(root: str) -> dict[str, Any]:
    """The settings of `landcover` that fine-tune the model of a corrected map on that map, and map its region again.

    A decoder starts from its weights; a head on a frozen encoder is fitted anew.

    Args:
        root: prefix of the run of `correct`.

    Raises:
        ConfigError: the model before the corrections is neither a segmenter nor a head on a frozen encoder.
    """
    content = runs.read(root)
    prefix = content["steps"]["model"]["bundle"]
    described = bundle.description(prefix)
    factory, options = described.architecture.factory, described.architecture.options
    if factory not in {"segmenter", "pixel-head"} or "members" in options:
        raise ConfigError(
            f"model {prefix} is of the kind {factory}, which cannot be fine-tuned on a map; leave --train out, "
            f"{root} is finished"
        )
    # A decoder continues from its own weights; a head is fitted in seconds, so it starts anew.
    network: dict[str, Any]
    if factory == "segmenter":
        network = {"network": "decoder", "weights": "none", "start": prefix}
        network |= {key: options[key] for key in ("architecture", "encoder", "reduce", "enlarge") if key in options}
    else:
        kind = "frozen" if options.get("hidden") else "linear"
        weights = described.provenance.config.get("weights", "packaged")
        network = {"network": kind, "encoder": options["encoder"], "weights": weights}
    names = [name for _, name, _ in described.classes]
    catalog, collection = split_location(content["config"]["map"].get("imagery") or "")
    return {
        "classes": f"{root}#classes",
        "labelled.masks": f"{root}#classes",
        "labelled.min_score": SURE,
        "labelled.absent": names,
        **({"labelled.source": f"{catalog}#{collection}" if collection else catalog} if catalog else {}),
        **{f"segmenter.{name}": value for name, value in network.items()},
        **(DECODER if factory == "segmenter" else {}),
        "segmenter.sampling.size": min(512, described.patch // 32 * 32),
        "bands": list(described.bands),
        "scaling": described.scaling.model_dump(mode="json"),
        "patch": described.patch,
        "stride": described.stride,
        "map": content["config"]["map"],
        "polygons": polygons_of(root),
        "baseline": False,
    }
