"""Keys of all steps of all pipelines are what they were when runs were first kept, wherever their functions stand now.

A key that changes makes every run that was begun before compute its steps again. `polygons` and `report` changed once,
when polygons were generalized: runs that were begun before keep their maps and draw their polygons again.
"""

from dataclasses import replace

import pytest

from rayseg.config import load_values
from rayseg.engine import run as runs
from rayseg.engine.run import Engine, Run, Step
from rayseg.geo.region import Region
from rayseg.pipelines import pipeline_of

CASES = {
    "gpc": {},
    "gpc, concept": {"cues": {"method": "concept"}},
    "agri": {},
    "agri, enlarged": {"enlarge": {}},
    "superpixel": {"network": {"network": "deepnet", "epochs": 4}, "superpixels": {"scale": 32.0}},
    "superpixel, segments": {},
    "landcover": {},
    "al-s4gan": {},
    "al-s4gan, frozen": {"active": {"frozen": True}},
    "al-s4gan, no segmenter": {"segmenter": None},
    "predict": {"model": "/m"},
}
KEYS = {
    "gpc": {
        "chips": "c9190c6779276488",
        "classifier": "41bbe135714160ed",
        "cues": "89b4f8db213e456d",
        "segmenter": "7359af4ff32ed800",
        "predict": "79a84d690f0c5284",
        "generalize": "98976e494ec8ca03",
        "polygons": "d5262133b99cf653",
        "evaluate": "729b9ba67967d32f",
        "publish": "77c853f2d3a3733c",
        "qgis": "05e08dd45f89f096",
        "pictures": "d4f16e7b1f9d39c5",
        "certificate": "c717000f79e98e78",
        "report": "9f714709737ff71e",
    },
    "gpc, concept": {
        "chips": "c9190c6779276488",
        "classifier": "b8d468efb37bced3",
        "densities": "d9021dbeccc97c60",
        "cues": "aac789ca74942dd5",
        "segmenter": "bae644d707f58757",
        "predict": "de8eed3f0f289bb2",
        "generalize": "5803cf6b1b4f92d8",
        "polygons": "0930ad3ab69c418a",
        "evaluate": "6d4fc4696d371644",
        "publish": "35b2b2c22f5e61d8",
        "qgis": "9458efb1f4af9c27",
        "pictures": "59b64bfcc9eeebfa",
        "certificate": "9e3997d68ccd5bb4",
        "report": "490ab7fba49559a3",
    },
    "agri": {
        "classifier": "9a058e41351cf00a",
        "enlarge": "797f3234c51fe6d2",
        "propose": "6e94ff0600033c8f",
        "join": "6cbc3f3afd903ae3",
        "classify": "1a59e9fbbd8a21b9",
        "predict": "f885cbd5fa7de1f5",
        "plots": "8e2b31d4ead963ff",
        "publish": "91ee75ed726a59ba",
        "qgis": "2596fbad76a174a2",
        "report": "8dddcab9dc49026b",
    },
    "agri, enlarged": {
        "classifier": "983a1b0d1a37e7ec",
        "enlarge": "9e22a0c68470f4ac",
        "propose": "96927d441787d175",
        "join": "3dbeaf35ab781532",
        "classify": "85ed0be060f443a5",
        "predict": "50645fcd89d37200",
        "plots": "e467f2cdc46a8a3e",
        "publish": "9dbe0e4074977c20",
        "qgis": "e38bb399708755e3",
        "report": "b2ab13e07b9818ee",
    },
    "superpixel": {
        "scenes": "95a04909165a3057",
        "superpixels": "731c90428d4e40aa",
        "networks": "e3afd6075a88f490",
        "predict": "87caaf7d35867eb2",
        "generalize": "8b63eef18623b099",
        "polygons": "a2d9a05d9a936ed5",
        "evaluate": "0c88bcfe8c78dbde",
        "publish": "ca2c50ff7204ae21",
        "qgis": "bac93a160c65ec99",
        "pictures": "a5f0ddd0c5065975",
        "report": "adbc23d718cef619",
    },
    "superpixel, segments": {
        "scenes": "d607ebc9f6801228",
        "superpixels": "e0c431bb5981c17a",
        "networks": "8249423ab9c88984",
        "predict": "4a0c7eda8671da7f",
        "generalize": "1a538be19861d323",
        "polygons": "a9ae2dcb2609933a",
        "evaluate": "3ac8abf23f10cd04",
        "publish": "604ce3240479df4d",
        "qgis": "1335b0378f5d797a",
        "pictures": "1b9f985c3f17b8be",
        "report": "06d5b69029472336",
    },
    "landcover": {
        "scenes": "fbc7ac4b67e12f1e",
        "segmenter": "c15a07071bd7202f",
        "validation": "e26706c91fd33295",
        "baseline": "6afde0d3f5aa2545",
        "predict": "4e947194daa1b049",
        "generalize": "bc55f526a0c9a53c",
        "polygons": "568021da9199faf5",
        "evaluate": "9e2c2e720bdf998a",
        "publish": "1ef32beb2f3ddab6",
        "qgis": "cc0b93fa4420dde7",
        "certificate": "ca57964be62f4923",
        "report": "40b87c1c414ca8d8",
    },
    "al-s4gan": {
        "pool": "d25662953c7bf4a5",
        "round-0": "eab25307ac876037",
        "round-1": "0987b1b3e88396f1",
        "round-2": "a4e3459ce99dafb5",
        "segmenter": "739a665bedfa6e7b",
        "measure": "be652a38502584c0",
        "baseline": "8909dd87cf898ecb",
        "predict": "cad847d22409c605",
        "generalize": "4152f39400fe9bfa",
        "polygons": "8d977cd7b7ee4116",
        "evaluate": "69f77c9da9e9274c",
        "publish": "ae89d94f0863dd80",
        "qgis": "f9dea2f74fdfc3c1",
        "certificate": "945d9f1dc863415c",
        "report": "bb83de7db4e367ec",
    },
    "al-s4gan, frozen": {
        "pool": "d25662953c7bf4a5",
        "round-0": "cf6f1d46dcb45aeb",
        "features": "a8e469c78d3b4aa2",
        "round-1": "39342dba0ffd9f86",
        "round-2": "753fbf9985d4cc7a",
        "segmenter": "fe9c2307f0e5ba54",
        "measure": "82b0c8333088e456",
        "baseline": "6cd030891131b367",
        "predict": "1ed060a808d81563",
        "generalize": "8b043e81b20518ea",
        "polygons": "3e8c6f1d4e7ea174",
        "evaluate": "a6ad4d8d998615c1",
        "publish": "1a25b5f9df42fac0",
        "qgis": "699fe54e49be4c91",
        "certificate": "0ff85edb0dc0c7d0",
        "report": "3e26679996d4993a",
    },
    "al-s4gan, no segmenter": {
        "pool": "d25662953c7bf4a5",
        "round-0": "eab25307ac876037",
        "round-1": "0987b1b3e88396f1",
        "round-2": "a4e3459ce99dafb5",
        "last": "96530f99dc691969",
        "report": "4d959ac87b3c8205",
    },
    "predict": {
        "model": "cc087439fc0b8f5a",
        "predict": "a6586c3bd7abafe5",
        "generalize": "692a1caa5b84d06b",
        "polygons": "37fa648deff07865",
        "publish": "88b95bf608bb883c",
        "qgis": "2a0c69fdcf4f2153",
        "certificate": "48d5c17cfd534305",
        "report": "568bdeb66229aff4",
    },
}


class Listed(Run):
    """A run whose steps return at once; `keys` collects the keys of each: today's (0), or those of earlier runs (1)."""

    def __init__(self, pipeline, root, which):
        super().__init__(root, {"pipeline": pipeline}, Engine("inline"))
        self.keys, self.which = {}, which

    def step(self, name, function, *arguments, **_):
        """A step with the values that later steps read, without its work."""
        values = {"pool": {"pool": 40, "validation": 4, "test": 0, "classes": ["a", "b"]}}
        if name == "enlarge" and arguments[1] is not None:
            values[name] = {"imagery": f"{self.root}/enlarged/collection.json", "items": 3}
        self.keys[name] = self._keys(function, arguments)[self.which]
        return Step(name, self.root, runs._hash([self.keys[name], {}]), self.engine, values.get(name, {}))


class Retried(Listed):
    """The same after a retry that generalized more tiles."""

    def step(self, name, function, *arguments, **_):
        step = super().step(name, function, *arguments)
        return replace(step, key="other") if name in {"generalize", "classify"} else step


def keys(case, root="/r", *, which=0, kind=Listed):
    name = case.partition(",")[0]
    module, run = pipeline_of(name), kind(name, root, which)
    with pytest.raises(KeyError, match=r"summary|report"):  # the headline of a report that nothing has written
        module.run(load_values(module.Config, CASES[case]), run, Region("r", catalog="/c.json"))
    return run.keys


@pytest.fixture(autouse=True)
def _any_version(monkeypatch):
    monkeypatch.setattr(runs, "__version__", "0")


@pytest.mark.parametrize("case", CASES)
def test_step_keys_are_those_of_runs_that_were_begun_before(case):
    assert keys(case, which=1) == KEYS[case]
    if case != "agri, enlarged":  # its settings hold a path of the run
        assert keys(case) == KEYS[case]


@pytest.mark.parametrize("case", CASES)
def test_no_key_depends_on_where_the_run_is(case):
    assert keys(case) == keys(case, "/elsewhere/run")


@pytest.mark.parametrize("case", [case for case in CASES if "publish" in KEYS[case]])
def test_polygons_that_were_drawn_again_are_written_into_the_qgis_project_again(case):
    before, after = keys(case), keys(case, kind=Retried)
    changed = {name for name in before if after[name] != before[name]}
    assert changed >= {"qgis", "report"}
    assert ("publish" in changed) == case.startswith("agri")  # its items have the classes of plots
