"""What GDAL says of data that did not come and does not raise: it goes on without the tag, or with empty blocks."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_RASTERIO = logging.getLogger("rasterio")
_LOGGERS = tuple(logging.getLogger(f"rasterio.{name}") for name in ("_env", "_err"))
"""Of GDAL's warnings, and of errors that no call raised; rasterio says the second as information."""
_LOST = re.compile(
    r"IO error|can ?not (be )?read|failed to read|read ?error|IReadBlock|decod\w+ error|Request for .* failed|"
    r"tags apparently corrupt|error reading (?!EXIF)",
    re.IGNORECASE,
)
"""An Exif directory that is gone costs a photo no pixel and no place."""
_WHERE = re.compile(r"^GDAL signalled an error: err_no=\d+, msg=")
_heard = threading.local()


class _Ear(logging.Filter):
    """Keeps what a thread listens for; lets pass what rasterio's loggers would have let pass without it."""

    def filter(self, record: logging.LogRecord) -> bool:
        said: list[str] | None = getattr(_heard, "said", None)
        message = record.getMessage()
        if said is not None and _LOST.search(message):
            said.append(_WHERE.sub("", message).strip("'\""))
        return record.levelno >= _RASTERIO.getEffectiveLevel()


_EAR = _Ear()


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What GDAL complains of meanwhile in this thread; what is said to an inner listener, outer ones do not hear.

    The two loggers say it whatever a program has set them to; who reads its log sees no more than before.
    """
    for logger in _LOGGERS:
        logger.disabled = False
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        logger.addFilter(_EAR)  # once, however often it is added
    outer, _heard.said = getattr(_heard, "said", None), []
    try:
        yield _heard.said
    finally:
        _heard.said = outer
