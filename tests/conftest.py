"""Fixtures that make the tests' own world."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rayseg.config import quiet_ray
from rayseg.engine import tuning

tuning.prepare()  # as commands begin

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes, run each file in one of them, and all files that use `local_ray` in the same one.

    So a module's fixtures are made once and there is one Ray, whatever the number of processes.
    """
    from xdist.scheduler import LoadFileScheduling

    # Not --dist loadgroup: xdist 3.8 writes the group into `_nodeid`, which pytest 9.2 does not read.
    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if "local_ray" in _text(config.rootpath / file) else file

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


@cache
def _text(path: Path) -> str:
    return path.read_text()


@pytest.fixture(scope="session", autouse=True)
def quick_runs() -> Iterator[None]:
    """Runs in this process, of which tests make hundreds, write without fsync and have certificates of few places.

    No test cuts the power: test_store.py counts the calls. steps/test_certificate.py maps all places.
    """
    from rayseg.steps import certificate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(certificate, "PLACES", 8)
        patch.setattr(certificate, "MOST", 1)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped elsewhere."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared data beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a bundle that maps two classes and has learnt nothing; tests only read it."""
    from small_world import segmenter

    return segmenter(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def demo_region(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The catalogue of a demo of two scenes of 512 px and 8 + 8 chips; tests only read it."""
    from rayseg.demo import make

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSEG_CACHE", str(tmp_path_factory.mktemp("demo")))
        return make.ensure(size=512, chips=(8, 8))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was killed, and what came of it."""
    from mortal import TABLE

    for row in TABLE and [("killed", "happened", "computed again"), *TABLE]:
        terminalreporter.write_line(f"| {' | '.join(map(str, row))} |")


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private Ray with 8 logical CPUs and a logical GPU, once for all tests that need one."""
    import ray

    # Ray's workers import this checkout and the stages that tests define.
    folders = [TESTS.parent, TESTS, *sorted({path.parent for path in TESTS.rglob("test_*.py")})]
    os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "RAY_AUTH_MODE": "disabled"}
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    os.environ |= {"RAY_worker_niceness": "0"}  # else a busy machine starves the workers
    quiet_ray()
    folder = tempfile.mkdtemp(prefix="rs-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local",
            num_cpus=8,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 << 20,
            _temp_dir=folder,
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
