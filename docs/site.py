"""Write the pages of the site: `python docs/site.py FOLDER`; `make docs` builds the site from them.

The reference pages are written from the command line and from the configurations, so that they cannot say what does
not hold. In the pages, `docs/NAME.md` in plain text becomes a link.
"""

import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import executed
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from rayseg.cli import app
from rayseg.config import commented, load
from rayseg.pipelines import COMMANDS, PIPELINES, pipeline_of

HERE = Path(__file__).parent
REFERENCES = {
    "reference/python.md": "# Python reference\n\n::: rayseg\n    options:\n"
    "      members: [run, open, load_model, remap, refresh, diff]\n",
}
"""Page -> its text."""
NEEDED = {
    "gpc": ["chips.source=#chips"],
    "agri": ["proposer=felzenszwalb"],
    "correct": ["run=runs/mine", "clicks=runs/mine.clicks.geojsonl"],
    "predict": ["model=''"],
    "remap": ["run=''"],
    "diff": ["before=''", "after=''"],
}
"""Pipeline -> settings without which its configuration cannot be shown."""
_NAMED = re.compile(r"(?<![`\w/(\[])docs/((?:[\w-]+/)*[\w-]+\.md|decisions/\d{4})\b")


def main(folder: Path) -> None:
    """Write all pages, and what they show, into a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    pages = REFERENCES | {"reference/commands.md": _commands(), "reference/configuration.md": _configurations()}
    (folder / "reference").mkdir()
    for path, text in pages.items():
        (folder / path).write_text(text)
    executed.write_pages(folder / "notebooks")
    for page in folder.rglob("*.md"):
        page.write_text(_linked(page.read_text(), page.relative_to(folder).parent.as_posix()))


def _linked(text: str, here: str) -> str:
    """A page with links to the pages that it names; indented code stays as it is."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        if not name.endswith(".md"):
            [name] = (f"decisions/{path.name}" for path in HERE.glob(f"{name}*.md"))
        return f"[{posixpath.basename(name).removesuffix('.md')}]({posixpath.relpath(name, here)})"

    return "".join(
        line if line.startswith("    ") else _NAMED.sub(link, line) for line in text.splitlines(keepends=True)
    )


def _commands() -> str:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    text = "# Commands\n\n`-v` shows the traceback of an error, `--log-json` prints progress as JSON lines; both may "
    text += "stand before or after any command.\n\n"
    return text + "\n".join(_described("rayseg", root))


def _described(path: str, command: TyperGroup | TyperCommand) -> Iterator[str]:
    """A command and those below it as Markdown."""
    if isinstance(command, TyperGroup):
        names = command.list_commands(typer.Context(command))
        for name in names:
            inner = command.commands[name]
            assert isinstance(inner, TyperGroup | TyperCommand)
            yield from _described(f"{path} {name}", inner)
        return
    yield f"## {path}\n\n{' '.join((command.help or '').replace(chr(92) + '[', '[').split())}\n"
    rows = []
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            rows.append((f"`{parameter.metavar or str(parameter.name).upper()}`", parameter.help or ""))
        elif not getattr(parameter, "hidden", False) and parameter.name != "help":
            rows.append((f"`{', '.join(parameter.opts)}`", getattr(parameter, "help", "") or ""))
    if rows:
        yield "| argument or option | meaning |\n|---|---|"
        yield "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _configurations() -> str:
    text = (
        "# Configurations\n\nEvery key of every pipeline with its default, as `rayseg config show PIPELINE` prints it. "
    )
    text += "`--set map.tile=1024` sets one key, `--config FILE` the keys of a YAML file.\n\n"
    for name in PIPELINES | COMMANDS:
        config = load(pipeline_of(name).Config, None, NEEDED.get(name, ()))
        text += f"## {name}\n\n```yaml\n{commented(config)}```\n\n"
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
