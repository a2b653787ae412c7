"""`rayseg serve` and `view`: models over HTTP, and runs to look at."""

from typing import Annotated

import typer

from rayseg.cli.options import Address

app = typer.Typer()
_Set = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, for example queue=64 or gpus=0.5; may be repeated.")
]


@app.command()
def serve(  # noqa: PLR0913 - the flags of a command
    *,
    models: Annotated[
        list[str] | None, typer.Option(help="Prefix with bundles; may be repeated; default: runs.")
    ] = None,
    runs: Annotated[list[str] | None, typer.Option(help="Run, or prefix of runs, to be looked at.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs --token-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    token_file: Annotated[str | None, typer.Option(help="File with the token that requests must carry.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Most pixels of an upload.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of a request.")] = None,
    set_: _Set = None,
    address: Address = None,
) -> None:
    """Serve trained models and runs over HTTP, with a page at /."""
    from rayseg.config import load
    from rayseg.serve.command import serve_models
    from rayseg.serve.settings import ServeConfig

    flags = {"token_file": token_file, "max_pixels": max_pixels, "max_bytes": max_bytes, "runs": runs}
    given = {name: value for name, value in flags.items() if value}
    config = load(ServeConfig, None, set_ or ())
    config = ServeConfig.model_validate({**config.model_dump(), **given, "models": models or config.models or ["runs"]})
    serve_models(config, host=host, port=port, address=address, say=lambda line: typer.echo(line, err=True))


@app.command()
def view(
    run: Annotated[str, typer.Argument(help="The run's folder or URL.")],
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8001,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Look at a run: its map over the imagery, legend, ledger and what failed."""
    from rayseg.serve.command import view as look

    look(run, port=port, browser=browser, say=lambda line: typer.echo(line, err=True))
