"""Killed commands: the same command again gives the result of an undisturbed one, and no other files."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import geopandas
import pytest
from mortal import HERE, TABLE, Command, Nodes, World, names, records, settled, until
from small_world import SMALL_GPC, catalogue, damage, rayseg, refused

from rayseg.models import bundle

ENGINES = ["inline", pytest.param("ray", marks=pytest.mark.ray)]
SOON = ("--set", "map.stall_seconds=60")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("world")
    return World(root, tiny_model, catalogue(root / "imagery", scene={}))


@pytest.fixture
def flag(tmp_path):
    """The cause of a fault; the fault ends when the file is deleted."""
    (tmp_path / "flag").touch()
    return tmp_path / "flag"


def again(world, out, *more, engine="inline"):
    found = rayseg(*world.words(out, *more, engine=engine))
    assert found.exit_code == 0, found.output


def paused(flag):
    """The process id of a stage that waits at `flag`, once it does."""
    return int(until(lambda: Path(f"{flag}.pid").exists() and Path(f"{flag}.pid").read_text()))


def test_a_killed_driver_resumes_where_it_stopped(world, tmp_path):
    out = tmp_path / "run"
    with Command(*world.words(out)) as command:
        until(settled(out, 3))
        command.kill()
        assert command.leaves_nothing()
    done = {path: path.stat().st_mtime_ns for path in (out / "steps/predict/ledger").glob("[!.]*")}
    assert rayseg("status", out, "--json").stdout.count('"killed"') == 1
    assert 3 <= len(done) < len(world.tiles) or (out / "steps/predict/done.json").exists()
    again(world, out)
    assert world.is_whole(out)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_half_written_files_of_a_killed_driver_are_removed(world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(world.whole, out)
    for folder in (out, out / "tiles" / world.tiles[0], out / "steps/predict/ledger"):
        (folder / ".classes.tif.01234567.part").write_bytes(b"half")
    again(world, tmp_path / "run")
    assert world.is_whole(out)


@pytest.mark.more  # engine/test_flow.py: without room the run ends and no row is failed
def test_a_full_disk_ends_the_run_with_a_remedy_and_costs_no_tile(world, tmp_path):
    """The limit on file sizes stands for the disk: it needs no mount."""
    out = tmp_path / "run"
    largest = max(path.stat().st_size for path in world.whole.glob("tiles/*/*"))
    assert (world.whole / "steps/predict/manifest.parquet").stat().st_size < largest
    with Command(*world.words(out), limit=largest - 1) as it:
        assert it.ended() == 3, it.said()
        assert "free some space, then run the same command to resume" in it.said().splitlines()[-1]
        assert it.leaves_nothing()
    assert not list(out.rglob("*.part"))
    assert {record.status for record in records(out).values()} <= {"done", "empty"}
    again(world, out)
    assert world.is_whole(out)


@pytest.mark.more  # engine/test_run.py: two processes cannot work on one run
def test_of_two_drivers_one_works_and_the_other_says_so(world, tmp_path, flag):
    out = tmp_path / "run"
    with Command(*world.words(out), faults=[f"ReadTile:{world.tiles[4]}:pause:{flag}"]) as first:
        paused(flag)
        assert "running" in rayseg("status", out).stdout
        second = rayseg(*world.words(out))
        assert second.exit_code == 2
        assert "another process is working on" in second.stderr
        flag.unlink()
        assert first.ended() == 0, first.said()
    assert world.is_whole(out)


@pytest.mark.more  # inline: a killed driver; engine/test_cluster.py: Ray's folder; train/test_workers.py: Ray itself
@pytest.mark.ray
def test_ray_ends_with_its_driver_and_leaves_no_folder(world, tmp_path, flag):
    out = tmp_path / "run"
    fault = f"Predict:{world.tiles[4]}:pause:{flag}"
    with Command(*world.words(out, engine="ray"), faults=[fault]) as command:
        worker = paused(flag)
        assert {command.process.pid, worker} < command.left().keys()
        assert list(command.scratch.glob("rs-*"))
        command.kill()
        assert command.leaves_nothing()
    again(world, out)
    assert world.is_whole(out)


@pytest.mark.more  # test_superpixel.py moves a run in make test; here: with relative paths
def test_a_moved_run_resumes(world, tmp_path, monkeypatch):
    imagery = catalogue(tmp_path / "imagery", left={"seed": 1}, right={"col": 2048, "seed": 3})
    sound = damage(tmp_path / "imagery/right.tif")
    monkeypatch.chdir(tmp_path)
    found = rayseg(
        "predict", os.path.relpath(world.model), "imagery/cat/catalog.json", "--out", "a", "--engine", "inline"
    )
    assert found.exit_code == 3, found.output
    assert Path(imagery).is_absolute()
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "imagery/right.tif").write_bytes(sound)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert rayseg("retry", "../b", "--engine", "inline").exit_code == 0
    assert rayseg("status", tmp_path / "b").exit_code == 0
    assert not (tmp_path / "a").exists()


# -- clusters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patched:  # workers import the stages of `faulty`
        patched.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        patched.setenv("RAY_AUTH_MODE", "disabled")
        patched.setenv("OMP_NUM_THREADS", "1")
        cluster = Nodes()
        yield cluster
        cluster.end()


def _process(nodes, command, worker):
    os.kill(worker, signal.SIGKILL)


def _node(nodes, command, worker):
    nodes.kill(nodes.of(worker))


def _drained(nodes, command, worker):
    nodes.drain(nodes.of(worker), 10)


def _cut(nodes, command, worker):
    nodes.pause(nodes.of(worker), 30)


def _one_back(nodes, command, worker):
    for node in nodes.all():
        nodes.kill(node)
    nodes.grow(1)


def _none_back(nodes, command, worker):
    for node in nodes.all():
        nodes.kill(node)


def _driver(nodes, command, worker):
    command.kill()


def _second(nodes, command, worker):
    """No process is killed, but the same command runs once more."""
    words = command.process.args[2:]
    said = refused(2, *words)
    assert "another process is working on" in said


DEATHS = {
    "a node of two, with the actor": ("Predict", _node, [0]),
    "a node of two, with the actor, after a notice of 10 s": ("Predict", _drained, [0]),
    "a node of two, with the actor, answers nothing for 30 s": ("Predict", _cut, [0]),
    "both nodes, one comes back": ("Predict", _one_back, [0]),
    "the actor": ("Predict", _process, [0]),
    "both nodes, none comes back": ("Predict", _none_back, [3, 0]),
    "the driver": ("Predict", _driver, [-signal.SIGKILL, 0]),
    "nothing; a second driver": ("Predict", _second, [0]),
    "a worker that reads": ("ReadTile", _process, [0]),
    "a worker that writes": ("WriteTile", _process, [0]),
    "a node of two, which reads": ("ReadTile", _node, [0]),
}
"""What is killed while which stage works, and the exit codes of the command, given until it ends well."""


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.parametrize("killed", DEATHS)
def test_on_a_cluster_that_loses_what_it_has_the_result_is_the_same(world, nodes, tmp_path, flag, killed):
    stage, kill, codes = DEATHS[killed]
    out, seen, happened = tmp_path / "run", Counter(), []
    faults, hang = [f"{stage}:{world.tiles[5]}:pause:{flag}"], 30 if 3 in codes else 60
    words = world.words(out, "--address", nodes.address, "--set", f"map.stall_seconds={hang}", engine="ray")
    for _ in codes:
        nodes.grow(2)
        with Command(*words, faults=faults) as command:
            if flag.exists():
                worker = paused(flag)
                known = records(out)
                begun = command.met("ReadTile").keys() - known.keys()
                kill(nodes, command, worker)
                flag.unlink()
            happened.append(command.ended())
            seen.update(command.met("Predict"))
            said = command.said().splitlines()
            assert happened[-1] != 3 or "same command" in said[-1]
    assert happened == codes, said
    assert world.is_whole(out)
    again = {tile: count - 1 for tile, count in seen.items() if count > 1}
    TABLE.append(
        (killed, f"exit {', then '.join(map(str, codes))}", f"{sum(again.values())} of {len(begun)} under way")
    )
    assert again.keys() <= begun
    assert sum(again.values()) <= len(begun)


@pytest.mark.chaos
@pytest.mark.parametrize("jump", ["back", "ahead"])
def test_a_clock_that_jumps_a_day_changes_nothing(world, tmp_path, flag, jump):
    out = tmp_path / "run"
    with Command(*world.words(out), faults=[f"Predict:{world.tiles[4]}:{jump}:{flag}"]) as command:
        assert command.ended() == 0, command.said()
        assert max(command.met("Predict").values()) == 1
    assert world.is_whole(out)
    assert rayseg("status", out).exit_code == 0
    TABLE.append((f"nothing; the clock jumps a day {jump}", "exit 0", "0"))


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("engine", ENGINES)
def test_kills_at_random_moments_change_nothing(world, tmp_path, engine, seed):
    """Each time a little later, until a command gets through."""
    out, draw, kills = tmp_path / "run", random.Random(seed), 0
    while True:
        with Command(*world.words(out, engine=engine)) as command:
            try:
                command.process.wait(draw.uniform(1, 8) * 2**kills)
            except subprocess.TimeoutExpired:
                command.kill()
                kills += 1
            assert command.leaves_nothing()
            if command.process.returncode == 0:
                break
            assert command.process.returncode == -signal.SIGKILL, command.said()
    print(f"{engine}, seed {seed}: {kills} kills")
    assert world.is_whole(out)


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["ReadTile", "Predict", "WriteTile"])
def test_a_worker_that_is_killed_costs_nothing(world, tmp_path, flag, stage):
    """Predict lives in an actor, the others in tasks."""
    out = tmp_path / "run"
    fault = f"{stage}:{world.tiles[3]}:pause:{flag}"
    with Command(*world.words(out, engine="ray"), faults=[fault]) as command:
        worker = paused(flag)
        assert worker != command.process.pid
        flag.unlink()
        os.kill(worker, signal.SIGKILL)
        assert command.ended() == 0, command.said()
        assert command.leaves_nothing()
    assert world.is_whole(out)


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["ReadTile", "Predict", "WriteTile"])
def test_tiles_that_always_kill_their_process_are_named_and_mended(world, tmp_path, flag, stage):
    out, deadly = tmp_path / "run", [world.tiles[1], world.tiles[6]]
    with Command(*world.words(out, engine="ray"), faults=[f"{stage}:{tile}:kill:{flag}" for tile in deadly]) as command:
        assert command.ended() == 3, command.said()
        assert all(tile in command.said().splitlines()[-1] for tile in deadly)
        assert command.leaves_nothing()
    assert {tile: record.status for tile, record in records(out).items() if record.status not in {"done", "empty"}} == (
        dict.fromkeys(deadly, "quarantined")
    )
    flag.unlink()
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    assert world.is_whole(out)


@pytest.mark.chaos
def test_inline_a_tile_that_kills_the_command_is_named_by_the_next_one(world, tmp_path, flag):
    """There the command itself dies; given again, it tries the tiles that were under way in another process."""
    out, deadly = tmp_path / "run", world.tiles[4]
    codes = []
    for _ in range(2):
        with Command(*world.words(out), faults=[f"Predict:{deadly}:kill:{flag}"]) as command:
            codes.append(command.ended())
            assert command.leaves_nothing()
            said = command.said().splitlines()
    assert codes == [-signal.SIGKILL, 3]
    assert said[-1].startswith(f"rayseg: 1 tile failed: predict {deadly} (its process died twice")
    flag.unlink()
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    assert world.is_whole(out)


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["ReadTile", "Predict", "WriteTile"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tile_that_hangs_is_named_and_mended(world, tmp_path, flag, stage, engine):
    out, tile = tmp_path / "run", world.tiles[3]
    words = world.words(out, *SOON, engine=engine)
    with Command(*words, faults=[f"{stage}:{tile}:hang:{flag}"]) as command:
        assert command.ended() == 3, command.said()
        assert f"1 tile failed: predict {tile} ({stage}: no progress for 60 s)" in command.said().splitlines()[-1]
        assert command.leaves_nothing()
    flag.unlink()
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    assert world.is_whole(out)


@pytest.mark.chaos
def test_when_every_tile_hangs_the_run_ends_with_a_remedy(world, tmp_path, flag):
    out = tmp_path / "run"
    with Command(*world.words(out, *SOON), faults=[f"ReadTile:{tile}:hang:{flag}" for tile in world.tiles]) as command:
        assert command.ended() == 3, command.said()
        assert "timed out one after the other" in command.said().splitlines()[-1]
    assert len(records(out)) == 3
    flag.unlink()
    assert rayseg(*world.words(out, *SOON)).exit_code == 3
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    assert world.is_whole(out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 kB; unmounted afterwards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no mount here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.chaos
@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_is_really_full_costs_no_tile(world, small_disk, engine):
    out = small_disk / "run"
    with Command(*world.words(out, engine=engine)) as command:
        assert command.ended() == 3, command.said()
        assert "free some space, then run the same command to resume" in command.said().splitlines()[-1]
        assert command.leaves_nothing()
    assert not list(out.rglob("*.part"))
    assert len(records(out)) < len(world.tiles)
    assert {record.status for record in records(out).values()} <= {"done", "empty"}
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    again(world, out, engine="inline")
    assert world.is_whole(out)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, demo_region):
    """The words of a pipeline with training in it, and the run that nothing disturbed."""
    root = tmp_path_factory.mktemp("gpc")
    (root / "small.yaml").write_text(SMALL_GPC)
    words = ("run", "pipeline", "gpc", "--region", demo_region, "--config", root / "small.yaml")
    assert rayseg(*words, "--engine", "inline", "--out", root / "whole").exit_code == 0
    return words, root / "whole"


def same(out, whole):
    """Whether two runs of the pipeline have the same files, weights, rasters and polygons."""
    assert names(out) == names(whole)
    for name in ("classifier", "warm-up", "segmenter"):
        assert bundle.description(out / "models" / name).sha256 == bundle.description(whole / "models" / name).sha256
    for path in [*whole.glob("tiles/*/*.tif"), *whole.glob("steps/cues/*.tif")]:
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert geopandas.read_parquet(out / "gpc.parquet").equals(geopandas.read_parquet(whole / "gpc.parquet"))
    return True


@pytest.mark.e2e
@pytest.mark.chaos
def test_a_pipeline_that_is_killed_in_every_step_gives_the_same(pipeline, tmp_path):
    words, whole = pipeline
    out, draw, kills = tmp_path / "run", random.Random(1), 0
    for step in ("chips", "classifier", "cues", "segmenter", "segmenter", "predict", "polygons", "report"):
        with Command(*words, "--engine", "inline", "--out", out) as command:
            until(lambda step=step, command=command: _begun(out, step) or command.process.poll() is not None)
            time.sleep(draw.uniform(0, 2))  # the moment is to be a random one
            if command.process.poll() is None:
                command.kill()
                kills += 1
            assert command.leaves_nothing()
    assert kills >= 5
    assert rayseg(*words, "--engine", "inline", "--out", out).exit_code == 0
    assert same(out, whole)


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.chaos
def test_a_pipeline_on_a_cluster_that_loses_a_node_in_every_step_gives_the_same(pipeline, nodes, tmp_path):
    words, whole = pipeline
    out, killed = tmp_path / "run", []
    with Command(*words, "--address", nodes.address, "--out", out) as command:
        for step in ("chips", "cues", "predict"):
            nodes.grow(2)
            until(lambda step=step: _begun(out, step) or command.process.poll() is not None)
            if command.process.poll() is None:
                nodes.kill(nodes.all()[-1])
                killed.append(step)
        assert command.ended() == 0, command.said()
    TABLE.append((f"gpc: a node of two in {', '.join(killed)}", "exit 0", "not counted"))
    assert len(killed) >= 2
    assert same(out, whole)


def _begun(out, step):
    return (out / "steps" / step / "begun.json").exists()
