"""Scenes, catalogues and bundles small enough to run whole pipelines on, and the command line in this process."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pystac
import rasterio
import torch
from fake_run import blobs, picture
from PIL import Image
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from typer.testing import CliRunner

from rayseg.cli import app
from rayseg.geo.grid import Grid, Window
from rayseg.io import cog, labels
from rayseg.io.stac_write import unpacked
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Scaling
from rayseg.models.classifier import build_classifier
from rayseg.models.segmenter import build_segmenter

torch.set_num_threads(1)  # tiny networks, and often a busy machine

GRID = Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0))
CORNER = Window(2048 * 244 + 100, -2048 * 2148 + 60, 0, 0)  # inside a tile of 2048 px, near borders of 128 and 256 px
BANDS = ("red", "green", "blue")
HEIGHT, WIDTH = 200, 180
SCALING = Scaling(mean=(120.0,) * 3, std=(50.0,) * 3)
SMALL_GPC = """
chips: {size: 128, held_out: 0.25}
scaling: {mean: [110.0, 110.0, 95.0], std: [45.0, 40.0, 40.0]}
classifier:
  encoder: timm-mobilenetv3_small_minimal_100
  weights: none
  size: 128
  epochs: 1
  rates: [[1, 3.0e-3]]
  learning: {batch: 6}
cues: {iterations: 2, objects: components}
segmenter:
  encoder: timm-mobilenetv3_small_minimal_100
  weights: none
  size: 64
  negatives: 0.5
  loss: bce_iou
  warm_up: {epochs: 2, rates: [[2, 2.0e-3]]}
  correction: {epochs: 1, rates: [[1, 1.0e-3]], relabel: every epoch, cue_weight: 0.2}
  scratch: {epochs: 1, rates: [[1, 2.0e-3]], restart: true, relabel: once}
  learning: {batch: 6, average: 0.9}
  augment: {crop: random}
patch: 160
stride: 128
map: {tile: 512}
truth: "#truth/gpc"
"""


def rayseg(*words):
    """The command line's result: exit_code, stdout, stderr; what is no error of ours is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def finished(out, *words):
    """The folder of a run that these words begin, when it has ended well."""
    result = rayseg(*words, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}/report/index.html: ")
    return out


def planned(*words):
    """What `rayseg plan` returns for the words of a run."""
    result = rayseg("plan", *[word for word in words[1:] if word not in {"--engine", "inline"}], "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(code, *words):
    """The one sentence with which the command line refuses these words."""
    result = rayseg(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("rayseg: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def window_at(row, col, height=HEIGHT, width=WIDTH):
    return Window(CORNER.col + col, CORNER.row + row, width, height)


def scene(path, *, row=0, col=0, seed=0, height=HEIGHT, width=WIDTH, margin=20, bands=BANDS, dtype="uint8"):
    """Write a picture with a slanted margin of nodata (0); return where it has data, (height, width) bool."""
    image_CHW = picture(blobs(height, width, seed=seed), seed=seed)[: len(bands)].astype(dtype)
    valid_HW = np.add.outer(np.arange(height), np.arange(width)) >= margin
    where = window_at(row, col, height, width)
    cog.write_image(path, image_CHW, GRID, where, bands=bands, nodata=0, valid_HW=valid_HW)
    return valid_HW


def catalogue(folder, **scenes):
    """A catalogue of scenes: name -> arguments of `scene`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, options in scenes.items():
        paths.append(str(folder / f"{name}.tif"))
        scene(paths[-1], **options)
    return labels.ingest_rasters(paths, folder / "cat")


def segmenter(prefix, *, bands=BANDS, dtype="uint8", classes=1):
    """Save a bundle of a network that has learnt nothing, but marks about half of a scene, in patches of 64 px."""
    torch.manual_seed(7)
    options = {"architecture": "unet", "encoder": "mobilenet_v2", "classes": classes, "channels": len(bands)}
    model = build_segmenter(**options, weights="none").eval()
    names = ("background", "gpc") if classes == 1 else tuple(f"kind-{k}" for k in range(classes))
    colors = ((0, 0, 0), (0, 158, 115), (230, 159, 0), (86, 180, 233))
    described = Bundle(
        name="segmenter",
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=options),
        classes=tuple((value, name, colors[value]) for value, name in enumerate(names)),
        bands=bands,
        dtype=dtype,
        scaling=Scaling(mean=(120.0,) * len(bands), std=(50.0,) * len(bands)),
        patch=64,
        stride=48,
    )
    head = model.get_submodule("segmentation_head")[0]
    with torch.inference_mode():
        sample = described.normalize(np.repeat(picture(blobs(128, 128, seed=5), seed=5)[:1], len(bands), axis=0))
        logits_KN = model(torch.from_numpy(sample)[None])[0].flatten(1)
        head.weight /= logits_KN.std(dim=1)[:, None, None, None]
        head.bias.copy_((head.bias - logits_KN.median(dim=1).values) / logits_KN.std(dim=1))
    bundle.save(prefix, described, model)
    return str(prefix)


def classifier(prefix, *, encoder="mobilenet_v2", train=None):
    """Save a bundle that tells images apart, and so cannot map; `train` changes its network first."""
    options = {"encoder": encoder, "classes": 2}
    described = Bundle(
        name="classifier",
        task="classification",
        architecture=Architecture(factory="classifier", options=options),
        classes=((0, "gpc", (0, 158, 115)), (1, "nongpc", (0, 0, 0))),
        bands=BANDS,
        dtype="uint8",
        scaling=SCALING,
        patch=64,
        stride=64,
    )
    model = build_classifier(**options, weights="none")
    bundle.save(prefix, described, train(model) if train else model)
    return str(prefix)


def chip_folder(folder, *, size=64, counts=(3, 3)):
    """PNG chips in folders by class: `gpc` with green shapes, `nongpc` without."""
    for label, count, share in (("gpc", counts[0], 0.3), ("nongpc", counts[1], 0.0)):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            image_CHW = picture(blobs(size, size, seed=number, share=share), seed=number)
            Image.fromarray(image_CHW.transpose(1, 2, 0)).save(folder / label / f"{number}.png")
    return folder


def damage(path):
    """Spoil the pixels of a file but not its header; return its bytes as they were."""
    whole = Path(path).read_bytes()
    with rasterio.open(path) as file:
        start = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    Path(path).write_bytes(whole[:start] + b"\xff" * 100 + whole[start + 100 :])
    return whole


def files(root):
    """File below a folder -> (time of change, bytes)."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


def mosaic(root, name="classes"):
    """The tiles of a run put together on the window of `scene`, (bands, height, width); 255 elsewhere."""
    whole = window_at(0, 0)
    left, _, _, top = GRID.bounds(whole)
    result = None
    for path in sorted(Path(root).glob(f"tiles/*/{name}.tif")):
        with rasterio.open(path) as file:
            part = file.read()
            row, col = round(top - file.bounds.top), round(file.bounds.left - left)
        if result is None:
            result = np.full((len(part), whole.height, whole.width), 255, np.uint8)
        result[:, row : row + part.shape[1], col : col + part.shape[2]] = part
    return result


def valid_stac(path):
    """Check a STAC file by the core schemas, which come with pystac; those of the extensions need a network."""
    row = json.loads(Path(path).read_text())
    kind = {"Feature": "ITEM", "Collection": "COLLECTION", "Catalog": "CATALOG"}[row["type"]]
    JsonSchemaSTACValidator().validate_core(row, pystac.STACObjectType[kind], "1.1.0")
    return row


def naming(root, path):
    """Files of a run that name a path, inside of tables and packed items too."""
    found = set()
    for file in sorted(Path(root).rglob("*")):
        if file.is_file():
            texts = [file.read_bytes()]
            if file.suffix == ".parquet":
                texts.append(json.dumps(pq.read_table(file).to_pylist(), default=str).encode())
            if file.parent.name == "ledger" and file.suffix == ".json":
                item = json.loads(texts[0])["facts"].get("item", "")
                texts += [json.dumps(unpacked(item)).encode()] if len(item) > 200 else []
            found |= {str(file.relative_to(root)) for text in texts if str(path).encode() in text}
    return found


def goes_on_elsewhere(whole, words, tmp_path):
    """Check that no file of a run names its place, and that a copy in another place goes on from its own files."""
    assert not naming(whole, whole)
    shutil.copytree(whole, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    before = files(tmp_path / "there")
    assert rayseg(*words, "--out", tmp_path / "there").exit_code == 0
    after = files(tmp_path / "there")
    assert [name for name in after if before.get(name) != after[name] and name != ".lock"] == ["run.json"]
    for name in ("steps/predict", "tiles"):
        shutil.rmtree(tmp_path / "there" / name)
    found = rayseg(*words, "--out", tmp_path / "there")
    assert found.exit_code == 0, found.output
    for path in Path(whole).glob("tiles/*/*.tif"):
        assert (tmp_path / "there" / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert not naming(tmp_path / "there", tmp_path)
