"""One execution of a pipeline: its output prefix, its steps, and the results of steps that have finished.

<run>/run.json                   pipeline, region, config, versions, status
<run>/steps/request.json         pipeline, region and config again, written once: run.json is rebuilt from it
<run>/steps/<step>/begun.json    the step's key: a hash of its function, settings, inputs and package version
<run>/steps/<step>/done.json     the same key, the value that the step returned and the files it wrote; the step is
                                 not called again
<run>/damaged.json               files that `verify` found damaged; the next command computes them again
"""

import fcntl
import hashlib
import json
import logging
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel
from upath import UPath

from rayseg import __version__
from rayseg.config import Config
from rayseg.engine import progress
from rayseg.engine.lease import Lease, held, holder_of
from rayseg.engine.ledger import MISSING, WITHDRAWN, Account, Ledger
from rayseg.engine.manifest import read_rows
from rayseg.engine.verify import Damage, damage_of, verify_step
from rayseg.errors import ConfigError
from rayseg.geo.region import Region
from rayseg.store import (
    HERE,
    STORE_ERRORS,
    Files,
    absolute,
    checksum,
    is_local,
    listing,
    public,
    put,
    read_json,
    recorded,
    relocated,
    sweep,
    upath,
    within,
)

NAMED = 20
"""Failed rows of a step, or damaged files, that a report names."""
LOCK_TRIES = 20
"""Tries, 0.05 s apart, to take the lock of a run before the run counts as locked by another process."""
KEYS_OF_MODULES = {
    "rayseg.pipelines.al_s4gan.chip_pool": "rayseg.pool",
    "rayseg.pipelines.al_s4gan.pipeline": "rayseg.pipelines.al_s4gan",
    "rayseg.pipelines.al_s4gan.queries": "rayseg.active",
    "rayseg.pipelines.al_s4gan.segmenter": "rayseg.pipelines.al_s4gan",
    "rayseg.steps.chips": "rayseg.chips",
    "rayseg.steps.cues": "rayseg.cues",
    "rayseg.steps.evaluate": "rayseg.evaluation",
    "rayseg.steps.map": "rayseg.mapping",
    "rayseg.steps.report": "rayseg.publication",
    "rayseg.steps.super_resolution": "rayseg.enlarging",
}
"""Module -> the name under which its step functions enter the keys of steps. It is their module when keys were
introduced, so that a run resumes after its code has moved."""
KEYS_OF_STEPS = {
    ("gpc", "rayseg.steps.evaluate", "compare_truth"): ("rayseg.pipelines.gpc", "measure"),
    ("landcover", "rayseg.steps.evaluate", "compare_truth"): ("rayseg.pipelines.landcover", "measure"),
    ("al-s4gan", "rayseg.steps.evaluate", "compare_truth"): ("rayseg.pipelines.al_s4gan", "evaluate"),
    ("superpixel", "rayseg.steps.scenes", "draw"): ("rayseg.pipelines.superpixel", "draw"),
    ("agri", "rayseg.steps.plots", "write_plots"): ("rayseg.pipelines.agri", "write_plots"),
    ("agri", "rayseg.steps.evaluate_plots", "evaluate_run"): ("rayseg.pipelines.agri", "measure"),
    ("agri", "rayseg.steps.plots", "write_report"): ("rayseg.pipelines.agri", "write_report"),
    ("superpixel", "rayseg.steps.scenes", "write_report"): ("rayseg.pipelines.superpixel", "write_report"),
}
"""(pipeline, module, step function) -> the names under which it enters the keys, for functions that moved alone."""
_log = logging.getLogger(__name__)
LIBRARIES = ("torch", "ray", "rasterio", "segmentation-models-pytorch", "numpy")


@dataclass(frozen=True)
class Engine:
    """Where the stages of a run execute; the results do not depend on it.

    Attributes:
        kind: "ray", or "inline" for this process alone.
        address: of a Ray cluster; None starts a private one.
        retry: whether rows that failed before are processed again.
    """

    kind: str = "ray"
    address: str | None = None
    retry: bool = False


@dataclass(frozen=True)
class Step:
    """A step of a run: an argument of its own function and, once finished, of the steps after it.

    Attributes:
        name: of the step.
        root: prefix of the run.
        key: hash of everything that determines the result.
        engine: where it executes.
        value: the function's return value (JSON values).
        seconds: run time, all attempts together.
    """

    name: str
    root: str
    key: str
    engine: Engine
    value: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def prefix(self) -> UPath:
        """Folder or URL of the step's files."""
        return upath(self.root) / "steps" / self.name

    @property
    def manifest(self) -> UPath:
        """The file with the rows that the step processes."""
        return self.prefix / "manifest.parquet"


@dataclass
class Run:
    """An output prefix that belongs to one pipeline, region and configuration.

    Attributes:
        root: the prefix.
        request: pipeline, region and configuration, as run.json stores them.
        engine: where the stages execute.
        steps: the finished steps, in order.
        troubles: step -> row -> reason, of rows that failed.
        plan: the return value of the check of a new run; None for a run that is resumed.
        lease: the hold on a run on s3.
    """

    root: str
    request: dict[str, Any]
    engine: Engine
    steps: list[Step] = field(default_factory=list)
    troubles: dict[str, dict[str, str]] = field(default_factory=dict)
    plan: Any = None
    lease: Lease | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        out: str,
        *,
        pipeline: str,
        config: Config,
        region: Region,
        engine: Engine | None = None,
        check: Callable[[], Any] | None = None,
    ) -> Iterator["Run"]:
        """Begin or resume the run at `out`, and write its final status to run.json, also after an error.

        Args:
            out: prefix of the run.
            pipeline: name of the pipeline.
            config: its configuration.
            region: the region to map.
            engine: where the stages execute; by default Ray.
            check: called for a new run before anything is written, so that an error it raises leaves no file at `out`;
                its return value is the run's `plan`.

        Raises:
            ConfigError: `out` cannot be written, belongs to another run, or another process writes to it; or a URL
                among the arguments holds a secret.
        """
        out = absolute(out).rstrip("/")
        request = {"pipeline": pipeline, "region": asdict(region), "config": config.model_dump(mode="json")}
        # 1. refuse what run.json would disclose to everybody who reads the results
        text = json.dumps(request | {"out": out}, default=str)
        if secrets := [public(url) for url in re.findall(r'[^"\s]+', text) if public(url) != url]:
            raise ConfigError(
                f"{secrets[0]} holds a secret, which run.json would store; sign URLs with RAYSEG_SIGN, or give keys by "
                "AWS_PROFILE"
            )
        # 2. check a new run while `out` is untouched; a bucket is tried first, because a check can take minutes
        run = cls(out, request, engine or Engine())
        new = _is_new(out, request)
        if not is_local(out):
            _ensure_writable(out)
        if new and check:
            run.plan = check()
        _ensure_writable(out)
        with _locked(out) as run.lease:
            # 3. look again under the lock: another command may have begun its run during the check
            if _is_new(out, request):
                put(
                    upath(out) / "steps" / "request.json",
                    json.dumps(relocated(request, out, HERE) | {"status": "running"}).encode(),
                )
            started = time.time()
            run.save("running", started)
            ended = "stopped"  # unless the block ends without an error
            try:
                yield run
                sweep(out)  # not after an error: other processes may still write
                (upath(out) / "damaged.json").unlink(missing_ok=True)
                ended = "incomplete" if run.troubles else "done"
            finally:
                error = sys.exc_info()[1]
                run.save(ended, started, reason=f"{type(error).__name__}: {error}" if error else "")

    def step(self, name: str, function: Callable[..., dict[str, Any]], *arguments: object, **planned: object) -> Step:
        """Call `function(step, *arguments, **planned)`, or take the value of its first finished call with this key.

        The function writes below `step.prefix` (or under keys that are the same each time) and returns JSON values. A
        step that was interrupted is called again and resumes from the files it left. When the function returns
        "troubles" (id -> reason), the run continues and ends as incomplete; `retry` calls the step again.

        Args:
            name: of the step.
            function: of the step.
            arguments: determine the result: they are part of the key.
            planned: results of the run's check; the function computes those that are missing, so they are not part of
                the key.
        """
        # 1. look the key up: rows without a record, and on a retry all troubles, leave a step unfinished
        keys = self._keys(function, arguments)
        step = Step(name, self.root, keys[0], self.engine)
        done, begun = read_json(step.prefix / "done.json"), read_json(step.prefix / "begun.json")
        troubles = done["value"].get("troubles", {}) if done.get("key") in keys else None
        if troubles is not None and not begun:
            begun = {name: value for name, value in done.items() if name != "value"}
            put(step.prefix / "begun.json", json.dumps(begun).encode())
        # 2. damaged files leave a step unfinished, too
        known = troubles is not None or begun.get("key") in keys
        damage = self._remove_damage(step, done) if known else {}
        if troubles is None or damage or MISSING in troubles.values() or (troubles and self.engine.retry):
            with progress.step(len(self.steps) + 1, name):
                done = self._call(step, begun if known else {}, partial(function, step, *arguments, **planned))
        # 3. a finished step has the key of its value: later steps depend on that
        value = relocated(done["value"], HERE, self.root)
        step = Step(name, self.root, _hash([done["key"], done["value"]]), self.engine, value, done["seconds"])
        if step.value.get("troubles"):
            self.troubles[name] = step.value["troubles"]
        self.steps.append(step)
        return step

    def _call(self, step: Step, begun: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Call a step's function; return the content of `done.json`.

        Args:
            step: the step.
            begun: what `begun.json` keeps of interrupted calls; {} if there are none with these settings.
            function: without its arguments.
        """
        if not begun:
            if step.prefix.is_dir():  # files of other settings
                step.prefix.rmdir(recursive=True)
            begun = {"key": step.key, "at": time.time(), "seconds": 0.0}
            put(step.prefix / "begun.json", json.dumps(begun).encode())
        started = time.perf_counter()
        with recorded() as written:
            try:
                returned = function()
            finally:
                kept = {path: file for path, file in begun.get("files", {}).items() if path in self._present}
                # Records are verified by reading them.
                new = {path: file for path, file in within(written, self.root).items() if "/ledger/" not in path}
                begun["files"] = kept | new
                begun["seconds"] += time.perf_counter() - started
                put(step.prefix / "begun.json", json.dumps(begun).encode())
        if (name := f"steps/{step.name}/manifest.parquet") not in begun["files"] and step.manifest.exists():
            content = step.manifest.read_bytes()  # written by a call that was killed
            begun["files"][name] = (len(content), checksum(content))
        if self.lease:
            self.lease.expect_held()
        # Stored relative to the run, so that a run that was moved finds its files.
        done = begun | {"value": relocated(returned, self.root, HERE)}
        put(step.prefix / "done.json", json.dumps(done, indent=1).encode())
        return done

    @cached_property
    def _present(self) -> dict[str, int]:
        """Path -> bytes of the run's files when it was opened, without those that `verify` found damaged."""
        marked = read_json(upath(self.root) / "damaged.json")
        return {path: size for path, size in listing(self.root).items() if path not in marked}

    def _remove_damage(self, step: Step, done: dict[str, Any]) -> Damage:
        """Delete and withdraw what is damaged of a step's results, so that its function computes that again."""
        damage = damage_of(self._own_files.get(step.name, {}), self._present)
        for path in damage:  # a function may keep a file that exists
            (upath(self.root) / path).unlink(missing_ok=True)
            self._present.pop(path, None)
        damage |= verify_step(step.prefix, self._present, planned=_recorded_rows(done), mend=True)[0]
        for path, why in list(damage.items())[:NAMED]:
            _log.warning("%s: %s; it is computed again", path, why)
        return damage

    @cached_property
    def _own_files(self) -> dict[str, Files]:
        return _own_files(self.root)

    def _keys(self, function: Callable[..., object], arguments: tuple[object, ...]) -> tuple[str, str]:
        """The key of a step, and its key in older runs, whose keys contain paths of the run as they are."""
        module = KEYS_OF_MODULES.get(function.__module__, function.__module__)
        moved = (self.request.get("pipeline", ""), function.__module__, function.__qualname__)
        names = [*KEYS_OF_STEPS.get(moved, (module, function.__qualname__)), __version__]
        plain = [_plain(value) for value in arguments]
        return _hash([*names, _with_prefix(plain, f"{self.root}/", f"{HERE}/")]), _hash([*names, plain])

    def save(self, status: str, started: float, *, reason: str = "") -> None:
        """Write run.json."""
        if self.lease:
            self.lease.expect_held()  # the other driver writes run.json now
        content = self.request | {
            "status": status,
            "reason": public(reason),
            "command": public(" ".join(sys.argv)),
            "engine": asdict(self.engine),
            "versions": versions(),
            "started": started,
            "seconds": time.time() - started,
            # Values of finished steps, so that other programs need this file alone.
            "steps": {step.name: {"seconds": step.seconds} | step.value for step in self.steps},
        }
        text = json.dumps(relocated(content, self.root, HERE), indent=1, default=str)
        put(upath(self.root) / "run.json", text.encode())


def key_of(root: str, step: str) -> str:
    """The key of a run's finished step and its value; another if the step is executed with other inputs."""
    done = read_json(upath(root) / "steps" / step / "done.json")
    return _hash([done.get("key"), done.get("value")])


def status(root: str) -> dict[str, Any]:
    """The progress of a run: its status, its steps and, for every step that processes rows, the ledger's counts.

    Returns:
        `status` with its `reason` or ""; `times`: step -> seconds, None if it has not finished, in the order of their
        begin; `steps`: step -> planned, counts (status -> rows) and troubles (row -> reason); `damaged`: what `verify`
        found and no command has repaired yet.
    """
    content = read(root)
    steps, unread = {}, 0
    for manifest in sorted(upath(root).glob("steps/*/manifest.parquet")):
        try:
            ids = read_rows(manifest, columns=["id"]).ids
        except pa.ArrowInvalid:
            _log.warning("%s is damaged; the next run of the command writes it again", manifest)
            unread += 1
            continue
        account = Ledger(str(manifest.parent / "ledger")).account(ids.chunks)
        steps[manifest.parent.name] = asdict(account)
    # A killed process leaves "running" behind, but not its lock.
    killed = content["status"] == "running" and not _is_locked(root)
    ended, reason = "killed" if killed else content["status"], content.get("reason", "")
    damaged = read_json(upath(root) / "damaged.json")
    if ended == "done" and (damaged or unread or any(step["troubles"] for step in steps.values())):
        ended = "incomplete"
        reason = f"files were lost or damaged after the run: rayseg verify {root} names them, rayseg retry repairs them"
    return {
        "run": root,
        "pipeline": content["pipeline"],
        "status": ended,
        "reason": reason,
        "times": {folder.name: read_json(folder / "done.json").get("seconds") for folder in _begun(root)},
        "steps": steps,
        "damaged": damaged,
    }


def verify(root: str, *, deep: bool = False) -> dict[str, Any]:
    """Compare the files of a run with what was written; note the damage, so that the next command repairs it.

    Args:
        root: prefix of the run.
        deep: whether to compare checksums, too, which reads every file.

    Returns:
        `files`: number of files that the run has; `damaged`: path -> what is wrong with it, in `damaged.json` too;
        `unknown`: rows whose files earlier versions did not record, so that nothing can be compared.
    """
    root = absolute(root).rstrip("/")
    finished = read(root)["status"] == "done"
    present, own, notes = listing(root), _own_files(root), upath(root) / "damaged.json"
    # 1. the files that say what the run is and how far it is
    control = ["run.json", *(f"steps/{f.name}/{name}.json" for f in _begun(root) for name in ("begun", "done"))]
    damage: Damage = {} if deep else read_json(notes)
    damage |= {path: "not a JSON object" for path in control if path in present and not read_json(upath(root) / path)}
    damage |= {path: "missing" for path in control if finished and path not in present}
    # 2. the files of each step, and of each of its rows
    unknown = 0  # rows
    for folder in _begun(root):
        damage |= damage_of(own.get(folder.name, {}), present, root=root if deep else None)
        rows = verify_step(folder, present, planned=_recorded_rows(read_json(folder / "done.json")), deep=deep)
        damage, unknown = damage | rows[0], unknown + rows[1]
    try:
        # 3. noted, so that the next command computes them again; a run that can only be read is verified all
        # the same
        put(notes, json.dumps(damage, indent=1).encode()) if damage else notes.unlink(missing_ok=True)
    except STORE_ERRORS as error:
        _log.warning("%s cannot be written (%s): the next command does not know of the damage", notes, error)
    return {"run": root, "files": len(present), "damaged": damage, "unknown": unknown}


def _own_files(root: str) -> dict[str, Files]:
    """Step -> the files that it wrote outside of its rows; of several steps that wrote a file, the last one has it."""
    own: dict[str, Files] = {}
    for folder in _begun(root):
        files = (read_json(folder / "done.json") or read_json(folder / "begun.json")).get("files", {})
        # In the order of their begin, so that the last writer of a file has it.
        own = {name: {path: file for path, file in of.items() if path not in files} for name, of in own.items()}
        own[folder.name] = files
    return own


def _recorded_rows(done: dict[str, Any]) -> int:
    """Number of rows that had a record when a step ended."""
    account: dict[str, int] = done.get("value", {}).get("account", {})
    return sum(account.values()) - account.get(WITHDRAWN, 0)


def status_text(report: dict[str, Any]) -> str:
    """The result of `status` as text lines."""
    lines = [f"{report['run']}: {report['pipeline']}, {report['status']}"]
    lines += [f"  {report['reason']}"] if report["reason"] else []
    steps, times = report["steps"], report["times"]
    for name in [*times, *(steps.keys() - times.keys())]:
        seconds = times.get(name)
        lines.append(f"  {name}: {'not finished' if seconds is None else f'{seconds:.1f} s'}")
        if name in steps:
            lines[-1] += f"; {Account(**steps[name])}"
            lines += [f"  {line}" for line in named_lines(steps[name]["troubles"])]
    return "\n".join([*lines, *named_lines(report["damaged"])])


def named_lines(reasons: Mapping[str, str]) -> list[str]:
    """The first failed rows or damaged files, with their reasons, as text lines."""
    lines = [f"  {name}: {why}" for name, why in list(reasons.items())[:NAMED]]
    return [*lines, f"  and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else lines


def versions() -> dict[str, str]:
    """Versions of rayseg, Python and the libraries that determine the numbers."""
    return {"rayseg": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in LIBRARIES}


def read(root: str) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
        ConfigError: `root` is not a run.
    """
    content = _content(root) if upath(root).is_dir() else {}
    if not content:
        raise ConfigError(f"{root} is not a run: it has no run.json; give the --out of a `rayseg run`")
    return content


def _is_new(out: str, request: dict[str, Any]) -> bool:
    """Whether `out` is empty; files that belong to another run or to something else raise ConfigError."""
    try:
        content = _content(out)
        # Hidden files do not count: `.DS_Store`, or the lock of a command that has just begun.
        foreign = not content and upath(out).is_dir() and any(not p.name.startswith(".") for p in upath(out).iterdir())
    except STORE_ERRORS as error:
        raise ConfigError(f"output {out} cannot be read: {error}; choose another --out") from None
    if foreign:
        raise ConfigError(f"output {out} holds files but is not a rayseg run; choose an empty or new --out")
    request = json.loads(json.dumps(request))  # tuples become lists, as in run.json
    if content and (other := [key for key in request if content.get(key) != request[key]]):
        difference = "; ".join(_difference(key, content.get(key), request[key]) for key in other)
        raise ConfigError(f"output {out} belongs to another run ({difference}); choose another --out or delete it")
    return not content


def _ensure_writable(out: str) -> None:
    try:
        # Only a write shows whether writing is allowed: permissions of buckets cannot be read.
        put(upath(out) / ".writable", b"")
        (upath(out) / ".writable").unlink(missing_ok=True)
    except STORE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "choose another --out" if is_local(out) else "check the bucket's name and your permission to write"
        raise ConfigError(f"output {out} cannot be written: {public(reason)}; {remedy}") from None


def _difference(key: str, there: object, here: object) -> str:
    """The first place where two JSON values differ, as `a.b is 1 there, 2 here`."""
    # Down to the first key that differs: whole configurations would fill the screen.
    if isinstance(there, dict) and isinstance(here, dict):
        for inner in sorted(there.keys() | here.keys()):
            if there.get(inner) != here.get(inner):
                return _difference(f"{key}.{inner}", there.get(inner), here.get(inner))
    return f"{key} is {str(there)[:60]} there, {str(here)[:60]} here"


@contextmanager
def _locked(out: str) -> Iterator[Lease | None]:
    """Hold the lock of a run on a local disk, which ends with the process, or the lease of a run on s3."""
    if out.startswith("s3://"):
        with held(out) as lease:
            yield lease
        return
    if not is_local(out):
        yield None
        return
    with Path(upath(out).path, ".lock").open("w") as lock:
        for _ in range(LOCK_TRIES):  # `_is_locked` of a status command holds the lock for a moment
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            raise ConfigError(f"another process is working on {out}; wait for it, or choose another --out")
        yield None


def _is_locked(root: str) -> bool:
    """Whether a process works on the run; True on stores where that cannot be known."""
    if root.startswith("s3://"):
        holder = holder_of(root)
        return holder is not None and holder.alive
    lock = Path(upath(root).path, ".lock")
    if not is_local(root) or not lock.exists():
        return not is_local(root)
    with lock.open() as file:
        try:
            # A shared lock: several status commands can test at the same time.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _content(root: str) -> dict[str, Any]:
    """What run.json holds, or `steps/request.json` if that is missing or damaged; {} for no run.

    Raises:
        ConfigError: run.json is damaged and there is nothing to rebuild it from.
    """
    path = upath(root) / "run.json"
    content = read_json(path) or read_json(upath(root) / "steps" / "request.json")
    if not content and path.exists():
        raise ConfigError(f"{path} is not a JSON object written by rayseg; remove it, or choose another --out")
    restored: dict[str, Any] = relocated(content, HERE, absolute(root).rstrip("/"))
    return restored


def _begun(root: str) -> list[UPath]:
    """Folders of the steps of a run, in the order of their begin."""
    folders = {path.parent for name in ("begun", "done") for path in upath(root).glob(f"steps/*/{name}.json")}
    at = {
        folder: (read_json(folder / "begun.json") or read_json(folder / "done.json")).get("at", 0.0)
        for folder in folders
    }
    return sorted(folders, key=lambda folder: (at[folder], folder.name))


def _with_prefix(value: Any, old: str, new: str) -> Any:  # noqa: ANN401 - JSON values
    """The value with `new` in place of `old` at the start of its texts; keys stay."""
    if isinstance(value, dict):
        return {key: _with_prefix(inner, old, new) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_prefix(inner, old, new) for inner in value]
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def _plain(value: object) -> object:
    """The part of an argument that determines the result, as JSON values."""
    if isinstance(value, Step):
        # The key of a finished step is that of its value, so later keys follow from it.
        return value.key
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
