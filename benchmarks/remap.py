"""What another threshold costs: `rayseg remap` of a run, against the `rayseg predict` that made it.

    remap.py MODEL REGION [--tile 2048] [--rounds 3]

Each is a process of its own, inline, without a certificate; the middle of the rounds is shown. `per tile` leaves out
what does not grow with the region: the start of Python and of the model, the report and the QGIS project. Target: 5 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import measured, middle, show

FIXED = ("model", "qgis", "report")
"""Steps whose time does not grow with the region."""


def command(*words):
    """The cost of a command."""
    with measured() as cost:
        subprocess.run([sys.executable, "-m", "rayseg", *map(str, words)], check=True, capture_output=True)
    return cost


def steps(run):
    """Seconds of a run's steps that grow with the region, and its tiles."""
    content = json.loads((run / "run.json").read_bytes())
    counts = content["steps"]["predict"]["account"]
    return {name: step["seconds"] for name, step in content["steps"].items() if name not in FIXED}, sum(counts.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("region")
    parser.add_argument("--tile", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    costs, pace, tiles = {"predict": [], "remap": []}, {"predict": [], "remap": []}, 0
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            one, other = Path(folder, "one"), Path(folder, "other")
            options = ("--engine", "inline", "--out")
            settings = ("--set", f"map.tile={given.tile}", "--set", "certificate=false")
            costs["predict"].append(command("predict", given.model, given.region, *settings, *options, one))
            costs["remap"].append(command("remap", one, "--set", "threshold=.7", *options, other))
            for name, run in (("predict", one), ("remap", other)):
                seconds, tiles = steps(run)
                pace[name].append(seconds)
    whole = {name: middle(rounds) for name, rounds in costs.items()}
    growing = {name: sorted(sum(one.values()) for one in rounds)[len(rounds) // 2] for name, rounds in pace.items()}
    rows = [(name, whole[name].wall, whole[name].cpu, growing[name], 1000 * growing[name] / tiles) for name in costs]
    shares = [f"{100 * after / before:.1f} %" for before, after in zip(rows[0][1:], rows[1][1:], strict=True)]
    title = f"{given.model} over {given.region}: {tiles} tiles of {given.tile} px, {given.rounds} rounds"
    show(
        title, ("command", "wall s", "CPU s", "steps that grow, s", "ms a tile"), [*rows, ("remap of predict", *shares)]
    )
    for name, rounds in pace.items():
        print(name, {step: round(seconds, 2) for step, seconds in rounds[-1].items()})


if __name__ == "__main__":
    main()
