"""Class tables, the values, names and colours in masks: YAML files by path or by name under configs/classes."""

from typing import Any

import yaml
from pydantic import model_validator

from rayseg.config import Config, EachKeyOnce, shipped
from rayseg.errors import ConfigError
from rayseg.io.masks import masks_of, table_of
from rayseg.store import located, upath
from rayseg.vision.color import ClassTable


class ClassRow(Config):
    """One class."""

    name: str
    """As shown in maps and legends."""
    color: str | tuple[int, int, int]
    """#RRGGBB, or red, green and blue."""
    value: int | None = None
    """Pixel value in masks of values; by default the position in the list, which is the value in maps."""


class Classes(Config):
    """The classes of masks; a configuration may also give a YAML file by path, or by name under configs/classes.

    `RUN#classes` are those of a run's map.
    """

    one_value = True

    classes: tuple[ClassRow, ...] = ()
    ignore: tuple[int | str | tuple[int, int, int], ...] = ()
    """Colours, and values of masks of values, that mean "not labelled"; the value 255 means it too."""
    threshold: int | None = None
    """For masks whose colours are blurred: a channel counts as 255 from this value on, else as 0."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:  # noqa: ANN401 - any value of a configuration
        return _content(given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check_table(self) -> "Classes":
        _ = self.table
        return self

    @property
    def table(self) -> ClassTable:
        """The table that masks are read by.

        Raises:
            ConfigError: a colour or value is invalid.
        """
        return ClassTable.from_config(self.model_dump(exclude_none=True))


def read_table(path: str) -> ClassTable:
    """Read a class table from a YAML file, by its path or its name under configs/classes.

    Raises:
        ConfigError: the file cannot be read or is not a class table.
    """
    return ClassTable.from_config(_content(path))


def _content(path: str) -> dict[str, Any]:
    """The keys of a file that is a valid class table; or those of a run's map."""
    if path != (place := located(path)) and "#" in place and "#" in path:
        table = table_of(masks_of(place)[0].assets[0][0])
        rows = table.classes if table else ()
        return {"classes": [{"name": name, "color": color, "value": value} for value, name, color in rows]}
    named = shipped("configs/classes", "*.yaml")
    try:
        # A key that is given twice would lose a class without a word.
        content = yaml.load(upath(named.get(path, path)).read_text(), EachKeyOnce)
    except OSError as error:
        known = ", ".join(sorted(named)) or "none here"
        raise ConfigError(
            f"class table {path} cannot be read: {error.strerror}; give a YAML file, or one of {known}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"class table {path} is not YAML: {' '.join(str(error).split())}; correct it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"class table {path} has no keys, expected classes: [{{name, color}}, ...]; correct the file")
    try:
        # Checked here, where the file's name is known.
        ClassTable.from_config(content)
    except ConfigError as error:
        raise ConfigError(f"class table {path}: {error}") from None
    return content
