"""The report: everything a run knows on one page that needs nothing else, whatever the run."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from fake_run import GPC, NODATA, blobs, make, picture, place
from torch.utils.tensorboard import SummaryWriter

from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.run import Engine, Step
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io import cog
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.io.pictures import encoded
from rayseg.steps import charts, evaluate, numbers, report
from rayseg.steps.report import Extras, headline, timing_of, write_report

VOID = {"meta", "img", "br", "line", "circle"}


class Page(HTMLParser):
    """Tags in order; fails on one that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def later(predicted, name, value=None, seconds=0.0):
    return Step(name, predicted.root, "key", Engine("inline"), value or {}, seconds)


def fake(tmp_path, *, failed=True):
    """A run of six tiles of which the last failed, 2 m pixels."""
    mask = blobs(128, 192, seed=1)
    mask[:16] = NODATA
    fates = {"32650_3906_-34367": ("failed", "ReadTile: <b>scene.tif</b> is damaged")} if failed else {}
    return make(tmp_path / "run", {"scene": (picture(mask % 2), mask, (0, 0))}, fates=fates), mask


def page_of(predicted, *others, **more):
    value = write_report(later(predicted, "report"), predicted, *others, **more)
    return value, Page((predicted.prefix.parent.parent / "report" / "index.html").read_text())


def test_a_run_is_told_from_its_area_to_its_failed_tile(tmp_path):
    predicted, mask = fake(tmp_path)
    seen = mask.copy()
    seen[64:, 128:] = NODATA  # the tile that failed
    real = blobs(128, 192, seed=2)
    cog.write_classes(
        tmp_path / "truth" / "a.tif", real, mapped_tiles(predicted.root)[0].tile.grid, place(real, 0, 0), GPC
    )
    measured = evaluate.evaluate_run(later(predicted, "evaluate"), predicted, str(tmp_path / "truth"))
    extras = Extras(
        title="Netting <in> the valley",
        labels="Learnt from 96 chips.",
        pictures=(("Chip 7", encoded(picture(mask % 2).transpose(1, 2, 0)), "What the model looks at."),),
        histories={"classifier": [{"loss": 1.0, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.9}]},
    )
    value, page = page_of(
        predicted, later(predicted, "polygons", {"count": 1234}), later(predicted, "evaluate", measured), extras
    )
    share = (seen == 1).sum() / (seen != NODATA).sum()
    assert value["shares"]["gpc"] == pytest.approx(share)
    assert value["area_m2"] == pytest.approx((seen != NODATA).sum() * 4 / 0.9996**2, rel=1e-4)
    assert value["mean_iou"] == measured["overall"]["mean_iou"]["value"]
    assert value["km2_per_hour"] == pytest.approx(value["area_m2"] / 1e6 / 12.5 * 3600)
    for said in (
        "Netting <in> the valley",
        "Learnt from 96 chips.",
        f"{share * 100:.1f} % gpc",
        "1,234",
        "5 of 6 planned",
        "32650_3906_-34367",
        "ReadTile: <b>scene.tif</b> is damaged",
        f"{measured['overall']['mean_iou']['value']:.3f}",
        "What the model looks at.",
        "rayseg run pipeline gpc --region demo",
        "seed: 1337",
        "rayseg 0.1.0",
        "times as often as inside tiles",
        "background is not painted",
    ):
        assert said in page.text, said


def test_the_page_needs_nothing_else_and_every_picture_has_words(tmp_path):
    predicted, mask = fake(tmp_path)
    extras = Extras(pictures=(("A", encoded(picture(mask % 2).transpose(1, 2, 0)), "b"),))
    _, page = page_of(predicted, extras=extras)
    assert page.all("script") == [{}]  # in the page itself
    assert not page.all("link")
    images = page.all("img")
    assert len(images) == 3
    for image in images:
        kind, content = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", image["src"]).groups()
        assert matplotlib.image.imread(io.BytesIO(base64.b64decode(content)), format=kind.split("/")[1]).size
        assert image["alt"]
    assert page.all("th")
    assert all(attrs.get("scope") in {"row", "col"} for attrs in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    html = (predicted.prefix.parent.parent / "report" / "index.html").read_text()
    assert "prefers-color-scheme: dark" in html
    assert "http" not in re.sub(r"data:[^\"]+", "", html)


def test_the_map_is_kept_as_a_picture_of_its_own(tmp_path):
    predicted, mask = fake(tmp_path, failed=False)
    page_of(predicted)
    with (predicted.prefix.parent.parent / "report" / "map.png").open("rb") as file:
        shown = np.rint(matplotlib.image.imread(file) * 255)
    assert shown.shape == (128, 192, 4)
    greener = shown[..., 1] - shown[..., 0]
    assert greener[mask == 1].mean() > 50
    assert greener[mask == 0].mean() < 0


def test_the_same_run_gives_the_same_page(tmp_path):
    predicted, _ = fake(tmp_path)
    extras = Extras(histories={"a": [{"loss": 1.0}, {"loss": 0.5}]})
    path = predicted.prefix.parent.parent / "report" / "index.html"
    page_of(predicted, extras=extras)
    first = path.read_bytes()
    page_of(predicted, extras=extras)
    assert path.read_bytes() == first


def test_images_without_georeference_are_counted_in_pixels(tmp_path):
    mask = blobs(40, 60)
    images = {name: (picture(mask), mask, (0, 0)) for name in "ab"}
    predicted = make(tmp_path / "run", images, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    value, page = page_of(predicted)
    assert value["area_m2"] is None
    assert value["km2_per_hour"] is None
    assert value["pixels_per_second"] == pytest.approx(2 * 40 * 60 / 12.5)
    assert "4,800 pixels mapped in 2 images" in page.text
    assert "km²" not in page.text


def test_a_run_that_mapped_nothing_still_has_a_report(tmp_path):
    mask = blobs(30, 30)
    predicted = make(tmp_path / "run", {"a": (picture(mask), mask, (0, 0))})
    for record in Ledger(str(predicted.prefix / "ledger")).read().values():
        (predicted.prefix / "ledger" / f"{record.id}.1.json").unlink()
        Ledger(str(predicted.prefix / "ledger")).write(Record(record.id, "failed", "no such file"))
    value, page = page_of(predicted)
    assert "Nothing was mapped." in page.text
    assert "no such file" in page.text
    assert value["area_m2"] is None
    json.dumps(value, allow_nan=False)


def test_a_truth_that_was_not_given_leaves_accuracy_out(tmp_path):
    predicted, _ = fake(tmp_path)
    value, page = page_of(predicted, None, later(predicted, "evaluate", {}))
    assert value["mean_iou"] is None
    assert "Accuracy" not in page.text


def test_the_headline_says_where_and_what(tmp_path):
    predicted, _ = fake(tmp_path)
    value, _ = page_of(predicted)
    line = headline(later(predicted, "report", value))
    assert line.startswith(f"{predicted.root}/report/index.html: ")
    assert "gpc" in line
    assert "\n" not in line
    assert "Certificate" not in line
    known = value | {"certificate": {"light": "red", "lights": {"shift": "amber", "brightness": "red"}}}
    assert headline(later(predicted, "report", known), "A note.").endswith(" A note. Certificate: red (brightness).")


def test_idle_is_what_the_clock_has_left_of_its_workers(tmp_path):
    predicted, _ = fake(tmp_path)
    tiles = mapped_tiles(predicted.root)
    timing = timing_of(predicted, tiles)
    spent = {stage["name"]: stage["seconds"] for stage in timing["stages"]}
    assert spent == pytest.approx({"read": 5 * 0.2 + 0.1, "model": 5 * 1.5, "write": 5 * 0.3})
    assert list(spent) == ["read", "model", "write"]
    assert timing["idle"] == pytest.approx(3 * 12.5 - 10.1)
    assert sum(stage["share"] for stage in timing["stages"]) == pytest.approx(10.1 / 37.5)
    assert timing_of(predicted, tiles, workers=5)["idle"] == pytest.approx(5 * 12.5 - 10.1)
    hurried = later(predicted, "predict", seconds=1.0)
    assert timing_of(hurried, tiles)["idle"] is None
    assert sum(stage["share"] for stage in timing_of(hurried, tiles)["stages"]) == pytest.approx(1)


def test_the_start_of_processes_is_not_idle_time_of_the_map(tmp_path):
    predicted, _ = fake(tmp_path)
    (predicted.prefix / "first.json").write_text('{"seconds": 9.0}')  # the first of six tiles
    timing = timing_of(predicted, mapped_tiles(predicted.root))
    assert timing["start"] == pytest.approx(9 - 10.1 / 6)
    assert timing["idle"] == pytest.approx(3 * (12.5 - timing["start"]) - 10.1)
    _, page = page_of(predicted)
    assert "The map took 12.5 s, 7.3 s of them before the first tile" in page.text
    (predicted.prefix / "first.json").write_text('{"seconds": 0.1}')  # a tile that was fast
    assert timing_of(predicted, [])["start"] == 0


def test_the_map_of_one_class_is_judged_by_that_class(tmp_path):
    predicted, mask = fake(tmp_path, failed=False)
    cog.write_classes(
        tmp_path / "truth" / "a.tif", mask % 2, mapped_tiles(predicted.root)[0].tile.grid, place(mask, 0, 0), GPC
    )
    measured = evaluate.evaluate_run(later(predicted, "evaluate"), predicted, str(tmp_path / "truth"))
    cover = measured["classes"][1]
    value, page = page_of(predicted, None, later(predicted, "evaluate", measured))
    assert list(value["measures"]) == ["IoU of gpc", "F1 of gpc", "mean IoU"]
    assert value["measures"]["IoU of gpc"] == cover["iou"]["value"] == 1
    assert "IoU of gpc 1.000" in page.text
    assert headline(later(predicted, "report", value)).endswith("km²/h.")
    assert "IoU of gpc 1.000, F1 of gpc 1.000, mean IoU 1.000." in headline(later(predicted, "report", value))


def test_links_lead_to_files_and_every_raster_of_a_tile_is_among_them(tmp_path):
    predicted, _ = fake(tmp_path, failed=False)
    root = tmp_path / "run"
    for name in ("collection.json", "gpc.parquet", "models/segmenter/item.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    for tile in mapped_tiles(str(root)):
        (root / "tiles" / tile.tile.id / f"{tile.tile.id}.json").write_text("{}")
    _, page = page_of(predicted)
    paths = [link["href"] for link in page.all("a")]
    assert all((root / "report" / path).resolve().exists() for path in paths)
    named = {(root / "report" / path).resolve().relative_to(root.resolve()).as_posix() for path in paths}
    assert {"collection.json", "gpc.parquet", "models/segmenter/item.json", "run.json"} <= named
    assert sum(path.endswith("classes.tif") for path in paths) == len(mapped_tiles(str(root))) == 6


def test_images_of_a_folder_have_a_row_each_with_their_shares_and_measures(tmp_path):
    few, many = np.zeros((40, 60), np.uint8), np.ones((40, 60), np.uint8)
    few[:4] = 1
    images = {name: (picture(mask), mask, (0, 0)) for name, mask in (("few", few), ("many", many))}
    predicted = make(tmp_path / "run", images, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    ids = {tile.tile.grid.image: tile.tile.id for tile in mapped_tiles(predicted.root)}
    measured = later(predicted, "evaluate", {})
    measured.prefix.mkdir(parents=True)
    counts = {ids["few"]: [[2000, 0], [160, 240]], ids["many"]: [[0, 0], [0, 2400]]}
    (measured.prefix / "confusions.json").write_text(json.dumps({"classes": [0, 1], "tiles": counts}))
    _, header, rows = report.images_table(mapped_tiles(predicted.root), GPC, measured)
    assert header == ("image", "pixels", "gpc", "IoU of gpc")
    assert rows == [("few", "2,400", "10.0 %", "0.600"), ("many", "2,400", "100 %", "1.000")]
    assert report.images_table(mapped_tiles(predicted.root)[:1], GPC, None) is None  # one image is the map


def test_a_map_larger_than_the_page_shows_has_finer_pictures_next_to_it(tmp_path, monkeypatch):
    predicted, _ = fake(tmp_path, failed=False)
    monkeypatch.setattr(report, "OVERVIEW", 100)
    _, page = page_of(predicted)
    [shown] = [one for one in page.all("div") if "data-title" in one]
    folder = tmp_path / "run" / "report"
    for name in ("imagery", "map"):
        assert matplotlib.image.imread(folder / shown[f"data-{name}"]).shape[:2] == (128, 192)
    assert [image["width"] for image in page.all("img")] == ["100", "100"]


def test_speed_is_that_of_the_step_that_looked_at_the_imagery(tmp_path):
    mask = blobs(64, 64)
    predicted = make(tmp_path / "run", {"scene": (picture(mask), mask, (0, 0))})
    ledger = Ledger(str(tmp_path / "run/steps/propose/ledger"))
    ledger.write(Record("a", "done", seconds={"ReadGround": 1.0, "ProposePlots": 40.0, "WritePieces": 2.0}))
    looked = replace(predicted, name="propose", seconds=50.0)
    value = write_report(replace(predicted, name="report"), predicted, extras=Extras(timed=looked))
    assert value["pixels_per_second"] == pytest.approx(64 * 64 / 50)
    assert {stage["name"] for stage in timing_of(looked, [])["stages"]} == {"read", "model", "write"}


def test_pictures_and_training_are_found_below_the_run(tmp_path):
    predicted, mask = fake(tmp_path)
    (predicted.prefix.parent / "cues").mkdir()
    (predicted.prefix.parent / "cues" / "a.png").write_bytes(encoded(picture(mask % 2).transpose(1, 2, 0)))
    with SummaryWriter(str(predicted.prefix.parent / "classifier" / "tensorboard")) as writer:
        for epoch in range(4):
            writer.add_scalar("loss", 1 / (epoch + 1), epoch)
    history = charts.histories(predicted.root)["classifier"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["loss"] for row in history] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    _, page = page_of(predicted, extras=Extras(pictures=(("Cue", "steps/cues/a.png", "c"),)))
    sources = [image["src"][:20] for image in page.all("img")]
    assert sum(source.startswith("data:image/png") for source in sources) == 1
    assert sum(source.startswith("data:image/svg+xml") for source in sources) == 1


def test_trainings_stand_in_the_order_in_which_they_began(tmp_path):
    predicted, _ = fake(tmp_path)
    for second, name in enumerate(("warm_up", "correction", "a_last")):
        with SummaryWriter(str(predicted.prefix.parent / "segmenter" / name / "tensorboard")) as writer:
            writer.add_scalar("loss", 1.0, 0, walltime=1000.0 + second)
    assert list(charts.histories(predicted.root)) == ["segmenter/warm_up", "segmenter/correction", "segmenter/a_last"]


def test_losses_and_measures_are_drawn_apart():
    history = [{"loss": 0.5, "held_out_loss": 0.6, "accuracy": 0.7}, {"loss": 0.4, "accuracy": 0.8}]
    assert len(charts.curves(history)) == 2
    assert len(charts.curves([{"loss": 0.5}])) == 1
    assert charts.curves([]) == []
    assert charts.curves(history)[0].startswith(b"<?xml")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (numbers.area(262_144), "0.262 km²"),
        (numbers.area(12_345_678), "12.3 km²"),
        (numbers.area(4_310), "4,310 m²"),
        (numbers.area(None), "–"),
        (numbers.percent(0.03124), "3.1 %"),
        (numbers.percent(0.0001234), "0.012 %"),
        (numbers.percent(0), "0 %"),
        (numbers.percent(1), "100 %"),
        (numbers.count(1024), "1,024"),
        (numbers.count(4_194_304), "4.19 million"),
        (numbers.duration(4.24), "4.2 s"),
        (numbers.duration(750), "12 min 30 s"),
        (numbers.duration(7500), "2 h 05 min"),
        (numbers.duration(3599.9), "59 min 59 s"),
        (numbers.measure_text({"value": 0.7, "low": 0.6, "high": 0.8}), "0.700 (0.600–0.800)"),
        (numbers.measure_text({"value": 0.7, "low": None, "high": None}), "0.700"),
        (numbers.measure_text({"value": None, "low": None, "high": None}), "–"),
        (numbers.scale_bar(4096), ("1 km", pytest.approx(1000 / 4096))),
        (numbers.scale_bar(900), ("200 m", pytest.approx(200 / 900))),
        (numbers.scale_bar(3), ("0.5 m", pytest.approx(0.5 / 3))),
    ],
)
def test_numbers_are_written_for_people(said, expected):
    assert said == expected


@pytest.mark.parametrize("earlier", [False, True])
def test_shares_are_of_area_where_tiles_differ_in_resolution(earlier):
    """A tenth of the ground in 1 m pixels, the rest in 10 m pixels of another zone and hemisphere."""
    coarse = Grid("EPSG:32633", (10.0, 10.0), (0.0, 0.0)), Window(50_000, -500_000, 90, 10)
    fine = Grid("EPSG:32722", (1.0, 1.0), (0.0, 0.0)), Window(500_000, -7_000_000, 100, 100)
    tiles = []
    for (grid, window), counts in ((coarse, {"0": 900}), (fine, {"0": 1000, "1": 9000})):
        areas = {} if earlier else {"areas": {v: n * grid.resolution[0] ** 2 for v, n in counts.items()}}
        tile = Tile(grid.name, grid, window)
        tiles.append(MappedTile(tile, Record(tile.id, "done", facts={"counts": counts, **areas}), "", ()))
    background, cover = report.class_shares(tiles, GPC)
    assert cover["share"] == pytest.approx(0.09, rel=1e-3)
    assert background["share"] == pytest.approx(0.91, rel=1e-3)
    assert cover["area_m2"] == pytest.approx(9000, rel=1e-2)
    assert (background["pixels"], cover["pixels"]) == (1900, 9000)


def test_shares_of_images_without_georeference_are_of_pixels():
    tile = Tile("px", Grid(None, (1.0, 1.0), (0.0, 0.0), "a"), Window(0, 0, 10, 10))
    record = Record("px", "done", facts={"counts": {"0": 75, "1": 25}})
    _, cover = report.class_shares([MappedTile(tile, record, "", ())], GPC)
    assert (cover["share"], cover["area_m2"]) == (0.25, None)
