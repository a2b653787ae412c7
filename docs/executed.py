"""Execute the notebooks of docs/notebooks and write them as pages: text, code, and the output with its pictures."""

import base64
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent / "notebooks"
SECONDS = 600
"""Time limit of a cell."""


def write_pages(folder: Path) -> None:
    """Execute every notebook, each in an empty folder, and write `NAME.md` with `NAME.ipynb` beside it.

    Raises:
        CellExecutionError: a cell fails.
    """
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    with ThreadPoolExecutor(2) as pool:  # each waits for a kernel of its own
        notebooks = list(pool.map(executed, paths))
    for path, notebook in zip(paths, notebooks, strict=True):
        name = path.stem
        text = "".join(_parts(notebook, folder, name))
        title, _, rest = text.partition("\n")
        (folder / f"{name}.md").write_text(f"{title}\n\n[This page as a notebook]({name}.ipynb)\n{rest}")
        nbformat.write(notebook, folder / f"{name}.ipynb")


def executed(path: Path) -> Any:  # noqa: ANN401 - nbformat's own
    """The notebook with the output of its cells."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}}).execute()
    return notebook


def _parts(notebook: Any, folder: Path, name: str) -> Iterator[str]:  # noqa: ANN401
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield f"{cell.source}\n\n"
            continue
        yield f"```python\n{cell.source}\n```\n\n"
        for index, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{number}-{index}.png"
                (folder / picture).write_bytes(base64.b64decode(data["image/png"]))
                yield f"![Output of the cell above]({picture})\n\n"
            elif "text/html" in data:
                # Markdown ends a block of HTML at an empty line.
                html = "\n".join(line for line in data["text/html"].splitlines() if line.strip())
                yield f'<div class="output">\n{html}\n</div>\n\n'
            # The progress of the work, on stderr, is not part of the page.
            elif text := data.get("text/plain") or (output.get("name") == "stdout" and output.text):
                yield f"```text\n{text.rstrip()}\n```\n\n"


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
