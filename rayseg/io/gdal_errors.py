"""Errors that GDAL only logs: lost data that a read returns as nodata.

Where a block cannot be read or decoded, GDAL may log an error and fill the block; rasterio then raises nothing.
"""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_RASTERIO = logging.getLogger("rasterio")
_LOGGERS = tuple(logging.getLogger(f"rasterio.{name}") for name in ("_env", "_err"))
"""They log GDAL's warnings, and as information the errors that no call raised."""
_LOST = re.compile(
    r"IO error|can ?not (be )?read|failed to read|read ?error|IReadBlock|decod\w+ error|Request for .* failed|"
    r"tags apparently corrupt|error reading (?!EXIF)",
    re.IGNORECASE,
)
"""Messages of lost data; a photo without its Exif directory loses neither pixels nor its place."""
_WHERE = re.compile(r"^GDAL signalled an error: err_no=\d+, msg=")
_thread = threading.local()


class _Collector(logging.Filter):
    """Collects a thread's messages of lost data; lets through the records that the logger's level allows."""

    def filter(self, record: logging.LogRecord) -> bool:
        messages: list[str] | None = getattr(_thread, "messages", None)
        message = record.getMessage()
        if messages is not None and _LOST.search(message):
            messages.append(_WHERE.sub("", message).strip("'\""))
        return record.levelno >= _RASTERIO.getEffectiveLevel()


_COLLECTOR = _Collector()


@contextmanager
def gdal_errors() -> Iterator[list[str]]:
    """Collect the messages of lost data that GDAL logs in this thread; nested contexts collect only their own.

    The caller's logger settings do not matter, and its log output does not change.
    """
    for logger in _LOGGERS:
        logger.disabled = False
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        logger.addFilter(_COLLECTOR)  # once, however often it is added
    outer, _thread.messages = getattr(_thread, "messages", None), []
    try:
        yield _thread.messages
    finally:
        _thread.messages = outer
