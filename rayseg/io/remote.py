"""Imagery behind a network: GDAL's settings, retries of what may pass, and signatures that expire."""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache, partial, wraps
from typing import ParamSpec, TypeVar
from urllib.parse import quote, urlsplit

from rayseg.errors import ConfigError, DataError
from rayseg.io.times import in_utc
from rayseg.store import STORE_ERRORS, public, s3_options, signer, upath

P = ParamSpec("P")
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
    "CPL_VSIL_CURL_NON_CACHED": "/vsis3/:/vsicurl/",  # a failed or replaced file is requested again
}
WAITS = (1.0, 4.0)
"""Seconds between the attempts to read a remote file; each attempt opens it again, with fresh credentials."""
LONGEST_WAIT = 60.0
"""Most seconds between two attempts, whatever a server requests."""
EARLY = 300.0
"""Seconds before its end at which a signature is renewed."""
VERSION_SECONDS = 300.0
"""Seconds after which the version of a remote file is asked again."""
MOST_SIGNATURES = 4096
"""Signatures that a process keeps; the least recently used one is dropped first."""
_FINAL = re.compile(r"\b404\b|does not exist|it is damaged|No such|has no (own )?band|complex|names '", re.IGNORECASE)
_signatures: OrderedDict[str, tuple[str, float]] = OrderedDict()


def settings(name: str) -> dict[str, str]:
    """GDAL's options for a file that is not on this machine; for s3 they match s3fs (`s3_options`)."""
    scheme = urlsplit(name).scheme
    return {**SETTINGS, **(_store(tuple(sorted(s3_options().items()))) if scheme == "s3" else {})}


@cache
def _store(options: tuple[tuple[str, object], ...]) -> dict[str, str]:
    """GDAL's options for the object store that s3fs is configured for, configuration files included."""
    given = dict(options)
    settings = {"AWS_NO_SIGN_REQUEST": "YES"} if given.get("anon") else {}
    settings |= {"AWS_PROFILE": str(given["profile"])} if "profile" in given else {}
    url = urlsplit(str(upath("s3://bucket/key").fs.s3.meta.endpoint_url))
    if url.netloc.endswith("amazonaws.com"):
        return settings
    secure = "YES" if url.scheme == "https" else "NO"
    return settings | {"AWS_S3_ENDPOINT": url.netloc, "AWS_HTTPS": secure, "AWS_VIRTUAL_HOSTING": "FALSE"}


# -- retries ----------------------------------------------------------------------------------------------------------


class Passing(DataError):
    """A failure that a later attempt may not meet: a busy server, a lost connection.

    Attributes:
        wait: seconds after which the server requests the next attempt.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def patiently(
    attempt: Callable[[], T], waits: Iterable[float] | None = None, *, pause: Callable[[float], object] = time.sleep
) -> T:
    """Return what `attempt` returns; repeat it while it raises `Passing`.

    Args:
        attempt: the call.
        waits: seconds before each further attempt, `WAITS` by default; a longer wait that the server requests counts.
        pause: waits so many seconds; returns True to give up.

    Raises:
        Passing: of the last attempt.
    """
    # The last attempt is outside the loop: its error is the caller's.
    for wait in WAITS if waits is None else waits:
        try:
            return attempt()
        except Passing as failure:
            if pause(min(max(wait, failure.wait), LONGEST_WAIT)):
                raise
    return attempt()


def patient(read: Callable[P, T]) -> Callable[P, T]:
    """The function, which reads a file, repeated by `patiently`: each attempt opens the file again."""

    @wraps(read)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(partial(read, *args, **kwargs))

    return repeated


def failure(name: str, message: str) -> DataError:
    """The error of a file that GDAL cannot read: `Passing` where the file is remote and the reason may pass.

    Raises:
        ConfigError: there is no such bucket, or the object store refuses the keys in use.
    """
    if name.startswith("s3://"):
        path = upath(name)
        bucket, key, _ = path.fs.split_path(path.path)
        try:  # GDAL says no more than that the file does not exist
            path.fs.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        except PermissionError as error:
            if isinstance(error, ConfigError):
                raise
            return DataError(public(str(error)))
        except STORE_ERRORS:
            pass  # the reason that GDAL gave stands
    final = urlsplit(name).scheme not in {"s3", "http", "https"} or _FINAL.search(message)
    return DataError(message) if final else Passing(message)


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header requests, as a number or a date; 0 for any other text."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without zone
        return 0.0


# -- signatures -------------------------------------------------------------------------------------------------------


def signed(href: str) -> str:
    """The href as it can be read now: signed by the service that `signer` names if its host requires it.

    Raises:
        DataError: the service does not sign it.
    """
    return _signature(href)[0]


def stamp(href: str) -> int:
    """Changes when the href has to be opened again: when its signature ends."""
    return int(_signature(href)[1])


def version(href: str) -> str:
    """ETag, or time of change, and size of a remote file; "" if its server states neither, or does not answer."""
    with _lock_of(href):  # one request for the tiles of one file that are compared at once
        return _version(href, int(time.monotonic() / VERSION_SECONDS))


@lru_cache(maxsize=65536)
def _version(href: str, _moment: int) -> str:
    try:
        place = upath(signed(href))
        place.fs.invalidate_cache(place.path)
        facts = {str(name).lower().replace("-", ""): value for name, value in place.fs.info(place.path).items()}
    except STORE_ERRORS:
        return ""
    changed = facts.get("etag") or facts.get("lastmodified") or facts.get("mtime")
    return f"{changed} {facts.get('size')}" if changed else ""


def _signature(href: str) -> tuple[str, float]:
    """(signed href, when the signature ends as Unix time); (the href, 0) where its host requires none."""
    service, hosts = signer()
    host = urlsplit(href).hostname or ""
    if not service or not any(host == name or host.endswith(f".{name.lstrip('.')}") for name in hosts):
        return href, 0.0
    with _lock_of(host):  # one request for a signature that many threads need; other hosts do not wait
        text, ends = _signatures.get(href, ("", 0.0))
        if time.time() > ends - EARLY:
            text, ends = _sign(service, href)
        _signatures.pop(href, None)  # the last in order is the latest used; another host's thread may evict any
        _signatures[href] = text, ends
        while len(_signatures) > MOST_SIGNATURES:
            _signatures.popitem(last=False)
    return text, ends


@lru_cache(maxsize=256)
def _lock_of(host: str) -> threading.Lock:
    """The lock of a host or a file; a forgotten lock costs a second request, never a wrong answer."""
    return threading.Lock()


def _sign(service: str, href: str) -> tuple[str, float]:
    import httpx  # few catalogues are signed

    plain = href.partition("?")[0]
    try:
        answer = httpx.get(service.replace("{href}", quote(plain, safe="")), timeout=30, follow_redirects=True)
        row = answer.raise_for_status().json()
        ends = in_utc(row["msft:expiry"]).timestamp() if "msft:expiry" in row else time.time() + 900
        return str(row["href"]), ends
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{public(href)} cannot be signed by {urlsplit(service).hostname}: {public(str(error))}; check RAYSEG_SIGN"
        ) from None
