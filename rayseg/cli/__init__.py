"""The command line. Results go to stdout, everything else to stderr; heavy imports happen inside the commands."""

import importlib
import os
import signal
import threading
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rayseg import __version__
from rayseg.cli import about, data, run, serve
from rayseg.engine import progress, tuning
from rayseg.errors import ConfigError, RaysegError, Stalled

ORDER = (
    "run", "plan", "status", "retry", "verify", "predict", "evaluate", "correct", "remap", "refresh", "diff", "area",
    "polygonize", "export", "ingest", "labels", "serve", "view", "models", "regions", "config", "env",
)  # fmt: skip
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a command that SIGINT or SIGTERM ended, by the convention of shells."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it before they kill."""


def _terminate(*_: object) -> None:
    raise _Terminated


class _Commands(TyperGroup):
    """The commands; an error ends each with one line and the error's exit code, and a traceback only with -v."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        # rayseg.store is imported after an error only: importing the AWS client's errors would slow down --help.
        except (RaysegError, *importlib.import_module("rayseg.store").STORE_ERRORS) as error:
            from rayseg.store import sentence

            if ctx.params.get("verbose"):
                traceback.print_exc()
            typer.echo(f"rayseg: {' '.join(sentence(error).split())}", err=True)
            if isinstance(error, Stalled):
                os._exit(error.exit_code)  # a thread hangs, and Python would wait for it
            # A path that cannot be used is an option that is wrong.
            unusable = isinstance(error, OSError) and error.filename and error.strerror
            raise typer.Exit(getattr(error, "exit_code", ConfigError.exit_code if unusable else 1)) from None
        except KeyboardInterrupt as error:
            terminated = isinstance(error, _Terminated)
            how, code = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
            typer.echo(f"rayseg: {how}; finished tiles are kept, run the same command to resume", err=True)
            raise typer.Exit(code) from None

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Take -v, --verbose and --log-json before or after the command."""
        general = [word for word in args if word in {"-v", "--verbose", "--log-json"}]
        return super().parse_args(ctx, [*dict.fromkeys(general), *(word for word in args if word not in general)])

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The commands in the order of typical use."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


# Before PyTorch and Ray are imported: OpenMP and glibc read their settings when they start.
tuning.prepare()
app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)
for part in (run, data, serve, about):
    app.add_typer(part.app)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"rayseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Show progress as lines of JSON on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Map a land-cover class over a whole region from little or no labelled data."""
    progress.as_json = log_json
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
