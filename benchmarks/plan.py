"""The estimate of `rayseg plan` against the measured run: seconds from start to end, and bytes written.

    python benchmarks/plan.py superpixel demo
    python benchmarks/plan.py predict SCENE --set model=PREFIX

Both are commands of their own, with the inline engine. Target: within 25 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import show


def rayseg(*words: str) -> str:
    """What a command of rayseg prints."""
    whole = [sys.executable, "-m", "rayseg", *words]
    return subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Plan, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("region")
    parser.add_argument("--config", help="as of `rayseg run pipeline`")
    parser.add_argument("--set", action="append", default=[], help="as of `rayseg run pipeline`; may be repeated")
    asked = parser.parse_args()
    words = ["pipeline", asked.pipeline, "--region", asked.region]
    words += ["--config", asked.config] if asked.config else []
    words += [part for text in asked.set for part in ("--set", text)]
    began = time.perf_counter()
    plan = json.loads(rayseg("plan", *words, "--json"))
    planned = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as name:
        out, began = Path(name, "run"), time.perf_counter()
        rayseg("run", *words, "--engine", "inline", "--out", str(out))
        took = time.perf_counter() - began
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rows = [
        ["seconds", plan["wall_seconds"], took, took / plan["wall_seconds"]],
        ["MB written", plan["bytes_written"] / 1e6, written / 1e6, written / plan["bytes_written"]],
    ]
    title = f"{asked.pipeline} of {asked.region}: {plan['tiles']} tiles, planned in {planned:.0f} s"
    show(title, ("", "plan", "run", "run / plan"), rows)
    print("; ".join(plan["unknown"]))


if __name__ == "__main__":
    main()
