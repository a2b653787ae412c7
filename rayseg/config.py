"""Configuration: one frozen pydantic model per pipeline, read from YAML and `--set`; errors name the key's path."""

import os
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rayseg.errors import ConfigError

QUIET_RAY = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": "2",  # by default Ray retries a tile that exceeds the memory without limit
}
MOST_NAMED = 5
"""Wrong keys that an error names."""


class Config(BaseModel):
    """A frozen part of a configuration; unknown keys are errors.

    If a group of keys has defaults of its own (`learning: Learning = Learning(batch=4)`), a group that is given in part
    keeps the other defaults. A group with `one_value`, such as a class table, is replaced as a whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    one_value: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic passes any input
        if not isinstance(values, dict):  # pydantic reports it, with the key's path
            return values
        return values | _merged(((name, field.default) for name, field in cls.model_fields.items()), values)


def _merged(defaults: Iterable[tuple[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    """The groups among `values`, each over its default; groups inside groups likewise, other values as a whole."""
    groups = {name: default for name, default in defaults if isinstance(default, Config) and not default.one_value}
    return {
        # Only the keys that the default sets explicitly: the class supplies the others.
        name: group.model_dump(exclude_unset=True) | values[name] | _merged(group, values[name])
        for name, group in groups.items()
        if isinstance(values.get(name), dict)
    }


def added(default: Any) -> Any:  # noqa: ANN401 - as pydantic's Field
    """A field that a later version added: its default is left out of JSON, so that older runs keep their keys."""
    return Field(default, exclude_if=lambda value: bool(value == default))


def complete(config: Config) -> dict[str, Any]:
    """All values of a configuration as JSON values, also those of `added` fields at their defaults."""
    dumped = config.model_dump(mode="json")
    return {
        name: complete(value) if isinstance(value, Config) and not value.one_value else dumped.get(name, value)
        for name, value in config
    }


def commented(config: Config, *, indent: str = "") -> str:
    """A configuration as YAML, each key below a comment that explains it; reading it gives the configuration again."""
    lines = []
    for name, value in complete(config).items():
        group, field = getattr(config, name), type(config).model_fields[name]
        described = field.description or (group.__doc__ or "").partition("\n")[0]
        described += " Required." if field.is_required() and value == "" else ""
        wide = max(40, 78 - len(indent))
        lines += [f"{indent}# {line}" for line in textwrap.wrap(" ".join(described.split()), wide)]
        if isinstance(group, Config) and not group.one_value:
            lines += [f"{indent}{name}:", commented(group, indent=f"{indent}  ").rstrip("\n")]
        else:
            dumped = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
            lines.append(textwrap.indent(dumped.rstrip("\n"), indent))
    return "\n".join(lines) + "\n"


def quiet_ray() -> None:
    """Set Ray's environment before it starts: no log noise, no usage reports, no endless retries."""
    for name, value in QUIET_RAY.items():
        # The user's own settings take precedence.
        os.environ.setdefault(name, value)


def ray_address(chosen: str | None) -> str:
    """The Ray cluster to join: `chosen`, else RAY_ADDRESS, else "local" for a private Ray."""
    return chosen or os.environ.get("RAY_ADDRESS") or "local"


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= values[0] <= values[1]:
        raise ValueError(f"[{values[0]:g}, {values[1]:g}] is not a range; give two numbers >= 0, the smaller first")
    return values


def _above_0(values: tuple[float, float]) -> tuple[float, float]:
    if not values[0]:
        raise ValueError(f"[0, {values[1]:g}] begins at 0; give a number above 0")
    return values


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    # A band that is named twice would be read twice under one name.
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(names)}: a name occurs twice; give each name once")
    return names


Workers = Annotated[int, BeforeValidator(lambda value: 0 if value == "auto" else value), Field(ge=0)]
"""Processes of Ray Train. auto (0): on a cluster one per GPU, or one on its CPUs; locally this process trains."""
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""(smallest, largest), both >= 0."""
Factors = Annotated[Range, AfterValidator(_above_0)]
"""(smallest, largest), both > 0."""
Bands = Annotated[tuple[str, ...], AfterValidator(_different)]
"""Names of bands, in the order of a model's input."""
T = TypeVar("T", bound=Config)


def load(kind: type[T], path: str | None = None, overrides: Sequence[str] = ()) -> T:
    """The configuration `kind`: its defaults, then the YAML file, then `a.b=value` overrides.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or its value is not allowed.
    """
    values = read_values(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r} is not of the form key=value or group.key=value")
        # 1. go down to the group of the key
        *parents, last = key.split(".")
        group = values
        for parent in parents:
            if group.get(parent) is None:
                group[parent] = {}
            if not isinstance(group[parent], dict):
                raise ConfigError(f"--set {override!r}: {parent} is a value, not a group of keys")
            group = group[parent]
        # 2. what is not YAML is text, for example a template with braces
        try:
            group[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            group[last] = text
    return load_values(kind, values)


def load_values(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration `kind` from plain values; errors as in `load`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_message(kind, values, error)) from None


def shipped(folder: str, pattern: str) -> dict[str, Path]:
    """The files under `folder` of the working folder and of the package, by their path below it without its suffix.

    A file of the working folder replaces one of the package with the same name.

    Args:
        folder: configs, configs/classes or stac/regions.
        pattern: which files, as a glob.
    """
    package = Path(__file__).parent
    # An installed package has the folders inside, a checkout next to it.
    folders = (package.parent / folder, package / folder, Path(folder))
    return {
        file.relative_to(root).with_suffix("").as_posix(): file
        for root in folders
        for file in sorted(root.glob(pattern))
    }


def named_configs() -> dict[str, Path]:
    """The configurations that --config knows by name, for example gpc/smoke."""
    return {name: file for name, file in shipped("configs", "*/*.yaml").items() if not name.startswith("classes/")}


def read_values(path: str) -> dict[str, Any]:
    """The content of a YAML file, by its path or by the name of a shipped configuration.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping of keys to values.
    """
    file = Path(path)
    try:
        values = yaml.load((file if file.exists() else named_configs().get(path, file)).read_text(), EachKeyOnce)
    except OSError as error:
        known = ", ".join(named_configs())
        raise ConfigError(
            f"config file {path} cannot be read: {error.strerror}; give a YAML file, or one of {known}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not YAML: {reason}; correct it") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} holds a {type(values).__name__}, expected keys and values; correct it")
    return values


class EachKeyOnce(yaml.SafeLoader):
    """A YAML loader that raises if a group has a key twice; PyYAML's own keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - as in PyYAML
        """The node of a group as it is written, before merge keys (<<) are resolved."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def _message(kind: type[Config], values: dict[str, Any], error: ValidationError) -> str:
    """The first few errors, each as one clause with the key's path."""
    problems: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in error.errors():
        missing = entry["type"] == "missing"
        # pydantic puts names of types into the path: only parts that occur in the values are keys.
        keys: list[Any] = []
        inner: Any = values
        for part in entry["loc"][: len(entry["loc"]) - missing]:
            with suppress(KeyError, IndexError, TypeError):
                inner = inner[part]
                keys.append(part)
        keys += entry["loc"][len(entry["loc"]) - missing :]
        problems.setdefault(tuple(keys), []).append(dict(entry))
    # A value of several allowed types has an error for each: the most specific ones are reported.
    deepest = [keys for keys in problems if not any(other[: len(keys)] == keys != other for other in problems)]
    clauses = [_clause(kind, keys, problems[keys]) for keys in deepest[:MOST_NAMED]]
    return "; ".join(clauses) + (f"; and {len(deepest) - MOST_NAMED} more" if len(deepest) > MOST_NAMED else "")


def _clause(kind: type[Config], keys: Sequence[Any], entries: Sequence[dict[str, Any]]) -> str:
    """The error of one key; `entries` has one entry for each type that the key allows."""
    path, by_type = ".".join(map(str, keys)), {entry["type"]: entry for entry in entries}
    if "extra_forbidden" in by_type:
        for part in keys[:-1]:  # to the group whose keys are known
            annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
            options = typing.get_args(annotation) or (annotation,)
            group = next(
                (option for option in options if isinstance(option, type) and issubclass(option, Config)), None
            )
            if group is None:
                break
            kind = group
        return f"config key {path} is unknown, expected one of: {', '.join(sorted(kind.model_fields))}"
    if "missing" in by_type:
        return f"config key {path} is missing; set it"
    if "value_error" in by_type:  # raised by a validator: the type is right
        reason = by_type["value_error"]["msg"].removeprefix("Value error, ")
        return f"config{f' key {path}' if path else ''}: {reason}"
    # a key with several types has one entry for each: "input should be A or B"
    first, *others = dict.fromkeys(map(_expected, entries))
    expected = " or ".join([first, *(text.removeprefix("input should be ") for text in others)])
    return f"config key {path} = {entries[0]['input']!r}: {expected}"


def _expected(entry: Mapping[str, Any]) -> str:
    """Pydantic's message with YAML's terms."""
    if entry["type"] in {"model_type", "dict_type"}:
        return "input should be keys and values"
    if entry["type"] in {"tuple_type", "list_type"}:
        return "input should be a list"
    text = entry["msg"].replace("Tuple", "list").replace(" after validation", "")
    return f"{text[0].lower()}{text[1:]}"
