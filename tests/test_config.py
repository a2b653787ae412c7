import re
from typing import Literal

import pytest
import yaml
from pydantic import model_validator

from rayseg.config import Config, commented, complete, load, load_values, ray_address, read_values
from rayseg.errors import ConfigError
from rayseg.pipelines import PIPELINES, pipeline_of
from rayseg.pipelines.al_s4gan import pipeline


class Inner(Config):
    patch: int = 512
    name: str | None = None


class Outer(Config):
    inner: Inner = Inner()
    other: Inner | None = None
    rates: tuple[float, ...] = (1.0,)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner: {patch: 64, name: x}\nrates: [0.1, 0.2]\n")
    resolved = load(Outer, str(path), ["inner.patch=32", "other.patch=8"])
    assert resolved == Outer(inner=Inner(patch=32, name="x"), other=Inner(patch=8), rates=(0.1, 0.2))


class Grouped(Config):
    """A group with defaults of its own, and a group inside it."""

    outer: Outer = Outer(inner=Inner(patch=7, name="x"), rates=(2.0,))


def test_a_group_that_is_given_in_part_keeps_its_other_defaults():
    assert load(Grouped, None, ["outer.inner.patch=3"]).outer == Outer(inner=Inner(patch=3, name="x"), rates=(2.0,))
    assert load(Grouped, None, ["outer.rates=[5.0]"]).outer == Outer(inner=Inner(patch=7, name="x"), rates=(5.0,))
    assert load(Grouped, None, ["outer.other.name=y"]).outer.other == Inner(name="y")
    assert load(Outer, None, ["inner.name=y"]).inner == Inner(name="y")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_key_set_to_its_own_default_changes_nothing_else(pipeline):
    kind = pipeline_of(pipeline).Config
    whole = kind()
    assert len(list(leaves(whole))) > 5
    for keys, value in leaves(whole):
        given = value
        for key in reversed(keys):
            given = {key: given}
        assert load_values(kind, given) == whole, keys


def leaves(group, above=()):
    for name, value in group:
        if isinstance(value, Config) and not value.one_value:
            yield from leaves(value, (*above, name))
        elif not isinstance(value, Config):
            yield (*above, name), value


class Pair(Config):
    one_value = True

    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _in_order(self):
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class Paired(Config):
    pair: Pair = Pair(low=5)


def test_a_group_that_is_one_value_is_given_as_a_whole():
    assert load(Paired, None, ["pair.high=7"]).pair == Pair(low=0, high=7)
    with pytest.raises(ConfigError, match="give the whole class table"):
        load(pipeline.Config, None, ["classes.ignore=[]"])
    own = "classes: {classes: [{name: ground, color: '#826446'}]}"
    assert load(pipeline.Config, None, [own.replace(": ", "=", 1)]).table.threshold is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["inner.pach=3"], "config key inner.pach is unknown, expected one of: name, patch"),
        (["other.pach=3"], "config key other.pach is unknown, expected one of: name, patch"),
        (["nope=3"], "config key nope is unknown, expected one of: inner, other, rates"),
        (["inner.patch=many"], "config key inner.patch = 'many'"),
        (["inner"], "not of the form key=value"),
        (["rates=1", "rates.x=2"], "rates is a value, not a group"),
        (["rates=1"], "config key rates = 1: input should be a list"),
        (["inner=7"], "config key inner = 7: input should be keys and values"),
        ([f"wrong{number}=1" for number in range(7)], "; and 2 more"),
    ],
)
def test_invalid_settings_are_named_with_their_path(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load(Outer, None, overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pipeline", "override", "said"),
    [
        ("gpc", "workers=-1", "config key workers = -1: input should be greater than or equal to 0"),
        ("gpc", "cues.scales=[0]", "config key cues.scales.0 = 0: input should be greater than 0"),
        ("gpc", "cues.scales=[]", "config key cues.scales = []"),
        ("gpc", "classifier.rates=[]", "config key classifier.rates: [] is not a schedule"),
        ("gpc", "classifier.rates=[[8, 0.1], [4, 0.2]]", "rising epochs"),
        ("gpc", "classifier.augment.saturation=[2, 1]", "[2, 1] is not a range; give two numbers >= 0"),
        ("gpc", "scaling={mean: [], std: []}", "mean and std are empty"),
        ("landcover", "scaling={mean: [1, 1, 1], std: [1, 1, 1], scale: -1}", "scale -1 and std"),
        ("landcover", "scaling.scale=.inf", "config key scaling.scale = inf: input should be a finite number"),
        ("landcover", "scaling.std=[.nan, 1, 1]", "config key scaling.std.0 = nan: input should be a finite number"),
        ("landcover", "segmenter.loss={weights: [1, 2], balance: 0.5}", "weights [1.0, 2.0] and balance 0.5 are both"),
        ("landcover", "segmenter.loss.weights=[0, 0]", "weights are all 0"),
        ("landcover", "bands=[red, red, blue]", "red, red, blue: a name occurs twice"),
        ("superpixel", "bands=[red, red]", "red, red: a name occurs twice"),
        ("landcover", "segmenter.augment.scale=[-1, 1]", "[-1, 1] is not a range"),
        ("landcover", "segmenter.augment.scale=[0, 1]", "[0, 1] begins at 0; give a number above 0"),
        ("landcover", "segmenter.augment.gamma=[0, 0]", "[0, 0] begins at 0"),
    ],
)
def test_settings_that_only_a_run_could_fail_on_are_refused_when_they_are_read(pipeline, override, said):
    module = pipeline_of(pipeline)
    with pytest.raises(ConfigError) as caught:
        load(module.Config, None, [override])
    assert said in str(caught.value)


def test_groups_that_were_merged_before_they_were_made_have_no_key_twice(tmp_path):
    text = "b: &b {name: a}\nouter: {one: &one {<<: *b, name: x}}\ntwo: {<<: *one}\n"
    (tmp_path / "c.yaml").write_text(text)
    assert read_values(str(tmp_path / "c.yaml"))["two"] == {"name": "x"}


def test_groups_of_a_file_can_be_merged(tmp_path):
    (tmp_path / "c.yaml").write_text("inner: &one {name: a, patch: 3}\nother: {<<: *one, patch: 4}\n")
    values = read_values(str(tmp_path / "c.yaml"))
    assert values == {"inner": {"name": "a", "patch": 3}, "other": {"name": "a", "patch": 4}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "expected keys and values"),
        ("a: [", "is not YAML"),
        ("patch: 1\nstride: 2\npatch: 3\n", "key patch is given twice"),
        ("inner: {name: a, name: b}\n", "key name is given twice"),
        ("inner: !!map text\n", "is not YAML"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(Outer, str(path))


class Mapped(Config):
    of: dict[str, int]


def test_a_value_of_no_allowed_type_is_refused_once():
    """In one clause, without pydantic's names of the types."""

    class Scaled(Config):
        scaling: Literal["auto", "range"] | Pair = "auto"

    for given, said in (
        ("scaling.low=x", "config key scaling.low = 'x': input should be a valid integer"),
        ("scaling.X=1", "config key scaling.X is unknown, expected one of: high, low"),
        (
            "scaling=robustly",
            "config key scaling = 'robustly': input should be 'auto' or 'range' or keys and values",
        ),
        ("Scaling=1", "config key Scaling is unknown, expected one of: scaling"),
        ("scaling={low: 3, high: 1}", "config key scaling: low must be below high"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}[^;]*$"):
            load(Scaled, None, [given])
    with pytest.raises(ConfigError, match=r"config key of\.Water = 'x'.*; config key of\.Land = 'y'"):
        load_values(Mapped, {"of": {"Water": "x", "Land": "y"}})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Outer, str(tmp_path / "none.yaml"))


def test_ray_is_joined_only_at_a_given_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(None) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "ray://a:1")
    assert ray_address(None) == "ray://a:1"
    assert ray_address("b:2") == "b:2"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_configuration_is_shown_with_a_comment_for_each_key_and_reads_back(name):
    resolved = load(pipeline_of(name).Config, None, {"gpc": ["chips.source=#chips"]}.get(name, []))
    text = commented(resolved)
    assert yaml.safe_load(text) == complete(resolved)
    assert max(map(len, text.splitlines())) < 100
    lines = text.splitlines()
    at = lines.index("  tile: 2048")
    assert lines[at - 1] == "  # Side of a tile in px."
