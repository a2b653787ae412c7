"""Imagery behind a network: GDAL's settings, signatures that run out, and patience with stores that are busy."""

import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import TypeVar
from urllib.parse import quote, urlsplit

from rayseg.errors import DataError
from rayseg.store import public, s3_options, signer, upath

T = TypeVar("T")
SETTINGS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",  # the whole header of most COGs in the first request
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_VERSION": "2TLS",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_HTTP_RETRY_CODES": "429,500,502,503,504",
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
    "GDAL_HTTP_LOW_SPEED_TIME": "20",
    "CPL_VSIL_CURL_NON_CACHED": "/vsis3/:/vsicurl/",  # what failed once, or was replaced, is asked for again
}
WAITS = (1.0, 4.0)
"""Seconds between the attempts to read from a remote file; each opens it anew, with fresh credentials."""
EARLY = 300.0
"""Seconds before its end at which a signature is renewed."""
_FINAL = re.compile(r"\b404\b|does not exist|not recognized|No such|has no band|complex", re.IGNORECASE)
_signatures: dict[str, tuple[str, float]] = {}
_signing = threading.Lock()


def settings(name: str) -> dict[str, str]:
    """GDAL's options for a file that is not on this machine; for s3 those that s3fs works with (`s3_options`)."""
    scheme = urlsplit(name).scheme
    return {**SETTINGS, **(_store(tuple(sorted(s3_options().items()))) if scheme == "s3" else {})}


@cache
def _store(options: tuple[tuple[str, object], ...]) -> dict[str, str]:
    """The object store that s3fs is set up for (its configuration files included) in GDAL's words."""
    given = dict(options)
    words = {"AWS_NO_SIGN_REQUEST": "YES"} if given.get("anon") else {}
    words |= {"AWS_PROFILE": str(given["profile"])} if "profile" in given else {}
    url = urlsplit(str(upath("s3://bucket/key").fs.s3.meta.endpoint_url))
    if url.netloc.endswith("amazonaws.com"):
        return words
    secure = "YES" if url.scheme == "https" else "NO"
    return words | {"AWS_S3_ENDPOINT": url.netloc, "AWS_HTTPS": secure, "AWS_VIRTUAL_HOSTING": "FALSE"}


def patiently(name: str, read: Callable[[], T]) -> T:
    """What `read` returns, tried again where a store that failed may answer later.

    Raises:
        DataError: of `read`, the last time, or at once where another attempt is of no use.
    """
    for wait in WAITS:
        try:
            return read()
        except DataError as error:
            if urlsplit(name).scheme not in {"s3", "http", "https"} or _FINAL.search(str(error)):
                raise
        time.sleep(wait)
    return read()


def signed(href: str) -> str:
    """The href as it can be read now: signed by the service that `signer` names, if it is of a host that asks for it.

    Raises:
        DataError: the service does not sign it.
    """
    service, hosts = signer()
    host = urlsplit(href).hostname or ""
    if not service or not any(host == name or host.endswith(f".{name.lstrip('.')}") for name in hosts):
        return href
    with _signing:
        found, ends = _signatures.get(href, ("", 0.0))
        if time.time() > ends - EARLY:
            found, ends = _asked(service, href)
            _signatures[href] = found, ends
    return found


def stamp(href: str) -> int:
    """Changes when the href has to be opened anew: when its signature ends."""
    signed(href)
    return int(_signatures.get(href, ("", 0.0))[1])


def _asked(service: str, href: str) -> tuple[str, float]:
    import httpx  # few catalogues are signed

    plain = href.partition("?")[0]
    try:
        answer = httpx.get(service.replace("{href}", quote(plain, safe="")), timeout=30, follow_redirects=True)
        row = answer.raise_for_status().json()
        ends = datetime.fromisoformat(row["msft:expiry"]).timestamp() if "msft:expiry" in row else time.time() + 900
        return str(row["href"]), ends
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{public(href)} cannot be signed by {urlsplit(service).hostname}: {public(str(error))}; check RAYSEG_SIGN"
        ) from None
