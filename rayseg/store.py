"""Files on local disks and object stores: objects are written whole or not at all."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlsplit

import fsspec
from botocore.exceptions import BotoCoreError
from pydantic import AfterValidator
from upath import UPath

from rayseg.errors import ConfigError, StoreFull

StorePath = str | Path | UPath
STORE_ERRORS: tuple[type[Exception], ...] = (OSError, BotoCoreError)
"""Errors of file systems and object stores; s3fs does not translate the AWS client's own errors (no credentials)."""
ACCESS = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_NO_SIGN_REQUEST",
    "AWS_CA_BUNDLE", "RAYSEG_SIGN", "RAYSEG_SIGN_HOSTS", "RAYSEG_ALLOW_DRIVER",
)  # fmt: skip
"""Environment variables that locate object stores, name a profile and allow formats; keys are not among them: each
machine has its own."""
HERE = "<run>"
"""Placeholder for the prefix of a run in its own files, so that a run can be moved and resumed."""
_SECRET = re.compile(
    r"(?i)([?&](?:sig|signature|token|access_token|api_?key|key|password|subscription-key"
    r"|x-amz-(?:signature|credential|security-token)|awsaccesskeyid)=)[^&\s\"'#]+"
)
_LOGIN = re.compile(r"(://)[^/\s@\"']+@")
_WEB = ("http://", "https://")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FILE_URL = re.compile(r"^file:(//(localhost)?)?(?=/|$)|^file:(//)?")
_CATALOG = re.compile(r"(.*?\.(?:json|geojson|parquet)(?:\?[^#]*)?)#(.*)", re.IGNORECASE | re.DOTALL)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Files = dict[str, tuple[int, str]]
"""Path of a file -> its size in bytes and its `checksum`."""
_WRITTEN: ContextVar[Files | None] = ContextVar("written", default=None)
_FOLDERS: ContextVar[set[Path] | None] = ContextVar("folders", default=None)
_log = logging.getLogger(__name__)


# By name: s3fs is imported when it is used.
fsspec.register_implementation("s3", "rayseg.filesystems.NamingS3", clobber=True)
if find_spec("gcsfs") is None:
    for _scheme in ("gs", "gcs"):
        fsspec.register_implementation(_scheme, "rayseg.filesystems.NoGoogle", clobber=True)


def upath(path: StorePath) -> UPath:
    """The path or URL as a UPath; `file:` URLs become local paths, s3 uses `s3_options`.

    Raises:
        ConfigError: no store has such a scheme, its package is not installed, or an s3 URL names no bucket.
    """
    text = str(path)
    if text.startswith("s3://"):
        if not text.removeprefix("s3://").partition("/")[0]:
            raise ConfigError(f"{text} names no bucket, expected s3://BUCKET/PATH; correct it")
        on_s3: UPath = UPath(text, **s3_options())
        return on_s3
    if text.startswith(_WEB):
        # As it is written: an escape that is decoded and encoded again (%2F in a signature) gives another URL.
        on_web: UPath = UPath(web_url(text), encoded=True)
        return on_web
    if text.startswith("file:"):
        plain = _FILE_URL.sub("", text)
        return UPath(plain if Path(plain).exists() else unquote(plain))
    if scheme := _SCHEME.match(text):
        _expect_store(scheme[1])
    return UPath(path)


@cache
def _expect_store(scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise ConfigError(
            f"{scheme}:// is not a store that is known, expected s3://, gs:// or another one of fsspec, or a local "
            "path; correct it"
        ) from None
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}; install it") from None


def web_url(text: str) -> str:
    """The http(s) URL with spaces and letters beyond ASCII encoded; what is encoded already stays as it is."""
    return quote(text, safe="%/:?#[]@!$&'()*+,;=~")


def split_location(text: str) -> tuple[str, str]:
    """(path or URL, fragment) of `catalog.json#collection`; other local names may contain "#" themselves."""
    if match := _CATALOG.match(text):
        return match[1], match[2]
    if text.startswith(("#", *_WEB)):
        place, _, fragment = text.partition("#")
        return place, fragment
    return text, ""


def suffix_of(path: StorePath) -> str:
    """The suffix in lower case, as ".tif"; the query of an http(s) URL is not part of it."""
    text = str(path)
    return PurePosixPath(urlsplit(text).path if text.startswith(_WEB) else text).suffix.lower()


def s3_options() -> dict[str, Any]:
    """Options of s3fs from the usual environment variables; the AWS client finds keys when it needs them.

    Returns:
        s3fs's `endpoint_url`, `profile` and `anon`, those that are set.
    """
    options: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint_url"] = endpoint
    if profile := os.environ.get("AWS_PROFILE"):
        options["profile"] = profile
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in {"1", "yes", "true", "on"}:
        options["anon"] = True
    return options


def access() -> dict[str, str]:
    """The environment variables of `ACCESS` that are set; other machines of a run need them."""
    return {name: os.environ[name] for name in ACCESS if name in os.environ}


def allowed_drivers() -> tuple[str, ...]:
    """GDAL drivers that the user allows in addition to the usual ones, from RAYSEG_ALLOW_DRIVER (names with commas)."""
    return tuple(filter(None, (name.strip() for name in os.environ.get("RAYSEG_ALLOW_DRIVER", "").split(","))))


def allow_drivers(names: Sequence[str]) -> None:
    """Allow GDAL drivers in this process, and in those that it starts."""
    os.environ["RAYSEG_ALLOW_DRIVER"] = ",".join(dict.fromkeys([*allowed_drivers(), *names]))


def signer() -> tuple[str, tuple[str, ...]]:
    """(URL of the service that signs `{href}`, hosts whose files need it), from RAYSEG_SIGN and RAYSEG_SIGN_HOSTS."""
    # Azure's blob store is where Planetary Computer keeps its files, which need signed URLs.
    hosts = os.environ.get("RAYSEG_SIGN_HOSTS") or "blob.core.windows.net"
    return os.environ.get("RAYSEG_SIGN", ""), tuple(filter(None, (host.strip() for host in hosts.split(","))))


def public(text: str) -> str:
    """The text with signatures, keys and logins of URLs masked: for messages, logs and files of a run."""
    return _LOGIN.sub(r"\1***@", _SECRET.sub(r"\1***", text))


def sentence(error: Exception) -> str:
    """The message of one of `STORE_ERRORS`, with a remedy, which Python and the AWS client do not give."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); choose a path with permission to read and write"
    if not isinstance(error, BotoCoreError):
        return public(str(error))
    return f"the object store cannot be used: {error}; check AWS_PROFILE or AWS_ACCESS_KEY_ID, and AWS_ENDPOINT_URL"


def is_local(path: StorePath) -> bool:
    """Whether `path` is on this machine's file system."""
    return upath(path).protocol in {"", "file", "local"}


def absolute(path: StorePath) -> str:
    """The path as an absolute path or URL, valid in any working folder."""
    return str(Path(upath(path).path).absolute()) if is_local(path) else str(upath(path))


RUN_PARTS = {
    "classes": "collection.json#/classes",
    "assigned": "assigned/catalog.json#classes",
    "plots": "labelled/catalog.json#chips",
}
"""Part of a run in `RUN#part` -> where it is: its class map, the classes of its labels (`labels assign`), its labelled
plots (`labels import`)."""


def part_of_run(run: str, part: str) -> str:
    """Location of a part of a run: of `RUN_PARTS`, or of a model, as `models/NAME`.

    Raises:
        ConfigError: there is no such part.
    """
    root, place = upath(run), RUN_PARTS.get(part, part)
    file = f"{part}/item.json" if part.startswith("models/") else place.partition("#")[0]
    if part not in RUN_PARTS and not part.startswith("models/"):
        raise ConfigError(
            f"{run}#{part} is not a part of a run, expected one of {', '.join(RUN_PARTS)} or models/NAME; correct it"
        )
    if not (root / file).exists():
        raise ConfigError(f"{run}#{part} is not there: {file} is missing; finish the run, or name another part")
    return f"{absolute(root)}/{place}"


def located(text: str) -> str:
    """A location as it is stored in a configuration: `Location`.

    Raises:
        ConfigError: it names a part that the run does not have.
    """
    run, mark, part = text.rpartition("#")
    # Each key that takes a location takes the results of a run by its name, too.
    is_catalog = suffix_of(run) in {".json", ".geojson", ".parquet"}
    if mark and run and not is_catalog and not run.startswith(_WEB):
        with suppress(*STORE_ERRORS):  # without access to the store, the text stays a path until it is opened
            if (upath(run) / "run.json").exists():
                return part_of_run(run, part)
    path, fragment = split_location(text)
    return (absolute(path) if path else "") + (f"#{fragment}" if "#" in text.removeprefix(path) else "")


Location = Annotated[str, AfterValidator(located)]
"""A path or URL in a configuration, made absolute when it is read; `#collection` may follow. `RUN#classes` and others
of `RUN_PARTS` are results of a run."""


def put(path: StorePath, data: bytes | memoryview) -> None:
    """Write `data` so that a reader sees all of it or nothing: temporary file and rename on disk, one PUT elsewhere.

    On disk the file outlasts a power failure when the function returns (see `synced_once`).

    Raises:
        StoreFull: the disk is full; the previous content of `path` is untouched.
        ConfigError: `path` is a web address, or no store has its scheme.
    """
    target = upath(path)
    if str(path).startswith(_WEB):
        raise ConfigError(f"{public(str(path))} is a web address, which is not written to; name a folder or s3:// URL")
    if not is_local(target):  # a PUT is atomic
        target.write_bytes(bytes(data))
    else:
        # The temporary file is in the same folder: a rename over file systems would be a copy.
        with _temporary(target) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            temporary.replace(target.path)
    if (written := _WRITTEN.get()) is not None:
        written[str(target)] = (len(data), checksum(data))


@contextmanager
def recorded() -> Iterator[Files]:
    """The files that `put` writes in this thread within the context."""
    written: Files = {}
    token = _WRITTEN.set(written)
    try:
        yield written
    finally:
        _WRITTEN.reset(token)


@contextmanager
def synced_once() -> Iterator[None]:
    """Sync the folders in which `put` writes in this thread at the end of the context instead of with every file."""
    folders: set[Path] = set()
    token = _FOLDERS.set(folders)
    try:
        yield
        for folder in folders:
            _sync(folder)
    finally:
        _FOLDERS.reset(token)


def checksum(data: bytes | memoryview) -> str:
    """BLAKE2b of 128 bits, as hexadecimal digits: detects damage, costs 1 s per GB."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def within(files: Files, root: str) -> Files:
    """Those of the files that lie below `root`, by their paths relative to it."""
    return {path.removeprefix(f"{root}/"): file for path, file in files.items() if path.startswith(f"{root}/")}


def relocated(value: Any, old: str, new: str) -> Any:  # noqa: ANN401 - JSON values
    """The JSON value with `new` in place of the path `old` wherever its texts name it or a path below it; keys stay."""
    if isinstance(value, dict):
        return {key: relocated(inner, old, new) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [relocated(inner, old, new) for inner in value]
    if not isinstance(value, str) or old not in value:
        return value
    # /data/run is not part of /data/run2, /data/run-b or /data/run.old
    return re.sub(rf"{re.escape(old)}(?![\w-]|\.\w)", lambda _: new, value)


def listing(prefix: StorePath) -> dict[str, int]:
    """Relative path -> bytes of all files below a prefix; hidden files are left out."""
    root = upath(prefix)
    if is_local(root):
        sizes = {}
        for folder, _, names in os.walk(root.path):
            within_root = os.path.relpath(folder, root.path)
            for name in names:
                with suppress(FileNotFoundError):  # a running command replaces files
                    size = Path(folder, name).stat().st_size
                    sizes[name if within_root == "." else f"{within_root}/{name}"] = size
    else:
        root.fs.invalidate_cache()  # s3fs keeps listings from before the workers wrote
        top = root.path.rstrip("/") + "/"
        sizes = {path.removeprefix(top): info["size"] for path, info in root.fs.find(root.path, detail=True).items()}
    return {path: size for path, size in sizes.items() if not path.rpartition("/")[2].startswith(".")}


def read_json(path: StorePath) -> dict[str, Any]:
    """The JSON object in a file; {} if the file does not exist or, with a warning, if it is damaged."""
    try:
        loaded = json.loads(upath(path).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        _log.warning("%s is damaged and counts as missing", path)
        return {}
    return loaded


def put_file(path: StorePath, source: Path) -> None:
    """Move the local file `source` to `path`, whole or not at all.

    Raises:
        StoreFull: the disk is full; the previous content of `path` is untouched.
    """
    target = upath(path)
    if not is_local(target):
        target.fs.put_file(str(source), target.path)
        source.unlink()
        return
    with _temporary(target) as temporary:
        # The source may be on another file system, where a direct rename fails.
        shutil.move(source, temporary)
        _sync(temporary)
        temporary.replace(target.path)


def put_if_absent(path: StorePath, data: bytes) -> bool:
    """Write `data` unless `path` exists; return whether it was written. Atomic against other writers.

    Raises:
        StoreFull: the disk is full.
    """
    target = upath(path)
    try:
        if not is_local(target):
            # A conditional PUT (If-None-Match: *), which the store itself checks.
            target.fs.pipe_file(target.path, data, mode="create")
            return True
        with _temporary(target) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            os.link(temporary, target.path)  # fails if the target exists, which a rename does not
    except FileExistsError:
        return False
    return True


@contextmanager
def _temporary(target: UPath) -> Iterator[Path]:
    """A new hidden name in the folder of `target`, which is created; the file is deleted at the end."""
    path = Path(target.path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        created = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # A name outlasts a power failure only if its folder is synced, too; so does the name of a new folder.
        changed = {path.parent, *(folder.parent for folder in created)}
        if (folders := _FOLDERS.get()) is not None:
            folders |= changed
        else:
            for folder in changed:
                _sync(folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoreFull(
            f"no space for {path} ({error.strerror}); free some space, then run the same command to resume"
        ) from None
    finally:
        # After a rename the temporary name is already gone. It means nothing to a person.
        try:
            temporary.unlink(missing_ok=True)
        except NotADirectoryError as error:
            raise NotADirectoryError(error.errno, error.strerror, str(path)) from None


def _sync(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sweep(prefix: StorePath) -> None:
    """Delete temporary files of killed processes below a local folder; no process may write there meanwhile."""
    if not is_local(prefix):
        return
    # The names that `_temporary` makes; nothing else begins with a dot and ends so.
    for folder, _, names in os.walk(upath(prefix).path):
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                Path(folder, name).unlink(missing_ok=True)


def cache_dir() -> Path:
    """Folder of demo data and downloads: RAYSEG_CACHE, else `rayseg` in the user's cache folder."""
    # The XDG convention; RAYSEG_CACHE is for shared machines with a small home.
    if chosen := os.environ.get("RAYSEG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseg"
