"""What the benchmarks share: wall and processor seconds of a stretch of work, the machine in a line, tables."""

import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass
class Cost:
    """Seconds on the wall, and of processors (user + system) by this process and the children it waited for."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """The cost of the block, filled in at its end."""
    cost, wall, cpu = Cost(), time.perf_counter(), processor_seconds()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, processor_seconds() - cpu


def processor_seconds() -> float:
    """User and system seconds of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_mib() -> float:
    """Most memory this process has held, MiB; the system's own record of a child starts with its parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(median(cost.wall for cost in costs), median(cost.cpu for cost in costs))


def machine() -> str:
    """Processor, how much of it, and how busy it is with other things."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s+: (.*)", info.read_text()) if info.exists() else []
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} logical CPUs; load average {load} (1, 5, 15 minutes)"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as Markdown, with the machine below it."""
    lines = [columns, ["---"] * len(columns), *([_text(value) for value in row] for row in rows)]
    print(f"\n{title}\n")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    print(f"\n{machine()}", flush=True)


def _text(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def tree_seconds(pid: int | None = None) -> float:
    """User and system seconds of a process and all below it that live, and of those they have waited for."""
    tick, seconds, children = os.sysconf("SC_CLK_TCK"), {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) / tick
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = 0.0, [pid or os.getpid()]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        found += seconds.get(one, 0.0)
    return found


@contextmanager
def served(program: str, argument: object) -> Iterator[str]:
    """The address of a server on loopback: a program of Python in a process of its own, given its port and one more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", program, str(port), str(argument)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
