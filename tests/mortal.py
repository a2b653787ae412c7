"""Commands that are killed for real: started as processes, watched, and looked for afterwards."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import geopandas
from small_world import rayseg

from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Step
from rayseg.steps.map import read_manifest

HERE = Path(__file__).parent
TABLE = []
"""(what was killed, what happened, tiles computed again) of the tests that died; shown at the end."""
PLENTY = 300.0
"""Seconds that anything may take on a busy machine."""


def until(condition, seconds=PLENTY):
    """What `condition` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{condition} did not come true within {seconds:.0f} s"
        time.sleep(0.02)
    return found


class Command:
    """`rayseg ...` as a process with a folder for temporary files of its own."""

    def __init__(self, *words, faults=(), limit=-1):
        self.mark = uuid.uuid4().hex
        self.scratch = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))  # short: Ray's sockets lie below
        self.output, self.seen = self.scratch.with_suffix(".out"), self.scratch.with_suffix(".seen")
        self.seen.touch()
        environment = os.environ | {"TMPDIR": str(self.scratch), "MORTAL": self.mark, "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "FAULTS": " ".join(faults)}
        environment |= {"SEEN": str(self.seen)}
        environment |= {"LIMIT": str(limit), "RAY_worker_niceness": "0"}  # else a busy machine starves the workers
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "faulty.py"), *map(str, words)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
            )

    def kill(self):
        """kill -9 of the command itself, and of nothing else."""
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait(PLENTY) == -signal.SIGKILL, self.said()

    def ended(self):
        """The command's exit code, once it has ended."""
        return self.process.wait(PLENTY)

    def said(self):
        """What it wrote to stderr."""
        return self.output.read_text()

    def left(self):
        """Processes that it started and that live."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if self.mark.encode() in (folder / "environ").read_bytes() and state != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def met(self, stage):
        """How often a stage came to each tile."""
        return Counter(line.split()[1] for line in self.seen.read_text().splitlines() if line.split()[0] == stage)

    def leaves_nothing(self):
        """Whether, given some time, neither processes nor temporary files are left."""
        until(lambda: not self.left() and not list(self.scratch.iterdir()))
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *self.left()] if self.process.poll() is None or self.left() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.output.unlink()
        self.seen.unlink()


class Nodes:
    """A Ray cluster on this machine: a head without CPUs, which drivers join, and nodes that can be killed."""

    def __init__(self, **has):
        from ray.cluster_utils import Cluster

        here = {"object_store_memory": 256 << 20}
        self.has = here | {"num_cpus": 2} | has
        self.scratch = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # short: sockets lie below
        quick = {f"health_check_{name}_ms": 1000 for name in ("initial_delay", "period")}
        head = here | {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "temp_dir": str(self.scratch / "ray")}
        with patch.dict(os.environ, RAY_TMPDIR=str(self.scratch)):  # or every Ray of this machine finds its address
            self.cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": quick})
        self.address = self.cluster.address

    def grow(self, count):
        """Have so many nodes."""
        while len(self.cluster.worker_nodes) < count:
            self.cluster.add_node(**self.has)

    def kill(self, node):
        """kill -9 of the node's own processes; those of its workers end with them."""
        self.cluster.remove_node(node, allow_graceful=False)

    def pause(self, node, seconds):
        """Have nothing of a node answer for a while, as behind a network that is cut."""
        [raylet] = [found.process.pid for found in node.all_processes["raylet"]]
        pids = [raylet, *map(int, Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split())]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def drain(self, node, seconds):
        """Give notice that a node ends, and end it after so many seconds, as spot machines do."""
        from ray._raylet import GcsClient

        reason = 2  # DRAIN_NODE_REASON_PREEMPTION
        deadline = round((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "spot", deadline)
        assert accepted, why
        time.sleep(seconds)
        self.kill(node)

    def of(self, pid):
        """The node that a worker belongs to."""
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return next(node for node in self.all() if node.all_processes["raylet"][0].process.pid == parent)

    def all(self):
        """Those that live, the head aside."""
        return list(self.cluster.worker_nodes)

    def end(self):
        """End the cluster."""
        self.cluster.shutdown()
        shutil.rmtree(self.scratch, ignore_errors=True)


class World:
    """A scene, a model, and the run that nothing disturbed."""

    def __init__(self, root, model, catalogue):
        self.model, self.catalogue = model, catalogue
        self.whole = root / "whole"
        found = rayseg(*self.words(self.whole))
        assert found.exit_code == 0, found.output
        self.tiles = [row["id"] for row in manifest(self.whole)]

    def words(self, out, *more, engine="inline"):
        """The command that maps the scene to `out`."""
        given = ("predict", self.model, self.catalogue, "--out", out, "--engine", engine)
        return *given, "--set", "map.tile=128", *more

    def is_whole(self, out):
        """Whether a run has the same files with the same arrays and polygons as the undisturbed one, and no others."""
        ledger = {row: record.status for row, record in records(out).items()}
        assert ledger == {row: record.status for row, record in records(self.whole).items()}
        # A node that was cut off may still write a file that another one has written, with the same bytes.
        until(lambda: names(out) == names(self.whole), 30)
        for path in self.whole.glob("tiles/*/*"):
            if path.suffix != ".json":
                assert (out / path.relative_to(self.whole)).read_bytes() == path.read_bytes(), path
        mine, other = (geopandas.read_parquet(root / "polygons.parquet") for root in (out, self.whole))
        assert mine.equals(other)
        assert len(mine) > 5
        return True


def names(root):
    """Files of a run but those whose names count attempts or seconds."""
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    timed = ("/ledger/", "/tensorboard/")
    return {name for name in found if name.endswith(".part") or not any(part in name for part in timed)}


def manifest(root):
    return read_manifest(Step("predict", str(root), "", None))


def records(root):
    return Ledger(str(root / "steps" / "predict" / "ledger")).read()


def settled(root, count):
    """A condition: so many tiles stand in the ledger."""
    return lambda: len(list((root / "steps" / "predict" / "ledger").glob("[!.]*.json"))) >= count
