"""Files of a run that are lost or damaged afterwards: named, and computed again by the same command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from mortal import World, records
from small_world import catalogue, rayseg

from rayseg.engine import run as runs
from rayseg.io.cog import read_bands


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("world")
    return World(root, tiny_model, catalogue(root / "imagery", scene={}))


@pytest.fixture
def out(world, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(world.whole, tmp_path / "run")
    return tmp_path / "run"


def path_in(world, out, name):
    """A file of the run; T, U and V stand for three of its tiles."""
    return out / re.sub("[TUV]", lambda letter: world.tiles[2 + "TUV".index(letter[0])], name)


def empty(path):
    path.write_bytes(b"")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def untouched(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("tiles/*/classes.tif")}


FILES = (
    "tiles/T/classes.tif",
    "tiles/U/U.json",
    "steps/predict/ledger/V.1.json",
    "steps/predict/manifest.parquet",
    "steps/publish/done.json",
    "steps/polygons/begun.json",
    "polygons.parquet",
    "items.parquet",
    "report/index.html",
)


@pytest.mark.parametrize("spoil", [empty, halve, Path.unlink], ids=["empty", "half", "gone"])
def test_the_same_command_computes_lost_files_again_and_no_other_tile(world, out, spoil, caplog):
    before = untouched(out)
    for name in FILES:
        spoil(path_in(world, out, name))
    found = rayseg(*world.words(out))
    assert found.exit_code == 0, found.output
    assert world.is_whole(out)
    assert {path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at} == set(world.tiles[2:5])
    for name in FILES[:2]:
        assert f"{path_in(world, Path(), name)}: " in caplog.text
    assert rayseg("verify", out, "--deep").exit_code == 0


def test_a_lost_record_computes_its_tile_again_and_no_other(world, out):
    before, path = untouched(out), path_in(world, out, "steps/predict/ledger/V.1.json")
    path.unlink()
    assert "1 of 9 records are missing" in rayseg("verify", out).stdout
    assert rayseg(*world.words(out)).exit_code == 0
    assert world.is_whole(out)
    assert {path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at} == {world.tiles[4]}


@pytest.mark.parametrize("name", ["steps/predict/ledger/V.1.json", "steps/predict/manifest.parquet"])
def test_a_run_that_lost_a_record_is_not_done(world, out, name):
    halve(path_in(world, out, name))
    found = rayseg("status", out)
    assert found.exit_code == 3
    assert found.stdout.startswith(
        f"{out}: predict, incomplete\n  files were lost or damaged after the run: rayseg ver"
    )


def test_verify_says_what_it_compares(out):
    assert "compared: existence and size (--deep: checksums too)" in rayseg("verify", out).stdout
    assert rayseg("verify", out, "--deep").stdout.endswith("compared: existence, size and checksum\n")
    # earlier versions recorded no files of a row
    for path in (out / "steps/predict/ledger").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    assert "not compared: 9 rows of an earlier version" in rayseg("verify", out, "--deep").stdout


def test_verify_names_lost_files_and_repairs_nothing(world, out):
    paths = {path_in(world, out, name) for name in FILES}
    for path in paths:
        halve(path)
    names = {str(path.relative_to(out)) for path in paths}
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    found = rayseg("verify", out)
    assert found.exit_code == 3
    assert all(f"  {name}: " in found.stdout for name in names)
    assert f"rayseg retry {out}" in found.stderr
    assert json.loads(rayseg("verify", out, "--json").stdout)["damaged"].keys() == names
    assert rayseg("status", out).exit_code == 3
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["tiles/T/scores.tif", "tiles/T/parts.parquet", "polygons.parquet"])
def test_deep_damage_is_found_by_checksums_and_mended_by_retry(world, out, name):
    path = path_in(world, out, name)
    rot(path)
    assert rayseg("verify", out).exit_code == 0
    found = rayseg("verify", out, "--deep")
    assert found.exit_code == 3
    assert f"{path.relative_to(out)}: checksum differs" in found.stdout
    assert f"{path.relative_to(out)}: checksum differs" in rayseg("status", out).stdout
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    assert world.is_whole(out)
    assert rayseg("verify", out, "--deep").exit_code == 0
    assert rayseg("status", out).exit_code == 0


def test_an_empty_run_json_is_rebuilt(world, out):
    before = untouched(out)
    asked = json.loads((out / "run.json").read_text())
    empty(out / "run.json")
    assert rayseg("verify", out).exit_code == 3
    assert '"killed"' in rayseg("status", out, "--json").stdout
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    rebuilt = runs.read(str(out))
    assert [rebuilt[key] for key in ("pipeline", "region", "config", "status")] == [
        asked[key] for key in ("pipeline", "region", "config", "status")
    ]
    assert world.is_whole(out)
    assert untouched(out) == before


def test_an_unfinished_run_computes_lost_tiles_again(world, out):
    """As after a power failure in the middle: a record is there, a raster is not whole."""
    (out / "steps/predict/done.json").unlink()
    halve(path_in(world, out, "tiles/T/classes.tif"))
    for name in ("polygons", "publish", "report"):
        shutil.rmtree(out / "steps" / name)
    assert rayseg(*world.words(out)).exit_code == 0
    assert world.is_whole(out)
    assert records(out)[world.tiles[2]].attempt == 3  # the first was withdrawn by the second
    assert np.array_equal(*(read_bands(path_in(world, r, "tiles/T/classes.tif"))[0] for r in (out, world.whole)))
