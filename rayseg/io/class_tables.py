"""Class tables: YAML files that say what the values and colours of masks mean, by path or by their name here."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

import rayseg
from rayseg.config import Config, EachKeyOnce
from rayseg.errors import ConfigError
from rayseg.store import upath
from rayseg.vision.color import ClassTable


class ClassRow(Config):
    """One class."""

    name: str
    """As it stands in maps and legends."""
    color: str | tuple[int, int, int]
    """#RRGGBB, or red, green and blue."""
    value: int | None = None
    """In masks of values; by default the place in the list."""


class Classes(Config):
    """The classes of masks; in a configuration also the path of a YAML file, or its name under configs/classes."""

    one_value = True

    classes: tuple[ClassRow, ...] = ()
    ignore: tuple[str | tuple[int, int, int], ...] = ()
    """Colours that mean "not labelled"; the value 255 does so too."""
    threshold: int | None = None
    """Of masks whose colours are not pure: a channel is taken as 255 from this value on, else as 0."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:  # noqa: ANN401 - what a configuration holds
        return _content(given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _can_be_meant(self) -> "Classes":
        _ = self.table
        return self

    @property
    def table(self) -> ClassTable:
        """The classes as masks are read by them.

        Raises:
            ConfigError: a colour or value cannot be meant.
        """
        return ClassTable.from_config(self.model_dump(exclude_none=True))


def read_table(path: str) -> ClassTable:
    """The class table in a YAML file, by its path or its name under configs/classes.

    Raises:
        ConfigError: the file cannot be read or holds no class table.
    """
    return ClassTable.from_config(_content(path))


def _content(path: str) -> dict[str, Any]:
    """What the file holds, which makes a class table."""
    file = upath(_named(path) or path)
    try:
        content = yaml.load(file.read_text(), EachKeyOnce)
    except OSError as error:
        known = ", ".join(sorted({found.stem for found in _shipped()})) or "none here"
        raise ConfigError(
            f"class table {path} cannot be read: {error.strerror}; name a YAML file, or one of {known}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"class table {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"class table {path} holds no keys, expected classes: [{{name, color}}, ...]")
    try:
        ClassTable.from_config(content)
    except ConfigError as error:
        raise ConfigError(f"class table {path}: {error}") from None
    return content


def _named(name: str) -> Path | None:
    return next((file for file in _shipped() if file.stem == name), None)


def _shipped() -> list[Path]:
    folders = (Path("configs/classes"), Path(rayseg.__file__).parent.parent / "configs" / "classes")
    return [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
