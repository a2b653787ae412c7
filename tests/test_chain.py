"""What one pipeline leaves is the next one's input: the commands of docs/chain.md, and the parts of runs they name."""

import json
import shlex
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from small_world import SMALL_GPC, catalogue, rayseg, refused

from rayseg.api.running import area_of
from rayseg.config import load
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Window
from rayseg.io import scenes
from rayseg.io.class_tables import Classes
from rayseg.pipelines import landcover
from rayseg.store import located

PAGE = Path(__file__).parents[1] / "docs" / "chain.md"
TINY = {  # settings for seconds in place of those of the page
    "gpc": SMALL_GPC,
    "landcover": """
labelled: {validation: [demo-east]}
segmenter:
  architecture: linknet
  encoder: test_resnet
  weights: none
  reduce: 2
  epochs: 1
  sampling: {size: 128, windows: 8}
  learning: {batch: 4, optimizer: adamw}
patch: 192
stride: 128
map: {tile: 512}
baseline: false
""",
    "al-s4gan": """
pool: {size: 64, validation: [demo-east]}
scaling: {mean: [110.0, 110.0, 95.0], std: [45.0, 40.0, 40.0]}
active: {strategy: random, ratio: 0.2}
segmenter:
  {architecture: linknet, encoder: test_resnet, weights: none, size: 64, steps: 4, checkpoint: 4, learning: {batch: 4}}
patch: 192
stride: 128
map: {tile: 512}
baseline: false
""",
    "superpixel": "map: {tile: 512}\n",
    "agri": """
proposer: felzenszwalb
rounds: {left: 0.02}
superpixels: {scales: [150], reduce: 2, least: 400}
patch: 256
stride: 192
map: {tile: 576}
training: {size: 32, epochs: 1, rates: [[1, 1.0e-3]]}
""",
}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory, tiny_model):
    """A run of predict over one scene, and its imagery."""
    root = tmp_path_factory.mktemp("mapped")
    catalog = catalogue(root / "in", west={})
    found = rayseg("predict", tiny_model, f"{catalog}#imagery", "--out", root / "run", "--engine", "inline")
    assert found.exit_code == 0, found.output
    return root / "run", f"{catalog}#imagery"


def test_a_run_is_named_by_its_parts(mapped):
    run, imagery = mapped
    assert located(f"{run}#classes") == f"{run}/collection.json#/classes"
    config = load(landcover.Config, None, [f"labelled.masks={run}#classes", f"classes={run}#classes"])
    assert config.labelled.masks == f"{run}/collection.json#/classes"
    assert config.classes.table.names == ("background", "gpc")
    assert config.labelled.min_score == 0
    assert "min_score" not in config.model_dump(mode="json")["labelled"]
    area = area_of(str(run))
    assert f"{area.catalog}#{area.collection}" == imagery
    assert area.name == imagery
    with pytest.raises(ConfigError, match=r"#plots is not there: labelled/catalog.json is missing"):
        located(f"{run}#plots")
    with pytest.raises(ConfigError, match=r"#maps is not a part of a run, expected one of classes, assigned, plots or"):
        located(f"{run}#maps")
    words = ("run", "pipeline", "landcover", "--region", run, "--out", run.parent / "no")
    assert "#models/other is not there" in refused(2, *words, "--set", f"segmenter.start={run}#models/other")


def test_only_sure_pixels_of_a_map_teach(mapped):
    run, imagery = mapped
    table = Classes.model_validate(f"{run}#classes").table
    masks = located(f"{run}#classes")
    [tile] = run.glob("tiles/*/classes.tif")
    with rasterio.open(tile) as classes, rasterio.open(tile.with_name("scores.tif")) as scores:
        classes_HW, score_HW = classes.read(1), scores.read(1)
    own_HW = np.where(classes_HW == 1, score_HW, 254 - score_HW.astype(int))
    least = float(np.median(own_HW[classes_HW != 255]) + 1) / 254

    def labelled(**settings):
        [image] = scenes.labelled_images(imagery, masks, table=table, **settings)
        return scenes.read_window(image, image.window, bands=("red", "green", "blue"), table=table)[1], image

    every_HW, _ = labelled()
    sure_HW, image = labelled(min_score=least)
    expected = {value: int(((classes_HW == value) & (own_HW >= least * 254 - 0.5)).sum()) for value in (0, 1)}
    assert {value: int((sure_HW == value).sum()) for value in (0, 1)} == expected
    assert 0 < (sure_HW != 255).sum() < (every_HW != 255).sum()
    assert (sure_HW == every_HW)[sure_HW != 255].all()
    # the images travel as rows, and windows give the same pixels
    again = scenes.LabelledImage.from_row(image.to_row())
    assert again == image
    part = Window(image.window.col + 30, image.window.row + 20, 64, 48)
    part_HW = scenes.read_window(again, part, bands=("red",), table=table)[1]
    np.testing.assert_array_equal(part_HW, sure_HW[20:68, 30:94])


def test_a_map_of_other_classes_is_refused(mapped, tmp_path):
    run, imagery = mapped
    masks = located(f"{run}#classes")
    table = Classes.model_validate("deepglobe").table
    with pytest.raises(DataError, match=r"has the classes background, gpc, but background is not among"):
        scenes.labelled_images(imagery, masks, table=table)
    assert rayseg("polygonize", run, "--out", tmp_path / "p.geojson").exit_code == 0
    with pytest.raises(DataError, match=r"has no scores, but min_score is 0.5; give RUN#classes"):
        scenes.labelled_images(imagery, str(run / "tiles"), table=table, min_score=0.5)


def commands():
    """The commands of the page, in order."""
    text = PAGE.read_text().replace(" \\\n        ", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    rayseg ")]


def derived_from(path):
    links = json.loads(Path(path).read_text())["links"]
    return [link["href"] for link in links if link["rel"] == "derived_from"]


@pytest.mark.more
@pytest.mark.e2e
def test_the_commands_of_the_page(tmp_path, monkeypatch, demo_region):
    monkeypatch.chdir(tmp_path)
    for name, text in TINY.items():
        Path(f"{name}.yaml").write_text(text)
    Path("names.csv").write_text("label,class\n" + "".join(f"{k},{'ab'[k % 2]}\n" for k in range(8)))
    for _, *typed in commands():
        words = [demo_region if word == "demo" else word for word in typed]
        if "--config" in words:
            at = words.index("--config")
            words[at + 1] = f"{words[2]}.yaml"
        if words[0] in {"run", "predict", "remap"}:
            words += ["--engine", "inline"]
        for group in ("labelled", "pool"):
            if f"{group}.min_score=0.8" in words:  # a network of seconds is sure of little, and may miss a class
                words += ["--set", f"{group}.min_score=0.3", "--set", f"{group}.absent=[background, gpc]"]
        if words[:2] == ["labels", "import"]:
            _label("json")
        found = rayseg(*words)
        assert found.exit_code == 0, (words, found.output)
    # the way back from the last map to the first labels
    [tile, *_] = Path("runs/other/tiles").glob("*/*.json")
    assert any(href.endswith("cover/models/segmenter/item.json") for href in derived_from(tile))
    assert derived_from("runs/cover/models/segmenter/item.json") == [f"{tmp_path}/runs/gpc/collection.json"]
    assert derived_from("runs/named/models/segmenter/item.json") == [f"{tmp_path}/runs/clusters/assigned/catalog.json"]
    assert derived_from("runs/fields/models/plots/item.json") == [f"{tmp_path}/runs/plots/labelled/catalog.json"]
    assert [Path(href).name for href in derived_from("runs/gpc/models/segmenter/item.json")] == ["catalog.json"]
    kinds = geopandas.read_parquet("runs/again/plots.parquet")["class"]
    assert set(kinds) <= {"field", "nonfield"}
    assert len(kinds) > 10


def _label(folder):
    """Set every second plot to not cultivated, as a person would."""
    for path in Path(folder).glob("*.json"):
        content = json.loads(path.read_text())
        for number, shape in enumerate(content["shapes"]):
            shape["label"] = str(number % 2)
        path.write_text(json.dumps(content))
