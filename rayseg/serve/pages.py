"""The web pages and their files, read when the server starts, so that no path of a request reaches the file system."""

from importlib import resources
from importlib.resources.abc import Traversable
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response

from rayseg.serve.middleware import POLICY
from rayseg.serve.problems import Problem

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PAGES = {"/": "index.html", "/docs": "docs.html", "/runs/{run}": "run.html"}


def _files(folder: Traversable, prefix: str = "") -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            files |= _files(entry, f"{prefix}{entry.name}/")
        elif any(entry.name.endswith(extension) for extension in _TYPES):
            files[prefix + entry.name] = entry.read_bytes()
    return files


def router(basemap: str = "") -> APIRouter:
    """Routes of the pages; the browser may fetch map tiles from the host of `basemap`."""
    files = _files(resources.files("rayseg.serve").joinpath("page"))
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    @routes.get("/docs")
    @routes.get("/runs/{run}")
    @routes.get("/page/{name:path}")
    async def page(request: Request) -> Response:
        # The route decides, never the path: it is only a key of `files`.
        name = _PAGES.get(request.scope["route"].path) or request.path_params["name"]
        if name not in files:
            raise Problem(404, "nothing exists at this address; the page is at /")
        media, headers = _TYPES[name[name.rfind(".") :]], {"Cache-Control": "no-cache"}
        if basemap and name == "run.html":
            host = "{0.scheme}://{0.netloc}".format(urlsplit(basemap))
            headers["Content-Security-Policy"] = POLICY.replace("img-src", f"img-src {host}")
        return Response(files[name], media_type=media, headers=headers)

    return routes
