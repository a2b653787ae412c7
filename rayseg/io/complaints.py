"""What GDAL says of data that did not come and does not raise: it goes on without the tag, or with empty blocks."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_RASTERIO = logging.getLogger("rasterio")
_TAG = re.compile("IO error")
_ERROR = re.compile(r"GDAL signalled an error: err_no=\d+, msg=(?!.*(?:PROJ: |[Rr]eprojection|to transform))")
"""Not of pixels that lie beyond the reach of a CRS: they are no fault of the file."""
_heard = threading.local()


class _Ear(logging.Filter):
    """Keeps what a thread listens for; lets pass what rasterio's loggers would have let pass without it."""

    def filter(self, record: logging.LogRecord) -> bool:
        said: list[str] | None = getattr(_heard, "said", None)
        message = record.getMessage()
        if said is not None and (_TAG.search(message) or _ERROR.match(message)):
            said.append(_ERROR.sub("", message))
        return record.levelno >= _RASTERIO.getEffectiveLevel()


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What GDAL complains of meanwhile in this thread; what is said to an inner listener, outer ones do not hear."""
    outer, _heard.said = getattr(_heard, "said", None), []
    try:
        yield _heard.said
    finally:
        _heard.said = outer


for _name in ("rasterio._env", "rasterio._err"):  # the second says errors that are not raised as information
    _logger = logging.getLogger(_name)
    _logger.setLevel(logging.INFO)
    _logger.addFilter(_Ear())
