"""One execution: its output prefix, its steps, and what is remembered of them.

<run>/run.json                   what was asked, with which versions, how it ended
<run>/steps/<step>/begun.json    the step's key: its function, settings, inputs and package version
<run>/steps/<step>/done.json     the same key and what the step returned; a step with it is not run again
"""

import fcntl
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import BaseModel
from upath import UPath

from rayseg import __version__
from rayseg.config import Config
from rayseg.engine.ledger import MISSING, Account, Ledger
from rayseg.errors import ConfigError
from rayseg.geo.region import Region
from rayseg.store import STORE_ERRORS, absolute, is_local, public, put, sweep, upath

NAMED = 20
LOOKS = 20
"""How often a lock that is held is asked for before it is taken for another driver's, a twentieth of a second apart."""
HERE = "<run>/"
"""What stands in done.json for the run's own prefix, so that a run that was moved goes on."""
KEYS_OF_MODULES = {
    "rayseg.pipelines.al_s4gan.chip_pool": "rayseg.pool",
    "rayseg.pipelines.al_s4gan.pipeline": "rayseg.pipelines.al_s4gan",
    "rayseg.pipelines.al_s4gan.queries": "rayseg.active",
    "rayseg.steps.chips": "rayseg.chips",
    "rayseg.steps.cues": "rayseg.cues",
    "rayseg.steps.evaluate": "rayseg.evaluation",
    "rayseg.steps.map": "rayseg.mapping",
    "rayseg.steps.report": "rayseg.publication",
    "rayseg.steps.super_resolution": "rayseg.enlarging",
}
"""Names by which the step functions of a module enter the keys of steps: where they stood when keys were first made,
so that a run goes on after its code has moved."""
KEYS_OF_STEPS = {
    ("gpc", "rayseg.steps.evaluate", "compare_truth"): ("rayseg.pipelines.gpc", "measure"),
    ("landcover", "rayseg.steps.evaluate", "compare_truth"): ("rayseg.pipelines.landcover", "measure"),
    ("al-s4gan", "rayseg.steps.evaluate", "compare_truth"): ("rayseg.pipelines.al_s4gan", "evaluate"),
}
"""(pipeline, module, step function) -> the names by which it enters the keys, where it moved without its module."""
LIBRARIES = ("torch", "ray", "rasterio", "segmentation-models-pytorch", "numpy")


@dataclass(frozen=True)
class Engine:
    """Where the stages of a run are carried out; never changes what they give.

    Attributes:
        kind: "ray", or "inline" for this process alone.
        address: of a Ray cluster; None starts a private one.
        retry: whether rows that failed before are tried again.
    """

    kind: str = "ray"
    address: str | None = None
    retry: bool = False


@dataclass(frozen=True)
class Step:
    """A step of a run, handed to its function and, once done, to the steps that follow.

    Attributes:
        name: of the step.
        root: prefix of the run.
        key: hash of everything that determines the result.
        engine: where to carry it out.
        value: what the function returned (JSON values).
        seconds: how long it took, in all sessions together.
    """

    name: str
    root: str
    key: str
    engine: Engine
    value: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def prefix(self) -> UPath:
        """Where the step keeps its files."""
        return upath(self.root) / "steps" / self.name


class Run:
    """An output prefix that belongs to one pipeline, region and configuration."""

    def __init__(self, root: str, asked: dict[str, Any], engine: Engine) -> None:
        self.root = root
        self.asked = asked
        self.engine = engine
        self.steps: list[Step] = []
        self.troubles: dict[str, dict[str, str]] = {}
        self.plan: Any = None
        """What the check of a new run returned; None for a run that is resumed."""

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
        """Begin or go on with the run at `out`; run.json tells how it ended, also when it ends by an error.

        Args:
            out: prefix of the run.
            pipeline: name of the pipeline.
            config: its configuration.
            region: what is mapped.
            engine: where stages are carried out; by default Ray.
            check: called for a new run before anything is written; what it raises leaves no trace at `out`, what it
                returns is the run's `plan`.

        Raises:
            ConfigError: `out` cannot be written, belongs to another run, or is being worked on by another process.
        """
        out = absolute(out).rstrip("/")
        asked = {"pipeline": pipeline, "region": asdict(region), "config": config.model_dump(mode="json")}
        _expect_no_secret(asked | {"out": out})
        run = cls(out, asked, engine or Engine())
        new = _is_new(out, asked)
        if not is_local(out):
            _ensure_writable(out)  # a bucket keeps no trace of it, and planning can take long
        if new and check:
            run.plan = check()
        _ensure_writable(out)
        with _alone(out):
            started = time.time()
            run.save("running", started)
            ended = "stopped"
            try:
                yield run
                sweep(out)  # not after an error: others may still be writing, and miss what is removed
                ended = "incomplete" if run.troubles else "done"
            finally:
                error = sys.exc_info()[1]
                run.save(ended, started, reason=f"{type(error).__name__}: {error}" if error else "")

    def step(self, name: str, function: Callable[..., dict[str, Any]], *arguments: object, **planned: object) -> Step:
        """What `function(step, *arguments, **planned)` returns, from its first finished execution with the same key.

        The function writes below `step.prefix` (or under keys of its own that are the same each time) and returns
        JSON values. An unfinished step is called again and goes on from what it finds there. When it returns
        "troubles" (id -> reason), the run goes on and ends as incomplete; `retry` calls the step again.

        Args:
            name: of the step.
            function: the step.
            arguments: determine the result: they enter the key.
            planned: what the check of the run found out already; the function finds the same by itself where it is
                missing, so it does not enter the key.
        """
        keys = self._keys(function, arguments)
        step = Step(name, self.root, keys[0], self.engine)
        done = _load(step.prefix / "done.json")
        if done.get("key") not in keys or self._unfinished(done["value"].get("troubles", {})):
            done = self._carry_out(step, keys, partial(function, step, *arguments, **planned))
        value = _with_prefix(done["value"], HERE, f"{self.root}/")
        step = Step(name, self.root, _hash([done["key"], done["value"]]), self.engine, value, done["seconds"])
        if step.value.get("troubles"):
            self.troubles[name] = step.value["troubles"]
        self.steps.append(step)
        return step

    def _keys(self, function: Callable[..., object], arguments: tuple[object, ...]) -> tuple[str, str]:
        """The key of a step, and its key in runs that were begun when paths of the run entered it as they are."""
        module = KEYS_OF_MODULES.get(function.__module__, function.__module__)
        moved = (self.asked.get("pipeline", ""), function.__module__, function.__qualname__)
        names = [*KEYS_OF_STEPS.get(moved, (module, function.__qualname__)), __version__]
        plain = [_plain(value) for value in arguments]
        return _hash([*names, _with_prefix(plain, f"{self.root}/", HERE)]), _hash([*names, plain])

    def _unfinished(self, troubles: dict[str, str]) -> bool:
        """Whether a finished step is to be called again: for rows it never came to, or for all troubles on a retry."""
        return MISSING in troubles.values() or bool(troubles and self.engine.retry)

    def _carry_out(self, step: Step, keys: tuple[str, str], call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        begun = _load(step.prefix / "begun.json")
        if begun.get("key") not in keys:
            _clear(step.prefix)
            begun = {"key": step.key, "at": time.time(), "seconds": 0.0}
            put(step.prefix / "begun.json", json.dumps(begun).encode())
        started = time.perf_counter()
        try:
            value = call()
        finally:
            begun["seconds"] += time.perf_counter() - started
            put(step.prefix / "begun.json", json.dumps(begun).encode())
        kept = _with_prefix(value, f"{self.root}/", HERE)
        done = {"key": begun["key"], "value": kept, "seconds": begun["seconds"]}
        put(step.prefix / "done.json", json.dumps(done, indent=1).encode())
        return done

    def save(self, status: str, started: float, *, reason: str = "") -> None:
        """Write run.json."""
        content = self.asked | {
            "status": status,
            "reason": public(reason),
            "command": public(" ".join(sys.argv)),
            "engine": asdict(self.engine),
            "versions": versions(),
            "started": started,
            "seconds": time.time() - started,
            "steps": {step.name: {"seconds": step.seconds} | step.value for step in self.steps},
        }
        put(upath(self.root) / "run.json", json.dumps(content, indent=1, default=str).encode())


def status(root: str) -> dict[str, Any]:
    """How far a run is: its status, its steps and, for every step that works row by row, the counts of its ledger.

    Returns:
        `status` and, where it says so, its `reason`; `times`: name -> seconds of every finished step, None of one that
        was begun, in order; `steps`: name -> planned, counts (status -> rows) and troubles (row -> reason).
    """
    asked = read(root)
    steps = {}
    for manifest in sorted(upath(root).glob("steps/*/manifest.parquet")):
        with manifest.open("rb") as file:
            ids = pq.read_table(file, columns=["id"])["id"]
        account = Ledger(str(manifest.parent / "ledger")).account(ids.chunks)
        steps[manifest.parent.name] = asdict(account)
    gone = asked["status"] == "running" and not _is_held(root)
    return {
        "run": root,
        "pipeline": asked["pipeline"],
        "status": "killed" if gone else asked["status"],
        "reason": asked.get("reason", ""),
        "times": _times(root),
        "steps": steps,
    }


def _times(root: str) -> dict[str, float | None]:
    """Seconds of every step of a run, None where it is not done, in the order they were begun."""
    folders = [path.parent for path in upath(root).glob("steps/*/begun.json")]
    begun = sorted((_load(folder / "begun.json").get("at", 0.0), folder.name, folder) for folder in folders)
    return {name: _load(folder / "done.json").get("seconds") for _, name, folder in begun}


def status_text(report: dict[str, Any]) -> str:
    """`status` in lines for people."""
    lines = [f"{report['run']}: {report['pipeline']}, {report['status']}"]
    lines += [f"  {report['reason']}"] if report["reason"] else []
    steps, times = report["steps"], report["times"]
    for name in [*times, *(steps.keys() - times.keys())]:
        seconds = times.get(name)
        lines.append(f"  {name}: {'not finished' if seconds is None else f'{seconds:.1f} s'}")
        if name in steps:
            lines[-1] += f"; {Account(**steps[name])}"
            lines += [f"    {row}: {reason}" for row, reason in list(steps[name]["troubles"].items())[:NAMED]]
            more = len(steps[name]["troubles"]) - NAMED
            lines += [f"    and {more} more"] if more > 0 else []
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of rayseg, Python and the libraries that shape the numbers."""
    return {"rayseg": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in LIBRARIES}


def read(root: str) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
        ConfigError: there is no run at `root`.
    """
    content = _load(upath(root) / "run.json") if upath(root).is_dir() else {}
    if not content:
        raise ConfigError(f"{root} is no run: it has no run.json; give the folder that was --out of `rayseg run`")
    return content


def _expect_no_secret(asked: dict[str, Any]) -> None:
    """Refuse URLs with keys or logins in them: run.json would tell everybody who reads the results."""
    text = json.dumps(asked, default=str)
    if public(text) != text:
        found = next(word for word in re.findall(r'[^"\s]*://[^"\s]*', text) if public(word) != word)
        raise ConfigError(
            f"{public(found)} has a secret in it, which run.json would keep; sign with RAYSEG_SIGN, or give keys by "
            "AWS_PROFILE"
        )


def _is_new(out: str, asked: dict[str, Any]) -> bool:
    """Whether there is nothing at `out` yet; what belongs to another run is refused."""
    try:
        found = _load(upath(out) / "run.json")
        foreign = not found and upath(out).is_dir() and any(not p.name.startswith(".") for p in upath(out).iterdir())
    except STORE_ERRORS as error:
        raise ConfigError(f"output {out} cannot be read: {error}; choose another --out") from None
    if foreign:
        raise ConfigError(f"output {out} holds files that are not of a rayseg run; choose an empty or new --out")
    other = [key for key in asked if found and found.get(key) != json.loads(json.dumps(asked[key]))]
    if other:
        difference = "; ".join(_difference(key, found.get(key), json.loads(json.dumps(asked[key]))) for key in other)
        raise ConfigError(f"output {out} belongs to another run ({difference}); choose another --out or delete it")
    return not found


def _ensure_writable(out: str) -> None:
    try:
        put(upath(out) / ".writable", b"")
        (upath(out) / ".writable").unlink(missing_ok=True)
    except STORE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "choose another --out" if is_local(out) else "check the bucket's name and that you may write there"
        raise ConfigError(f"output {out} cannot be written: {public(reason)}; {remedy}") from None


def _difference(key: str, found: object, asked: object) -> str:
    """The first place where two JSON values differ, as `a.b is 1 there, 2 here`."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for inner in sorted(found.keys() | asked.keys()):
            if found.get(inner) != asked.get(inner):
                return _difference(f"{key}.{inner}", found.get(inner), asked.get(inner))
    return f"{key} is {str(found)[:60]} there, {str(asked)[:60]} here"


@contextmanager
def _alone(out: str) -> Iterator[None]:
    """Hold the run's lock while it is worked on; the system lets go of it when the process dies."""
    if not is_local(out):
        yield
        return
    with Path(upath(out).path, ".lock").open("w") as lock:
        for _ in range(LOOKS):  # who asks for the state of a run holds the lock for a moment
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            raise ConfigError(f"another process is working on {out}; wait for it, or choose another --out")
        yield


def _is_held(root: str) -> bool:
    """Whether a process works on the run; taken for granted where that cannot be known."""
    lock = Path(upath(root).path, ".lock")
    if not is_local(root) or not lock.exists():
        return not is_local(root)
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _load(path: UPath) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} was not written by rayseg: it is no JSON object; remove it, or choose another --out")
    return loaded


def _with_prefix(value: Any, old: str, new: str) -> Any:  # noqa: ANN401 - JSON values
    """A value in which all texts that begin with `old` begin with `new` instead; keys stay."""
    if isinstance(value, dict):
        return {key: _with_prefix(inner, old, new) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_prefix(inner, old, new) for inner in value]
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def _clear(prefix: UPath) -> None:
    if prefix.is_dir():
        prefix.rmdir(recursive=True)


def _plain(value: object) -> object:
    """What of an argument determines the result, as JSON values."""
    if isinstance(value, Step):
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
