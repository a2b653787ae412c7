"""One driver per run on an object store: an object that the driver renews, as long as it works.

`<run>/.driver` is written by conditional PUTs (`If-None-Match`, `If-Match`), so that of two drivers one gets it. Its
age is counted by the store's clock alone. A driver that misses three beats counts as killed, and another takes over.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from rayseg.errors import ConfigError, RunIncomplete
from rayseg.store import STORE_ERRORS, upath

BEAT = 15.0
"""Seconds between two renewals."""
MISSED = 3
"""Beats that a driver may miss before it counts as killed."""


@dataclass(frozen=True)
class Holder:
    """The driver that holds a run, as the object describes it.

    Attributes:
        owner: random id of the driver.
        host: name of its machine.
        machine: `_machine` of its machine.
        pid: its process id.
        etag: of the object; changes with every beat.
        age: seconds since the last beat.
    """

    owner: str
    host: str
    machine: str
    pid: int
    etag: str
    age: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last seen {self.age:.0f} s ago"

    @property
    def alive(self) -> bool:
        """Whether it renewed the object in time; a process of this machine is looked up instead of waited for."""
        processes = Path("/proc")
        if self.machine == _machine() and (processes / "self").exists() and not (processes / str(self.pid)).exists():
            return False
        return self.age <= MISSED * BEAT


class Lease:
    """The driver's hold on a run, renewed by a thread until `release`.

    Args:
        root: prefix of the run on an object store.
        etag: of the object that it replaces; "" if there is none.

    Raises:
        FileExistsError: another driver was faster.
    """

    def __init__(self, root: str, etag: str) -> None:
        self.root, self.owner = root, uuid.uuid4().hex
        self.lost: Holder | None = None
        # The first write comes before the thread: without it there is no hold to renew.
        self._beats, self._stop = 0, threading.Event()
        self._etag = self._put(etag)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def expect_held(self) -> None:
        """Check that no other driver took over, as it may after a break of the network or a suspended machine.

        Raises:
            RunIncomplete: another driver holds the run.
        """
        # By the wall clock, which continues while a machine is suspended: then the thread's next beat may be too late.
        if not self.lost and time.time() - self._seen > MISSED * BEAT:
            holder = holder_of(self.root)
            self.lost = holder if holder and holder.owner != self.owner else None
        if self.lost:
            raise RunIncomplete(
                f"another driver took over {self.root} ({self.lost}), because this one could not renew its hold for "
                f"{MISSED * BEAT:.0f} s; follow the other one with: rayseg status {self.root}"
            )

    def release(self) -> None:
        """Stop renewing and delete the object, unless another driver holds it."""
        self._stop.set()
        self._thread.join()
        holder = holder_of(self.root)
        if holder and holder.owner == self.owner:
            _path(self.root).unlink(missing_ok=True)

    def _put(self, etag: str) -> str:
        path, self._beats = _path(self.root), self._beats + 1
        about = {"owner": self.owner, "host": socket.gethostname(), "machine": _machine(), "pid": str(os.getpid())}
        # The store compares and writes at once, so that of two drivers one wins.
        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        try:
            path.fs.pipe_file(path.path, f"{self.owner} {self._beats}".encode(), Metadata=about, **condition)
        except OSError as error:
            cause, condition_failed = error.__cause__, {"PreconditionFailed", "ConditionalRequestConflict"}
            if not (isinstance(cause, ClientError) and cause.response["Error"]["Code"] in condition_failed):
                raise
            # Perhaps an earlier try of this request succeeded and its answer was lost: the object names its owner.
        holder = holder_of(self.root)
        if holder is None or holder.owner != self.owner:
            raise FileExistsError(path.path)
        self._seen = time.time()
        return holder.etag

    def _renew(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self._etag = self._put(self._etag)
            except FileExistsError:
                self.lost = holder_of(self.root)
                return
            except FileNotFoundError:
                self._etag = ""  # somebody deleted the object: the next beat writes it again
            except STORE_ERRORS:
                continue  # the next beat tries again


def holder_of(root: str) -> Holder | None:
    """The driver that holds the run at `root`, or that held it when it was killed; None if it ended by itself."""
    path = _path(root)
    bucket, key, _ = path.fs.split_path(path.path)
    try:
        head: dict[str, Any] = path.fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    # Both times are the store's: the clocks of two drivers may differ by minutes.
    now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
    about = head["Metadata"]
    return Holder(
        about.get("owner", ""),
        about.get("host", "?"),
        about.get("machine", ""),
        int(about.get("pid", 0)),
        head["ETag"],
        max(0.0, (now - head["LastModified"]).total_seconds()),
    )


@contextmanager
def held(root: str) -> Iterator[Lease]:
    """Hold the run at `root`, an s3 prefix; wait if another driver may have been killed.

    Raises:
        ConfigError: another driver works on the run.
    """
    lease = _taken(root)
    try:
        yield lease
    finally:
        lease.release()


def _taken(root: str) -> Lease:
    holder = first = holder_of(root)
    while holder and first and holder.alive:
        # A killed driver does not beat any more: look until it does, or has missed too many beats.
        if holder.etag != first.etag:
            raise ConfigError(f"another driver works on {root} ({holder}); wait for it, or choose another --out")
        time.sleep(min(1.0, BEAT))
        holder = holder_of(root)
    try:
        return Lease(root, holder.etag if holder else "")
    except FileExistsError:
        raise ConfigError(
            f"another driver has just begun to work on {root} ({holder_of(root)}); wait for it, or choose another --out"
        ) from None


def _path(root: str) -> Any:  # noqa: ANN401 - a UPath with s3fs's methods
    return upath(root) / ".driver"


def _machine() -> str:
    """This machine, or container: process ids are unique in it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text().strip() if boot.exists() else socket.gethostname()
    space = Path("/proc/self/ns/pid")
    return f"{name} {space.readlink()}" if space.is_symlink() else name
