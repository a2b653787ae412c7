"""A server in this process over tiny bundles, asked through Starlette's client."""

import io

import numpy as np
from fake_run import blobs, picture
from PIL import Image
from starlette.testclient import TestClient

from rayseg.serve.app import api
from rayseg.serve.models import Here, Shelf
from rayseg.serve.settings import ServeConfig


def client(*models, **settings):
    """A client of a server with these bundles."""
    config = ServeConfig(models=tuple(map(str, models)), **settings)
    shelf = Shelf.of(config.models)
    door = api(config, Here(shelf, batch=4), shelf)
    return TestClient(door, raise_server_exceptions=False)


def image_HWC(height=90, width=130, seed=0):
    """A picture of blobs, uint8."""
    return np.ascontiguousarray(picture(blobs(height, width, seed=seed), seed=seed).transpose(1, 2, 0))


def encoded(pixels, kind="PNG", **options):
    """The pixels as a file's bytes."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def form(data, name="image.png"):
    """The form that carries an image."""
    return {"files": {"image": (name, data)}}
