"""`rayseg serve` and `view`: models and runs over HTTP, and one run in a browser."""

from typing import Annotated

import typer

from rayseg.cli.options import Address, RunPrefix

app = typer.Typer()


@app.command()
def serve(
    *,
    models: Annotated[list[str] | None, typer.Option(help="Prefix of bundles; may be repeated; default: runs.")] = None,
    runs: Annotated[list[str] | None, typer.Option(help="Run, or prefix of runs, to show; may be repeated.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs --token-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    token_file: Annotated[str | None, typer.Option(help="File with the token that requests must carry.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest upload in pixels.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Largest request in bytes.")] = None,
    preload: Annotated[bool, typer.Option("--preload", help="Load the models before the first request.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, for example queue=64 or gpus=0.5; may be repeated.")
    ] = None,
    address: Address = None,
) -> None:
    """Serve trained models and runs over HTTP, with a web page at /."""
    from rayseg.config import load
    from rayseg.serve.command import serve_models
    from rayseg.serve.settings import ServeConfig

    # A flag that is not given leaves the value of --set, or the default of ServeConfig.
    flags = {
        "token_file": token_file,
        "max_pixels": max_pixels,
        "max_bytes": max_bytes,
        "runs": runs,
        "preload": preload,
    }
    given = {name: value for name, value in flags.items() if value}
    config = load(ServeConfig, None, set_ or ())
    config = ServeConfig.model_validate({**config.model_dump(), **given, "models": models or config.models or ["runs"]})
    serve_models(config, host=host, port=port, address=address, say=lambda line: typer.echo(line, err=True))


@app.command()
def view(
    run: RunPrefix,
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8001,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    basemap: Annotated[
        str, typer.Option(help="Map tiles under the imagery, such as https://host/{z}/{x}/{y}.png; default: none.")
    ] = "",
) -> None:
    """Show a run in a browser: its map over the imagery, legend, ledger and failed tiles."""
    from rayseg.serve.command import view as show

    show(run, port=port, browser=browser, basemap=basemap, say=lambda line: typer.echo(line, err=True))
