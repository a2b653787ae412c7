"""What a report shows of plots is what it is given."""

import numpy as np
import pytest

from rayseg.engine.ledger import Record
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io import cog, pictures
from rayseg.io.maps import MappedTile
from rayseg.io.rasters import source_of_file
from rayseg.stages.propose import UNNUMBERED
from rayseg.steps import charts
from rayseg.vision.color import ClassTable

GRID = Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0))
TABLE = ClassTable(((0, "background", (0, 0, 0)), (1, "plot", (230, 159, 0))))


@pytest.fixture
def drawn(monkeypatch):
    """What is handed over to be encoded: figures, and pictures (height, width, 3)."""
    kept = []
    monkeypatch.setattr(charts, "_svg", lambda axes: kept.append(axes) or b"svg")
    monkeypatch.setattr(pictures, "encoded", lambda image, kind: kept.append(image) or kind.encode())
    return kept


def test_bars_are_the_mean_shares_by_pixels_and_a_patch_without_further_rounds_keeps_its_share(drawn):
    charts.coverage_chart([(100, [0.5]), (300, [0.1, 0.9]), (700, [])])
    axes = drawn[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.2, 0.8])
    assert [text.get_text() for text in axes.texts] == ["20.0%", "80.0%"]
    assert axes.get_ylim()[0] == 0
    assert charts.coverage_chart([]) == charts.coverage_chart([(9, [])]) == b""


def test_every_plot_is_in_the_histogram_of_sizes_once_in_the_bar_of_its_size(drawn):
    sizes = [50, 50, 51, 400, 9000, 9000, 9000]
    charts.size_chart(sizes)
    axes = drawn[0]
    assert sum(bar.get_height() for bar in axes.patches) == len(sizes)
    for bar in axes.patches:
        left, right = bar.get_x() - 1e-6, bar.get_x() + bar.get_width() - 1e-6
        assert bar.get_height() == sum(left <= size < right for size in sizes)
    assert axes.get_xscale() == "log"
    assert charts.size_chart([]) == b""


def test_charts_are_svg_with_their_figures_in_words():
    chart = charts.coverage_chart([(100, [0.25])])
    assert chart.startswith(b"<?xml")
    assert b"25.0%" in chart


def mapped(folder, name, *, coverage, level):
    """A tile of 20 x 30 px of one grey: two plots side by side, bare ground below, its corner without data."""
    window = Window(0, 0, 30, 20)
    numbers_HW, classes_HW = np.zeros((20, 30), np.uint32), np.zeros((20, 30), np.uint8)
    numbers_HW[:10, :15], numbers_HW[:10, 15:], classes_HW[:10] = 4, 9, 1
    numbers_HW[15:, 25:], classes_HW[15:, 25:] = UNNUMBERED, 255
    (folder / name).mkdir()
    cog.write_image(folder / f"{name}.tif", np.full((3, 20, 30), level, np.uint8), GRID, window, bands=("r", "g", "b"))
    cog.write_classes(folder / name / "classes.tif", classes_HW, GRID, window, TABLE)
    cog.write_image(folder / name / "plots.tif", numbers_HW[None], GRID, window, bands=("plot",), nodata=UNNUMBERED)
    source = source_of_file(str(folder / f"{name}.tif"), name)
    record = Record(name, "done", facts={"coverage": coverage})
    return MappedTile(Tile(name, GRID, window), record, str(folder / name / "classes.tif"), (source,))


def test_the_fullest_tiles_are_shown_with_yellow_outlines_and_bare_ground_in_red(drawn, tmp_path):
    tiles = [mapped(tmp_path, f"t{k}", coverage=k / 10, level=40 * k) for k in (1, 4, 2, 3)]
    assert pictures.plots_over_imagery(tiles) == b"webp"
    [picture_HWC] = drawn
    assert picture_HWC.shape == (20, 3 * 38, 3)
    cells = [picture_HWC[:, left : left + 30] for left in (0, 38, 76)]
    levels = [int(cell_HWC[4, 4, 0]) for cell_HWC in cells]
    assert levels == [160, 120, 80]  # the three with the largest share under plots, the largest first
    for cell_HWC, level in zip(cells, levels, strict=True):
        grey = np.full(3, level)
        assert (cell_HWC[2:8, 2:13] == grey).all()  # inside a plot the imagery as it is
        assert (cell_HWC[4, 14:16] == (255, 255, 0)).all()  # between the plots
        assert (cell_HWC[9, 2:13] == (255, 255, 0)).all()
        assert (cell_HWC[16, 5] == grey // 2 + np.array([100, 15, 15])).all()
        assert (cell_HWC[18, 28] == grey).all()  # without data, so not bare
    assert pictures.plots_over_imagery([]) == b""
