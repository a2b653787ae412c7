"""Configuration: one frozen pydantic model per pipeline, read from YAML and `--set`, refused with the key's path."""

import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayseg.errors import ConfigError

QUIET_RAY = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": "2",  # a tile too large for the memory would else be tried for ever
}

MOST_TOLD = 5
"""Wrong keys that a refusal names."""


class Config(BaseModel):
    """A frozen part of a configuration; unknown keys are errors.

    Where a group of keys has defaults of its own (`learning: Learning = Learning(batch=4)`), one that is given in part
    keeps the rest of them; not so where its keys make one value, as the classes of a class table do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    one_value: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic gives whatever was given
        if not isinstance(values, dict):
            return values
        return values | _groups_over(((name, field.default) for name, field in cls.model_fields.items()), values)


def _over(default: Config, given: dict[str, Any]) -> dict[str, Any]:
    """What is given over what a default sets; groups inside of it likewise, other values as a whole."""
    return default.model_dump(exclude_unset=True) | given | _groups_over(default, given)


def _groups_over(defaults: Iterable[tuple[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    groups = {name: default for name, default in defaults if isinstance(default, Config) and not default.one_value}
    return {name: _over(group, given[name]) for name, group in groups.items() if isinstance(given.get(name), dict)}


def quiet_ray() -> None:
    """Set, before Ray is started, its environment: no noise, no usage reports, no endless retries."""
    for name, value in QUIET_RAY.items():
        os.environ.setdefault(name, value)


def ray_address(chosen: str | None) -> str:
    """The Ray cluster to join: the one chosen, else RAY_ADDRESS, else "local" for a private one."""
    return chosen or os.environ.get("RAY_ADDRESS") or "local"


def _ordered(given: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= given[0] <= given[1]:
        raise ValueError(f"[{given[0]:g}, {given[1]:g}] is no range; give the smaller number first, none below 0")
    return given


def _above_0(given: tuple[float, float]) -> tuple[float, float]:
    if not given[0]:
        raise ValueError(f"[0, {given[1]:g}] begins at 0; give a number above it")
    return given


def _different(given: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(given)) < len(given):
        raise ValueError(f"{', '.join(given)}: one is named twice; name each once")
    return given


Workers = Annotated[int, Field(ge=0)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""(smallest, largest), from 0."""
Factors = Annotated[Range, AfterValidator(_above_0)]
"""The same, above 0."""
Bands = Annotated[tuple[str, ...], AfterValidator(_different)]
"""Names of bands, in the order a model takes them."""
T = TypeVar("T", bound=Config)


def load(kind: type[T], path: str | None = None, overrides: Sequence[str] = ()) -> T:
    """The configuration `kind`: its defaults, then the YAML file, then `a.b=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or its value not allowed.
    """
    values = read_values(path) if path else {}
    for override in overrides:
        _assign(values, override)
    return load_values(kind, values)


def load_values(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration `kind` from plain values, as `load` refuses them."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(kind, values, error)) from None


def read_values(path: str) -> dict[str, Any]:
    """What a YAML file says.

    Raises:
        ConfigError: it cannot be read, or holds something else than keys and values.
    """
    try:
        values = yaml.load(Path(path).read_text(), EachKeyOnce)
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}; check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} holds a {type(values).__name__}, expected keys and values")
    return values


class EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice in a group, of which YAML's own loader keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - as PyYAML has it
        """A group as it is written, before others are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def _assign(values: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise ConfigError(f"--set {override!r} is not of the form key=value or group.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        values = values.setdefault(parent, {}) if isinstance(child, dict) or child is None else values
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a group of keys")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[last] = text


def _explain(kind: type[Config], values: dict[str, Any], error: ValidationError) -> str:
    """The first few problems, each as one clause with the key's path.

    What fits no alternative of a key is refused by each: those that looked deepest have the word.
    """
    problems: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for found in error.errors():
        problems.setdefault(_path(found["loc"], values, missing=found["type"] == "missing"), []).append(dict(found))
    deepest = [keys for keys in problems if not any(other[: len(keys)] == keys != other for other in problems)]
    said = [_problem(kind, keys, problems[keys]) for keys in deepest[:MOST_TOLD]]
    return "; ".join(said) + (f"; and {len(deepest) - MOST_TOLD} more" if len(deepest) > MOST_TOLD else "")


def _path(loc: Sequence[Any], values: Any, *, missing: bool) -> tuple[Any, ...]:  # noqa: ANN401 - as YAML gives them
    """The keys of a problem's place, without the names of types that pydantic puts between them."""
    path = []
    for part in loc[: len(loc) - missing]:
        with suppress(KeyError, IndexError, TypeError):
            values = values[part]
            path.append(part)
    return (*path, *loc[len(loc) - missing :])


def _problem(kind: type[Config], keys: Sequence[Any], found: Sequence[dict[str, Any]]) -> str:
    """What is wrong with the value of one key, which each of its types may have refused."""
    path, types = ".".join(map(str, keys)), {one["type"]: one for one in found}
    if "extra_forbidden" in types:
        return f"config key {path} is unknown, expected one of: {', '.join(_siblings(kind, keys))}"
    if "missing" in types:
        return f"config key {path} is missing; set it"
    if "value_error" in types:  # of the right type
        said = types["value_error"]["msg"].removeprefix("Value error, ")
        return f"config{f' key {path}' if path else ''}: {said}"
    first, *others = dict.fromkeys(map(_expected, found))
    said = " or ".join([first, *(one.removeprefix("input should be ") for one in others)])
    return f"config key {path} = {found[0]['input']!r}: {said}"


def _expected(found: Mapping[str, Any]) -> str:
    """What pydantic says, in words of YAML."""
    if found["type"] in {"model_type", "dict_type"}:
        return "input should be keys and values"
    if found["type"] in {"tuple_type", "list_type"}:
        return "input should be a list"
    said = found["msg"].replace("Tuple", "list").replace(" after validation", "")
    return f"{said[0].lower()}{said[1:]}"


def _siblings(kind: type[Config], loc: Sequence[Any]) -> list[str]:
    """The keys that are known where `loc` is not."""
    for part in loc[:-1]:
        child = _config_in(kind.model_fields[part].annotation) if part in kind.model_fields else None
        if child is None:
            break
        kind = child
    return sorted(kind.model_fields)


def _config_in(annotation: Any) -> type[Config] | None:  # noqa: ANN401 - an annotation can be anything
    options = typing.get_args(annotation) or (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, Config)), None)
