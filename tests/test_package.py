"""The wheel: everything that README names works from it, away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the content of the wheel, and a working folder that is empty."""
    hatchling = pytest.importorskip("hatchling.build")
    folder, here = tmp_path_factory.mktemp("wheel"), Path.cwd()
    os.chdir(ROOT)
    try:
        name = hatchling.build_wheel(str(folder))
    finally:
        os.chdir(here)
    with zipfile.ZipFile(folder / name) as wheel:
        wheel.extractall(folder / "site")
    (folder / "empty").mkdir()
    return folder


def command(installed, *words):
    """The command line of the wheel, in an empty folder."""
    return python(installed, "-m", "rayseg", *words)


def python(installed, *words):
    environment = os.environ | {"PYTHONPATH": str(installed / "site"), "RAYSEG_CACHE": str(installed / "cache")}
    options = {"cwd": installed / "empty", "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], check=False, **options)


def test_configurations_class_tables_and_regions_travel_inside(installed):
    found = python(installed, "-c", "import rayseg; print(rayseg.__file__)")
    assert found.stdout.strip() == str(installed / "site/rayseg/__init__.py")
    listed = command(installed, "config", "list")
    names = {f"{path.parent.name}/{path.stem}" for path in ROOT.glob("configs/*/*.yaml")}
    expected = {name for name in names if not name.startswith("classes/")}
    assert {line.split()[0] for line in listed.stdout.splitlines()} == expected
    assert "daxing" in command(installed, "regions").stdout


BOTH = """
from typer.testing import CliRunner
from rayseg.cli import app
for words in (
    "config show landcover --config landcover/smoke --set classes=dubai",
    "config validate gpc --config gpc/smok",
):
    found = CliRunner().invoke(app, words.split())
    print(found.exit_code, found.stdout, found.stderr, sep="~", end="~")
"""


def test_names_of_configurations_and_classes_are_read(installed):
    code, shown, _, wrong, _, said, _ = python(installed, "-c", BOTH).stdout.split("~")
    assert code == "0"
    assert "name: vegetation" in shown
    assert (wrong, said.count("\n")) == ("2", 1)
    assert "config file gpc/smok cannot be read" in said
    assert "gpc/smoke" in said


@pytest.mark.more  # the demo is drawn in seconds
def test_the_demo_is_drawn_and_planned(installed):
    found = command(installed, "plan", "pipeline", "superpixel", "--region", "demo", "--config", "superpixel/smoke")
    assert found.returncode == 0, found.stderr
    assert "2 items" in found.stdout
