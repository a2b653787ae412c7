"""A model as a STAC item, with the extensions MLM, file and processing."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

import pystac

if TYPE_CHECKING:  # which writes the item
    from rayseg.models.bundle import Bundle

MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.5.2/schema.json"
FILE_SCHEMA = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
PROCESSING_SCHEMA = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
MLM_TASKS = {
    "classification": "scene-classification",
    "segmentation": "semantic-segmentation",
    "instances": "instance-segmentation",
}


def item(bundle: "Bundle", *, size: int, parameters: int) -> pystac.Item:
    """The STAC item of a model, with the extensions MLM, file and processing.

    Args:
        bundle: as saved.
        size: of the weights file in bytes.
        parameters: number of the model's weights.
    """
    provenance = bundle.provenance
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
            "mlm:architecture": str(bundle.architecture.options.get("architecture", bundle.architecture.factory)),
            "mlm:tasks": [MLM_TASKS[bundle.task]],
            "mlm:framework": "pytorch",
            "mlm:framework_version": metadata.version("torch").partition("+")[0],
            "mlm:total_parameters": parameters,
            "mlm:accelerator_constrained": False,
            "mlm:hyperparameters": dict(bundle.architecture.options),
            "mlm:input": [_mlm_input(bundle)],
            "mlm:output": [_mlm_output(bundle)],
        },
        stac_extensions=[MLM_SCHEMA, FILE_SCHEMA, PROCESSING_SCHEMA],
    )
    described.add_asset("model", _weights_asset(bundle, size))
    described.add_asset("bundle", pystac.Asset("./bundle.json", media_type="application/json", roles=["metadata"]))
    for parent in provenance.parents:
        described.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, parent, media_type="application/json"))
    return described


def _mlm_input(bundle: "Bundle") -> dict[str, Any]:
    """Scaling as one z-score per band on the values as they are stored."""
    scaling = bundle.scaling
    z_scores = [
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


def _mlm_output(bundle: "Bundle") -> dict[str, Any]:
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


def _weights_asset(bundle: "Bundle", size: int) -> pystac.Asset:
    return pystac.Asset(
        "./model.safetensors",
        title=f"weights of {bundle.name}",
        media_type="application/octet-stream",
        roles=["mlm:model", "mlm:weights", "data"],
        extra_fields={
            "mlm:artifact_type": "safetensors.torch.save",
            "file:size": size,
            "file:checksum": f"1220{bundle.sha256}",
        },
    )
