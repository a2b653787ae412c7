"""How far long work is, on stderr: a bar in a terminal, lines in a file or notebook, or lines of JSON.

A line names the step of the run: `3 segmenter: epoch 12/80, loss 0.41, iou 0.87, 1 min left`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10.0
"""Seconds between two lines where stderr is not a terminal."""
AT_ONCE = 1.0
"""Seconds below which the end of a step is not worth a line."""
as_json = False
"""Whether lines are JSON; `--log-json` sets it."""
_step: tuple[int, str] | None = None
"""Number and name of the step that is being executed."""


@contextmanager
def step(number: int, name: str) -> Iterator[None]:
    """A step of a run: the work in it carries its number and name; a line is left when it is done, unless at once."""
    global _step
    began, outer, _step = time.monotonic(), _step, (number, name)
    try:
        yield
        seconds = time.monotonic() - began
        if as_json:
            _print(json.dumps({"step": name, "number": number, "seconds": round(seconds, 1)}))
        elif seconds >= AT_ONCE:
            _print(f"{number} {name}: done in {_duration(seconds)}")
    finally:
        _step = outer


@contextmanager
def shown(title: str, total: int, *, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show the progress of a piece of work; call the function with the increase of what is done, and a short text.

    Args:
        title: of the work, for example tiles or classifier.
        total: number of its rows, epochs or steps.
        unit: what is counted, if the title does not say so: epoch, step.
    """
    began = time.monotonic()
    done, said = 0, 0.0 if as_json else began
    number, name = _step or (0, "")
    # "3 segmenter, warm up: epoch", "5 predict: tiles"
    inner = title.removeprefix(name).strip() if unit else ""
    subject = f"{number} {name}{', ' * bool(inner)}{inner}" if number else title * bool(unit)
    counted = unit or title

    def line(text: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < EVERY and done < total:
            return
        said = now
        left = (now - began) / done * (total - done) if done else 0.0
        if as_json:
            row: dict[str, Any] = {"work": title, "done": done, "total": total, "text": text}
            row |= {"seconds": round(now - began, 1), "left": round(left, 1)}
            _print(json.dumps(row | ({"step": name, "number": number} if number else {})))
        else:
            # The first rows wait for processes to start, so they predict the others poorly.
            rest = f"{_duration(left)} left" if done * 20 >= total and done < total else ""
            parts = [f"{counted} {done}/{total}", text, rest]
            _print(f"{subject}{': ' * bool(subject)}{', '.join(filter(None, parts))}")

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    in_terminal = console.is_terminal and not console.is_jupyter and not as_json
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) if in_terminal else None
    with bars or nullcontext():
        task = bars.add_task(f"{subject}: {counted}" if subject else counted, total=total, text="") if bars else None

        def advance(more: int, text: str = "") -> None:
            nonlocal done
            done += more
            if bars and task is not None:
                bars.update(task, completed=done, text=text)
            else:
                line(text)

        yield advance


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
