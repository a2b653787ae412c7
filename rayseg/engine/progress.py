"""How far long work is, on stderr: a bar in a terminal, a line now and then elsewhere, or lines of JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10.0
"""Seconds between two lines where stderr is not a terminal."""
as_json = False
"""Whether lines are JSON; `--log-json` sets it."""


@contextmanager
def shown(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show the progress of a piece of work; call the function with the increase of what is done, and a short text.

    Args:
        title: of the work, for example tiles or classifier.
        total: number of its rows, epochs or steps.
    """
    began = time.monotonic()
    done, said = 0, 0.0 if as_json else began

    def line(text: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < EVERY and done < total:
            return
        said = now
        left = (now - began) / done * (total - done) if done else 0.0
        if as_json:
            row = {"work": title, "done": done, "total": total, "text": text}
            row |= {"seconds": round(now - began, 1), "left": round(left, 1)}
            print(json.dumps(row), file=sys.stderr, flush=True)  # noqa: T201
        elif done < total:
            # The first rows wait for processes to start, so they predict the others poorly.
            rest = f", {left:,.0f} s left" if done * 20 >= total else ""
            print(f"{title} {done}/{total} {text}{rest}", file=sys.stderr, flush=True)  # noqa: T201

    if as_json:

        def counted(more: int, text: str = "") -> None:
            nonlocal done
            done += more
            line(text)

        yield counted
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(more: int, text: str = "") -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done, text=text)
            if not console.is_terminal:  # there the bar is printed once, at the end
                line(text)

        yield advance
