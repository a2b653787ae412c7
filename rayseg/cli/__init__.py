"""The command line. Results go to stdout, everything else to stderr; heavy imports happen inside the commands."""

import os
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rayseg import __version__
from rayseg.cli import about, data, run, serve
from rayseg.engine import tuning
from rayseg.errors import RaysegError, Stalled

ORDER = (
    "run", "plan", "status", "retry", "predict", "evaluate", "polygonize", "ingest", "labels", "serve", "view",
    "models", "regions", "config", "env",
)  # fmt: skip
INTERRUPTED = 130
"""Exit code of a command that was ended by SIGINT, as shells have it."""


class _Door(TyperGroup):
    """Where errors leave: one sentence and the error's exit code; the traceback only with -v."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        except _errors() as error:
            from rayseg.store import sentence

            if ctx.params.get("verbose"):
                traceback.print_exc()
            typer.echo(f"rayseg: {' '.join(sentence(error).split())}", err=True)
            if isinstance(error, Stalled):
                os._exit(error.exit_code)  # a thread hangs; Python would wait for it for ever
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        except KeyboardInterrupt:
            typer.echo("rayseg: interrupted; what was finished is kept, the same command goes on from there", err=True)
            raise typer.Exit(INTERRUPTED) from None

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The commands in the order they are needed."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def _errors() -> tuple[type[Exception], ...]:
    from rayseg.store import STORE_ERRORS  # asked for when there is an error: it takes time to import

    return RaysegError, *STORE_ERRORS


tuning.prepare()
app = typer.Typer(cls=_Door, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for part in (run, data, serve, about):
    app.add_typer(part.app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rayseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Map a land-cover class over a whole region from little or no labelled data."""
