"""The HTTP API: models, runs, jobs and the server's state; OpenAPI at /openapi.json, a page at /."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

from botocore.exceptions import BotoCoreError
from fastapi import FastAPI, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rayseg import __version__
from rayseg.errors import RaysegError
from rayseg.io.maps import pixel_area_m2
from rayseg.models.bundle import Bundle
from rayseg.serve import (
    answers,
    clicks,
    details,
    exports,
    forms,
    middleware,
    openapi,
    pages,
    problems,
    runs,
    thresholds,
)
from rayseg.serve.answers import GEOJSON, JSON, PNG, TIFF, Result
from rayseg.serve.forms import Form
from rayseg.serve.middleware import Metrics, RequestMiddleware
from rayseg.serve.models import Backend, ModelIndex, Served
from rayseg.serve.problems import Problem
from rayseg.serve.settings import ServeConfig
from rayseg.serve.uploads import DecoderPool, Image
from rayseg.serve.web import Compressed
from rayseg.store import upath
from rayseg.vision.color import ClassTable, hex_of, label_table

Accept = Annotated[str, Header(description="Media type of the response.")]
Name = Annotated[str, Path(max_length=200, pattern="^[A-Za-z0-9._\u0080-\U0010ffff-]+$")]
RETRY = 30  # seconds after which a model that cannot be used may be there again
_EXTENSIONS = {PNG: "png", TIFF: "tif", GEOJSON: "geojson", JSON: "json"}
_FRAMEWORK_DETAILS: Mapping[int, str] = {
    404: "nothing exists at this address; /docs lists the addresses",
    405: "this address does not accept that method; /docs lists the methods",
}


def api(config: ServeConfig, backend: Backend, index: ModelIndex) -> RequestMiddleware:
    """Build the application with its middleware.

    Args:
        config: limits, runs, token.
        backend: runs the models.
        index: the served models.

    Raises:
        ConfigError: the token file is unusable.
    """
    app = FastAPI(title="rayseg", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    # 1. errors and middleware
    metrics = Metrics()
    app.add_exception_handler(RaysegError, _explain)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(ClientDisconnect, _explain)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(Exception, middleware.internal_error)
    app.include_router(pages.router(config.basemap))
    app.include_router(runs.router(config))
    app.include_router(details.router(config))
    app.include_router(thresholds.router(config))
    app.include_router(clicks.router(config, backend))
    app.include_router(exports.router(config))
    app.add_middleware(Compressed)
    wrapped = RequestMiddleware(app, config, token=config.token(), metrics=metrics)
    # 2. the server's state and the models
    _add_server(app, wrapped, metrics, backend)
    _add_models(app, index)
    # 3. requests about an image
    predictor = _Predictor(config, backend, index, metrics)
    routes = (
        ("/v1/models/{name}/predict", "models", predictor.predict, openapi.PREDICT, openapi.MAPS),
        ("/v1/preview", "models", predictor.preview, openapi.IMAGE, openapi.PICTURE),
        ("/v1/unsupervised", "models", predictor.unsupervised, openapi.UNSUPERVISED, openapi.LABELS),
        ("/v1/sam/auto", "sam", predictor.sam_auto, openapi.AUTO, openapi.OBJECTS),
        ("/v1/sam/prompt", "sam", predictor.sam_prompt, openapi.PROMPT, openapi.OBJECTS),
    )
    for path, tag, endpoint, fields, responses in routes:
        described = openapi.described(fields)
        app.add_api_route(path, endpoint, methods=["POST"], tags=[tag], responses=responses, openapi_extra=described)
    # 4. jobs; without a prefix for them, the address explains the refusal
    if config.jobs:
        from rayseg.serve import jobs

        app.include_router(jobs.router(config))
    else:

        @app.post("/v1/jobs", tags=["jobs"], responses=openapi.problems_of(403))
        async def refuse() -> None:
            """Refuse: the server has no prefix for jobs."""
            raise Problem(403, "this server does not start runs; the administrator can set --set jobs=PREFIX")

    openapi.describe(app, token=bool(config.token_file))
    return wrapped


def _add_server(app: FastAPI, wrapped: RequestMiddleware, metrics: Metrics, backend: Backend) -> None:
    @app.get("/healthz", tags=["server"])
    async def healthz() -> Response:
        """200 while the server accepts requests, 503 while it shuts down."""
        state = {"status": "draining" if wrapped.draining else "ok", "version": __version__}
        return Response(json.dumps(state), 503 if wrapped.draining else 200, media_type=JSON)

    @app.get("/readyz", tags=["server"], responses=openapi.problems_of(503))
    async def readyz() -> dict[str, str]:
        """200 while models answer and those to be loaded at the start (`--preload`) are loaded, else 503."""
        if wrapped.draining or not await backend.ready():
            raise problems.busy("the models are not ready, or the server shuts down; retry later")
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"])
    async def prometheus() -> Response:
        """Metrics of the answering replica in the text format of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


def _add_models(app: FastAPI, index: ModelIndex) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, list[dict[str, Any]]]:
        """The served models."""
        rows = []
        for name, served in (await index.all()).items():
            model = served.bundle
            classes = [{"value": value, "name": title, "color": hex_of(color)} for value, title, color in model.classes]
            row: dict[str, Any] = {
                "name": name,
                "task": model.task,
                "kind": model.architecture.factory,
                "bands": list(model.bands),
            }
            row |= {"dtype": model.dtype, "patch": model.patch, "classes": classes, "metrics": model.metrics}
            rows.append(row)
        return {"models": rows}

    @app.get("/v1/models/{name}", tags=["models"], responses=openapi.problems_of(404))
    async def model(name: Name) -> dict[str, Any]:
        """A model as a STAC item with the MLM extension."""
        served = await looked_up(index, name)
        try:
            item: dict[str, Any] = json.loads(await asyncio.to_thread((upath(served.prefix) / "item.json").read_bytes))
        except (ValueError, OSError, BotoCoreError):
            raise problems.busy(f"the item of {name} is missing or damaged; retry later", seconds=RETRY) from None
        return item


async def looked_up(index: ModelIndex, name: str) -> Served:
    """The model of a name.

    Raises:
        Problem: 404, no model has that name.
    """
    if served := await index.one(name):
        return served
    known = ", ".join(list(index.entries)[:10]) or "none"
    raise Problem(404, f"there is no model {name!r}; served models: {known}")


class _Predictor:
    """The endpoints that take an image."""

    def __init__(self, config: ServeConfig, backend: Backend, index: ModelIndex, metrics: Metrics) -> None:
        self.config, self.backend, self.index, self.metrics = config, backend, index, metrics
        # Two: one decodes while the pixels of the other are sent.
        self.decoders = DecoderPool(2, max_pixels=config.max_pixels)
        self.pixels = 0  # of all images in flight

    async def predict(self, name: Name, request: Request, accept: Accept = JSON) -> Response:
        """Map an image with a model: the pixels of `rayseg predict` for the same image."""
        served = await looked_up(self.index, name)
        model = served.bundle
        if model.task == "classification":
            return await self._classify(served, request, accept)
        if model.task != "segmentation" or model.architecture.factory == "sam":
            raise Problem(
                422, f"model {name} is for {model.task}, expected segmentation or classification; choose another"
            )
        media = forms.media_type(accept, (*answers.WRITERS, answers.PARTS))
        form = await forms.read(request, openapi.PREDICT)
        options = forms.options(forms.Options, form.fields)
        if options["threshold"] is not None and model.outputs != 1:
            raise Problem(
                422, f"threshold is for models of one class, {name} has {model.outputs} scores per pixel; leave it out"
            )
        began = time.perf_counter()
        async with self._image(form, model, options["bands"]) as image:
            classes_HW, scores_CHW = await self.backend.segment(served, image)
            self.metrics.pixels.labels(name).inc(classes_HW.size)
            seconds, table = time.perf_counter() - began, ClassTable(model.classes)
            pixel_m2 = pixel_area_m2(image.tile)
            warning = model.scale_warning(math.sqrt(pixel_m2) if pixel_m2 else None)
            drawn = {"simplify": options["simplify"], "layers": options["layers"], "warning": warning}
            result = Result(name, image.tile, table, classes_HW, scores_CHW, seconds, **drawn)
            if options["threshold"] is not None or options["min_area"] is not None:
                result = await asyncio.to_thread(answers.decided, result, options["threshold"], options["min_area"])
            return await _written(result, media)

    async def _classify(self, served: Served, request: Request, accept: str) -> Response:
        """Class and score of the centre of an image as JSON or CSV; as PNG the Grad-CAM++ of the class."""
        media = forms.media_type(accept, (JSON, answers.CSV, PNG))
        form = await forms.read(request, {"bands": openapi.PREDICT["bands"]})
        numbers = forms.options(forms.Bands, form.fields)["bands"]
        async with self._image(form, served.bundle, numbers) as image:
            p_K, picture_HWC = await self.backend.classify(served, image, explain=media == PNG)
        if picture_HWC is not None:
            return Response(await asyncio.to_thread(answers.rgb_png, picture_HWC), media_type=PNG)
        content = answers.classified(served.name, ClassTable(served.bundle.classes), p_K)
        body = answers.classified_csv(content) if media == answers.CSV else json.dumps(content).encode()
        return Response(body, media_type=media, headers={"Vary": "Accept"})

    async def unsupervised(self, request: Request, accept: Accept = JSON) -> Response:
        """Segment an image without any model: a small network is trained on the image itself."""
        media = forms.media_type(accept, (*answers.WRITERS, answers.PARTS))
        form = await forms.read(request, openapi.UNSUPERVISED)
        options = forms.options(forms.Unsupervised, form.fields)
        began = time.perf_counter()
        async with self._image(form) as image:
            labels_HW = await self.backend.labels(image, options)
            table = label_table(int(labels_HW[labels_HW != answers.NODATA].max(initial=0)) + 1)
            seconds = time.perf_counter() - began
            return await _written(Result("unsupervised", image.tile, table, labels_HW, None, seconds), media)

    async def preview(self, request: Request) -> Response:
        """The first three bands of an image as a PNG, for browsers, which cannot show GeoTIFF."""
        async with self._image(await forms.read(request, openapi.IMAGE)) as image:
            png = await asyncio.to_thread(answers.picture, image.image_CHW, image.valid_HW)
        return Response(png, media_type=PNG)

    async def sam_auto(self, request: Request, accept: Accept = JSON) -> Response:
        """All objects that Segment Anything finds in an image."""
        return await self._sam(request, accept, openapi.AUTO)

    async def sam_prompt(self, request: Request, accept: Accept = JSON) -> Response:
        """The objects that Segment Anything finds at points or in boxes."""
        return await self._sam(request, accept, openapi.PROMPT)

    async def _sam(self, request: Request, accept: str, fields: Mapping[str, Any]) -> Response:
        served = await self.index.all() and self.index.sam()
        if not served:
            raise Problem(404, "no Segment Anything model is served; add one below --models")
        media = forms.media_type(accept, (*answers.INSTANCE_WRITERS, answers.PARTS))
        form = await forms.read(request, fields)
        prompted = fields is openapi.PROMPT
        options = forms.prompts(form.fields) if prompted else forms.options(forms.Automatic, form.fields)
        async with self._image(form, served.bundle) as image:
            if prompted:
                forms.expect_inside(options, image.tile.window.width, image.tile.window.height)
            masks = await self.backend.instances(served, image, options)
            writers = {name: partial(write, image.tile, masks) for name, write in answers.INSTANCE_WRITERS.items()}
            body, media = await asyncio.to_thread(_body, writers, media)
        return Response(body, media_type=media)

    @asynccontextmanager
    async def _image(
        self, form: Form, model: Bundle | None = None, numbers: Sequence[int] = ()
    ) -> AsyncIterator[Image]:
        """The form's image in the bands of `model` and within its contract; its pixels count until the request ends.

        `numbers` are those of its bands that are the model's, from 1; empty for bands by name.
        """
        bands: Sequence[str] = model.bands if model else ()
        physical = model is not None and model.architecture.factory != "sam"
        goals = model.band_units if model and physical else {}
        source, image = await self.decoders.decode(form.image, bands=bands, units=goals, numbers=numbers)
        if model:
            units = source.units if physical else ()
            if missing := set(model.bands) - set(source.bands):
                raise Problem(
                    422,
                    f"model {model.name} needs the bands {', '.join(model.bands)}, the image has "
                    f"{', '.join(source.bands)}: {', '.join(sorted(missing))} missing; name the bands in the file, or "
                    "send their numbers in the model's order, such as bands=[4,3,2]",
                )
            model.check_contract(source.bands, source.dtype, units=units, source="the image")
        assert image is not None  # it has all bands of the contract
        pixels, limit = image.valid_HW.size, self.config.max_pixels_in_flight
        # A prediction takes about 90 bytes per pixel: few large images at once would exhaust the memory.
        if self.pixels and self.pixels + pixels > limit:
            raise problems.busy(f"images of {self.pixels:,} px are in progress, {limit:,} px are allowed; retry later")
        self.pixels += pixels
        try:
            yield image
        finally:
            self.pixels -= pixels


async def _written(result: Result, media: str) -> Response:
    writers = {name: partial(write, result) for name, write in answers.WRITERS.items()}
    body, kind = await asyncio.to_thread(_body, writers, media)
    headers = {"Vary": "Accept"}
    if media != answers.PARTS:
        name = quote(f"{result.name}.{_EXTENSIONS[media]}")
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}"
    return Response(body, media_type=kind, headers=headers)


def _body(writers: Mapping[str, Callable[[], bytes]], media: str) -> tuple[bytes, str]:
    """(body, media type) in one media type, or in all of them."""
    if media == answers.PARTS:
        return answers.parts({name: write() for name, write in writers.items()})
    return writers[media](), media


async def _explain(_: Request, error: Exception) -> Response:
    """Answer an error of rayseg, of the framework or of its validation with a problem document."""
    problem: Problem
    if isinstance(error.__cause__, Problem):  # FastAPI wraps what reading a JSON body raises
        error = error.__cause__
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, Problem):
        problem = error
    elif isinstance(error, RaysegError):
        status = next((status for kind, status in problems.STATUS_OF.items() if isinstance(error, kind)), 500)
        headers = {"Retry-After": str(RETRY)} if status == 503 else None
        problem = Problem(status, " ".join(str(error).split()), headers=headers)
    elif isinstance(error, HTTPException):
        detail = _FRAMEWORK_DETAILS.get(error.status_code, str(error.detail))
        problem = Problem(error.status_code, detail, headers=error.headers)
    else:
        assert isinstance(error, RequestValidationError)
        # One sentence per problem: the first error.
        first = error.errors()[0]
        problem = Problem(422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
    request_id = middleware.REQUEST_ID.get()
    return problems.response(problem.status, problem.detail, request_id=request_id, headers=problem.headers)
