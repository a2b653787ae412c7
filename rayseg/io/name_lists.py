"""Lists of image names in files, as the published codes read and write them: text, CSV or a numpy array."""

import csv
import io
import re
from collections.abc import Sequence
from numbers import Real
from pathlib import PurePosixPath
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from rayseg.io.tables import write_array
from rayseg.store import STORE_ERRORS, StorePath, put, suffix_of, upath

SUFFIXES = (".txt", ".csv", ".npy")
_IMAGES = {".tif", ".tiff", ".png", ".jpg", ".jpeg"}
_UNREADABLE: tuple[type[Exception], ...] = (*STORE_ERRORS, ValueError, EOFError)


def _read_paths(value: Any) -> Any:  # noqa: ANN401 - any value of a configuration
    """The names in a file, with their folders and without suffixes; other values as they are.

    Raises:
        ValueError: the file cannot be read as a list of names, or a name is a number; pydantic validators report it.
    """
    # YAML reads 012 as the number 10, so the image that is meant cannot be told from it.
    if numbers := [name for name in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(name, Real)]:
        raise ValueError(f"{numbers[0]} is a number, expected a name; put names into quotes, or into a text file")
    if not isinstance(value, str) or suffix_of(value) not in SUFFIXES:
        return value
    try:
        data = upath(value).read_bytes()
        if suffix_of(value) == ".npy":
            # A pickled array of objects could run code; an array of text is enough for names.
            entries = [str(entry) for entry in np.load(io.BytesIO(data), allow_pickle=False).ravel()]
        elif suffix_of(value) == ".csv":
            rows = list(csv.DictReader(io.StringIO(data.decode())))
            known = list(rows[0]) if rows else []
            column = next((name for name in ("id", "name", "image") if name in known), known[0] if known else "")
            entries = [row[column] for row in rows]
        else:  # a line may name the mask, or the class, after the image
            entries = [re.split(r"[\s,;]+", line.strip())[0] for line in data.decode().splitlines() if line.strip()]
    except _UNREADABLE as error:
        raise ValueError(
            f"{value} is not a list of names ({error}); give a text file with a name a line, a CSV with the column "
            "id, or an array saved as np.save(FILE, np.array(names, str))"
        ) from None
    paths = [PurePosixPath(entry.replace("\\", "/")) for entry in entries]
    return [str(path.with_suffix("") if path.suffix.lower() in _IMAGES else path) for path in paths]


def _read(value: Any) -> Any:  # noqa: ANN401 - any value of a configuration
    """The names in a file, without folders and suffixes; other values as they are."""
    read = _read_paths(value)
    return read if read is value else [PurePosixPath(name).name for name in read]


Paths = Annotated[tuple[str, ...], BeforeValidator(_read_paths)]
"""Names that may have folders, or a file with a list of them (.txt, .csv, .npy)."""
Names = Annotated[tuple[str, ...], BeforeValidator(_read)]
"""Names, or a file with a list of them (.txt, .csv, .npy)."""


def write_names(folder: StorePath, stem: str, names: Sequence[str]) -> None:
    """Write `<stem>.txt`, `.csv` and `.npy` of the names, in their order."""
    write_array(upath(folder) / f"{stem}.npy", np.array(names, str))
    put(upath(folder) / f"{stem}.txt", "".join(f"{name}\n" for name in names).encode())
    put(upath(folder) / f"{stem}.csv", "".join(f"{name}\n" for name in ("id", *names)).encode())
