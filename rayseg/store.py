"""Files, wherever they are: whole-object writes that are there or not, on disk or on an object store."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from botocore.exceptions import BotoCoreError
from pydantic import AfterValidator
from upath import UPath

from rayseg.errors import StoreFull

StorePath = str | Path | UPath
STORE_ERRORS: tuple[type[Exception], ...] = (OSError, BotoCoreError)
"""What file systems and object stores raise; s3fs lets the AWS client's own errors (no credentials) through."""
ACCESS = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_NO_SIGN_REQUEST",
    "AWS_CA_BUNDLE", "RAYSEG_SIGN", "RAYSEG_SIGN_HOSTS",
)  # fmt: skip
"""Variables that say where object stores are and who asks; keys are not among them: every machine has its own."""
_SECRET = re.compile(
    r"(?i)([?&](?:sig|signature|token|access_token|api_?key|key|password|subscription-key"
    r"|x-amz-(?:signature|credential|security-token)|awsaccesskeyid)=)[^&\s\"'#]+"
)
_LOGIN = re.compile(r"(://)[^/\s@\"']+@")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def upath(path: StorePath) -> UPath:
    """The path or URI as a UPath; `file:` URIs become plain local paths, s3 is asked as `s3_options` say."""
    text = str(path)
    if text.startswith("s3://"):
        found: UPath = UPath(text, **s3_options())
        return found
    return UPath(text.removeprefix("file://") if text.startswith("file://") else path)


def s3_options() -> dict[str, Any]:
    """How object stores are asked, from the usual variables; keys are found by the AWS client when they are needed.

    Returns:
        s3fs's `endpoint_url`, `profile` and `anon`, those that are set.
    """
    found: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        found["endpoint_url"] = endpoint
    if profile := os.environ.get("AWS_PROFILE"):
        found["profile"] = profile
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in {"1", "yes", "true", "on"}:
        found["anon"] = True
    return found


def access() -> dict[str, str]:
    """What of the environment other machines of a run need to know; no keys."""
    return {name: os.environ[name] for name in ACCESS if name in os.environ}


def signer() -> tuple[str, tuple[str, ...]]:
    """(URL of the service that signs `{href}`, names of the hosts whose files want it), from RAYSEG_SIGN and _HOSTS."""
    hosts = os.environ.get("RAYSEG_SIGN_HOSTS") or "blob.core.windows.net"
    return os.environ.get("RAYSEG_SIGN", ""), tuple(filter(None, (host.strip() for host in hosts.split(","))))


def public(text: str) -> str:
    """The text without what signs or opens a URL: for messages, logs and what a run keeps."""
    return _LOGIN.sub(r"\1***@", _SECRET.sub(r"\1***", text))


def sentence(error: Exception) -> str:
    """What one of `STORE_ERRORS` says; neither Python nor the AWS client says what to do."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); choose a path that can be read or written there"
    if not isinstance(error, BotoCoreError):
        return public(str(error))
    return f"the object store cannot be used: {error}; check AWS_PROFILE or AWS_ACCESS_KEY_ID, and AWS_ENDPOINT_URL"


def is_local(path: StorePath) -> bool:
    """Whether `path` is on this machine's file system."""
    return upath(path).protocol in {"", "file", "local"}


def absolute(path: StorePath) -> str:
    """The path as it is understood from any working folder."""
    return str(Path(upath(path).path).absolute()) if is_local(path) else str(upath(path))


def _located(text: str) -> str:
    uri, found, fragment = text.partition("#")
    return (absolute(uri) if uri else "") + found + fragment


Location = Annotated[str, AfterValidator(_located)]
"""A path or URI in a configuration, kept as it is understood from any working folder; `#collection` may follow."""


def put(path: StorePath, data: bytes | memoryview) -> None:
    """Write `data` so that a reader sees all of it or nothing: temp + rename on disk, one PUT elsewhere.

    Raises:
        StoreFull: there is no room on the disk; what was at `path` is untouched.
    """
    target = upath(path)
    if not is_local(target):
        target.write_bytes(bytes(data))
        return
    with _beside(target) as temporary:
        temporary.write_bytes(data)
        temporary.replace(target.path)


def put_file(path: StorePath, source: Path) -> None:
    """Move the local file `source` to `path`, whole or not at all.

    Raises:
        StoreFull: there is no room on the disk; what was at `path` is untouched.
    """
    target = upath(path)
    if not is_local(target):
        target.fs.put_file(str(source), target.path)
        source.unlink()
        return
    with _beside(target) as temporary:
        shutil.move(source, temporary)
        temporary.replace(target.path)


def put_if_absent(path: StorePath, data: bytes) -> bool:
    """Write `data` unless `path` is there already; return whether it was written. Atomic against other writers.

    Raises:
        StoreFull: there is no room on the disk.
    """
    target = upath(path)
    try:
        if not is_local(target):
            target.fs.pipe_file(target.path, data, mode="create")
            return True
        with _beside(target) as temporary:
            temporary.write_bytes(data)
            os.link(temporary, target.path)
    except FileExistsError:
        return False
    return True


@contextmanager
def _beside(target: UPath) -> Iterator[Path]:
    """A fresh hidden name in the folder of `target`, which is made if need be; afterwards it is gone."""
    path = Path(target.path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoreFull(
            f"no room for {path} ({error.strerror}): make room, then give the same command again to go on"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def sweep(prefix: StorePath) -> None:
    """Remove what writers that were killed left half written below a folder; nobody may be writing there."""
    if not is_local(prefix):
        return
    for folder, _, names in os.walk(upath(prefix).path):
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                Path(folder, name).unlink(missing_ok=True)


def cache_dir() -> Path:
    """Where demo data and downloads are kept: RAYSEG_CACHE, else `rayseg` in the user's cache folder."""
    if chosen := os.environ.get("RAYSEG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseg"
