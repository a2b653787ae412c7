"""The HTTP API: what can be asked of the models, of runs and of the server; OpenAPI at /openapi.json, a page at /."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from rayseg import __version__
from rayseg.errors import RaysegError
from rayseg.serve import answers, forms, middleware, pages, problems, runs
from rayseg.serve.answers import GEOJSON, JSON, PNG, TIFF, Result
from rayseg.serve.forms import Asked
from rayseg.serve.middleware import Door, Metrics
from rayseg.serve.models import Backend, Shelf
from rayseg.serve.problems import Refused
from rayseg.serve.settings import ServeConfig
from rayseg.serve.uploads import Readers
from rayseg.store import upath
from rayseg.vision.color import ClassTable, hex_of, label_table

Accept = Annotated[str, Header(description="Media type of the answer.")]
Name = Annotated[str, Path(max_length=200, pattern=r"^[A-Za-z0-9._-]+$")]


def api(config: ServeConfig, backend: Backend, shelf: Shelf) -> Door:
    """The application, behind its door.

    Args:
        config: limits, runs, token.
        backend: what answers for the models.
        shelf: which models there are.

    Raises:
        ConfigError: the token file cannot be used.
    """
    app = FastAPI(title="rayseg", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    metrics = Metrics()
    readers = Readers(2, max_pixels=config.max_pixels)
    app.add_exception_handler(RaysegError, _refused)
    app.add_exception_handler(HTTPException, _refused_by_framework)
    app.add_exception_handler(RequestValidationError, _refused_by_schema)
    app.add_exception_handler(Exception, middleware.explain)
    app.include_router(pages.router())
    app.include_router(runs.router(config))
    closed = Door(app, config, token=config.token(), metrics=metrics)
    _add_server(app, closed, metrics)
    _add_models(app, shelf)
    _add_questions(app, _Desk(config, backend, shelf, readers, metrics))
    if config.jobs:
        from rayseg.serve import jobs

        app.include_router(jobs.router(config))
    else:
        _add_no_jobs(app)
    return closed


# -- the server --------------------------------------------------------------------------------------------------------


def _add_server(app: FastAPI, closed: Door, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["server"])
    async def healthz() -> Response:
        """200 while requests are taken, 503 when the server is about to stop."""
        said = {"status": "draining" if closed.draining else "ok", "version": __version__}
        return Response(json.dumps(said), 503 if closed.draining else 200, media_type=JSON)

    @app.get("/metrics", tags=["server"])
    async def measured() -> Response:
        """Counts in the text format of Prometheus, of the replica that answers."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_no_jobs(app: FastAPI) -> None:
    @app.post("/v1/jobs", tags=["jobs"], responses=forms.problems_of(403))
    async def refuse() -> None:
        """Refused: the server was started without a prefix for jobs."""
        raise Refused(403, "this server starts no runs; start it with --set jobs=PREFIX to let clients do so")


# -- models ------------------------------------------------------------------------------------------------------------


def _add_models(app: FastAPI, shelf: Shelf) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, list[dict[str, Any]]]:
        """The models that are served."""
        return {"models": [described(shelf, name) for name in shelf.entries]}

    @app.get("/v1/models/{name}", tags=["models"], responses=forms.problems_of(404))
    async def model(name: Name) -> dict[str, Any]:
        """A model as a STAC item with the MLM extension."""
        prefix, _ = looked_up(shelf, name)
        item: dict[str, Any] = json.loads(await asyncio.to_thread((upath(prefix) / "item.json").read_bytes))
        return item


def described(shelf: Shelf, name: str) -> dict[str, Any]:
    """What a list of models says of one."""
    _, found = shelf.entries[name]
    classes = [{"value": value, "name": title, "color": hex_of(color)} for value, title, color in found.classes]
    return {
        "name": name,
        "task": found.task,
        "kind": found.architecture.factory,
        "bands": list(found.bands),
        "dtype": found.dtype,
        "patch": found.patch,
        "classes": classes,
        "metrics": found.metrics,
    }


def looked_up(shelf: Shelf, name: str) -> tuple[str, Any]:
    """(prefix, bundle) of a model.

    Raises:
        Refused: 404, there is none of that name.
    """
    if name not in shelf.entries:
        known = ", ".join(list(shelf.entries)[:10]) or "none"
        raise Refused(404, f"there is no model {name!r}; those served are: {known}")
    return shelf.entries[name]


# -- questions ---------------------------------------------------------------------------------------------------------


class _Desk:
    """What answering a question about an image takes."""

    def __init__(self, config: ServeConfig, backend: Backend, shelf: Shelf, readers: Readers, metrics: Metrics) -> None:
        self.config, self.backend, self.shelf = config, backend, shelf
        self.readers, self.metrics = readers, metrics

    async def predict(self, name: str, request: Request, accept: str) -> Response:
        _, found = looked_up(self.shelf, name)
        if found.task != "segmentation" or found.architecture.factory == "sam":
            raise Refused(422, f"model {name} is for {found.task}, a map needs a model for segmentation; ask another")
        media = forms.media_type(accept, tuple(answers.WRITERS))
        asked = await self._asked(request)
        began = time.perf_counter()
        source, image = await asyncio.to_thread(self.readers.read, asked.image, bands=found.bands)
        found.check_contract(source.bands, source.dtype, units=source.units, source="the image")
        assert image is not None
        classes_HW, scores_CHW = await self.backend.segment(name, image)
        self.metrics.pixels.labels(name).inc(classes_HW.size)
        table = ClassTable(found.classes)
        seconds = time.perf_counter() - began
        return await _written(Result(name, image.tile, table, classes_HW, scores_CHW, seconds), media)

    async def unsupervised(self, request: Request, accept: str) -> Response:
        media = forms.media_type(accept, tuple(answers.WRITERS))
        asked = await self._asked(request)
        options = forms.unsupervised(asked.fields)
        began = time.perf_counter()
        _, image = await asyncio.to_thread(self.readers.read, asked.image)
        assert image is not None
        labels_HW = await self.backend.labels(image, options)
        table = label_table(int(labels_HW[labels_HW != answers.NODATA].max(initial=0)) + 1)
        seconds = time.perf_counter() - began
        return await _written(Result("unsupervised", image.tile, table, labels_HW, None, seconds), media)

    async def preview(self, request: Request) -> Response:
        asked = await self._asked(request)
        _, image = await asyncio.to_thread(self.readers.read, asked.image)
        assert image is not None
        return Response(await asyncio.to_thread(answers.picture, image.image_CHW, image.valid_HW), media_type=PNG)

    async def sam(self, request: Request, accept: str, *, prompted: bool) -> Response:
        from rayseg.serve import prompts

        name = self.shelf.of_sam()
        if name is None:
            raise Refused(404, "no Segment Anything model is served; start the server with one below --models")
        media = forms.media_type(accept, tuple(prompts.WRITERS))
        asked = await self._asked(request)
        options = forms.prompts(asked.fields) if prompted else forms.automatic(asked.fields)
        _, found = self.shelf.entries[name]
        source, image = await asyncio.to_thread(self.readers.read, asked.image, bands=found.bands)
        found.check_contract(source.bands, source.dtype, source="the image")
        assert image is not None
        if prompted:
            forms.expect_inside(options, image.tile.window.width, image.tile.window.height)
        rows = await self.backend.instances(name, image, options)
        return Response(await asyncio.to_thread(prompts.WRITERS[media], image.tile, rows), media_type=media)

    async def _asked(self, request: Request) -> Asked:
        seconds = self.config.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await forms.read(request)
        except TimeoutError:
            raise Refused(408, f"the upload was not whole after {seconds:g} s; send it faster, or less") from None


async def _written(result: Result, media: str) -> Response:
    body = await asyncio.to_thread(answers.WRITERS[media], result)
    endings = {PNG: "png", TIFF: "tif", GEOJSON: "geojson", JSON: "json"}
    name = f'inline; filename="{result.name}.{endings[media]}"'
    return Response(body, media_type=media, headers={"Content-Disposition": name, "Vary": "Accept"})


def _add_questions(app: FastAPI, desk: _Desk) -> None:
    one, many = forms.described, forms.ANSWERS

    @app.post("/v1/models/{name}/predict", tags=["models"], responses=many, openapi_extra=one(forms.IMAGE))
    async def predict(name: Name, request: Request, accept: Accept = JSON) -> Response:
        """Map an image with a model: the pixels of `rayseg predict` for the same image."""
        return await desk.predict(name, request, accept)

    @app.post("/v1/preview", tags=["models"], responses=many, openapi_extra=one(forms.IMAGE))
    async def preview(request: Request) -> Response:
        """The first three bands of an image as a PNG: what a browser can show of a GeoTIFF."""
        return await desk.preview(request)

    @app.post("/v1/unsupervised", tags=["models"], responses=many, openapi_extra=one(forms.UNSUPERVISED))
    async def unsupervised(request: Request, accept: Accept = JSON) -> Response:
        """Divide an image into labels without any model: a small network is trained on the image itself."""
        return await desk.unsupervised(request, accept)

    @app.post("/v1/sam/auto", tags=["sam"], responses=many, openapi_extra=one(forms.AUTO))
    async def sam_auto(request: Request, accept: Accept = JSON) -> Response:
        """All things that Segment Anything finds in an image."""
        return await desk.sam(request, accept, prompted=False)

    @app.post("/v1/sam/prompt", tags=["sam"], responses=many, openapi_extra=one(forms.PROMPT))
    async def sam_prompt(request: Request, accept: Accept = JSON) -> Response:
        """The things that Segment Anything sees at points or in boxes."""
        return await desk.sam(request, accept, prompted=True)


# -- refusals ----------------------------------------------------------------------------------------------------------


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RaysegError)
    found = problems.of_error(error)
    return problems.response(found.status, found.detail, request_id=middleware.REQUEST_ID.get(), headers=found.headers)


async def _refused_by_framework(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known: Mapping[int, str] = {
        404: "there is nothing at this address; /docs lists what there is",
        405: "this address does not know that method; /docs lists what it knows",
    }
    detail = known.get(error.status_code, str(error.detail))
    return problems.response(error.status_code, detail, request_id=middleware.REQUEST_ID.get(), headers=error.headers)


async def _refused_by_schema(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return problems.response(422, f"{where}: {first['msg']}", request_id=middleware.REQUEST_ID.get())
