"""The pages and their files: a list made when the server starts, so that no path of a request leads to a file."""

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Response

from rayseg.serve.problems import Refused

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif any(entry.name.endswith(ending) for ending in _TYPES):
            yield prefix + entry.name, entry


def router() -> APIRouter:
    """Routes of the pages."""
    found = {name: entry.read_bytes() for name, entry in _files(resources.files("rayseg.serve").joinpath("page"))}
    routes = APIRouter(include_in_schema=False)

    def answer(name: str) -> Response:
        if name not in found:
            raise Refused(404, "there is nothing at this address; the page is at /")
        ending = name[name.rfind(".") :]
        return Response(found[name], media_type=_TYPES[ending], headers={"Cache-Control": "no-cache"})

    @routes.get("/")
    async def index() -> Response:
        return answer("index.html")

    @routes.get("/docs")
    async def docs() -> Response:
        return answer("docs.html")

    @routes.get("/runs/{run}")
    async def run(run: str) -> Response:
        return answer("run.html")

    @routes.get("/page/{name:path}")
    async def file(name: str) -> Response:
        return answer(name)

    return routes
