"""A server in this process over tiny bundles, asked through Starlette's client."""

import io
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fake_run import blobs, picture
from PIL import Image
from segment_anything import sam_model_registry
from starlette.testclient import TestClient

from rayseg.models import sam_bundle
from rayseg.models.sam import SamConfig
from rayseg.serve.app import api
from rayseg.serve.models import LocalBackend, ModelIndex
from rayseg.serve.settings import ServeConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_sam import picture as sam_picture
from test_sam import small_sam

__all__ = [
    "client", "encoded", "form", "free_port", "image_HWC", "listening", "sam_picture", "served", "serving",
    "untrained_sam",
]  # fmt: skip


def client(*models, **settings):
    """A client of a server with these bundles."""
    return TestClient(served(*models, **settings), raise_server_exceptions=False)


def served(*models, **settings):
    """The ASGI application of a server with these bundles."""
    config = ServeConfig(models=tuple(map(str, models)), **settings)
    shelf = ModelIndex(config.models)
    return api(config, LocalBackend(batch=4), shelf)


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


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def listening(app):
    """Address of a real HTTP server for an application, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(models, *settings):
    """`rayseg serve` of the bundles below a prefix in a process of its own: (process, address)."""
    port = free_port()
    words = ["--models", str(models), *(part for text in settings for part in ("--set", text))]
    process = subprocess.Popen(
        [sys.executable, "-m", "rayseg", "serve", "--port", str(port), *words],
        stderr=subprocess.PIPE,
        text=True,
    )
    rest = threading.Thread(target=process.stderr.read)  # or the pipe would fill up
    try:
        for line in process.stderr:
            if "stop with Ctrl-C" in line:
                break
        rest.start()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        if rest.ident:
            rest.join()
        process.stderr.close()


@contextmanager
def untrained_sam(prefix):
    """A bundle of a tiny SAM that marks about half of an image, whatever it is shown; it can be loaded inside."""

    def build(checkpoint=None):
        model = small_sam()
        model.mask_threshold = 0.0
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sam_model_registry, "vit_b", build)
        sam_bundle.save_sam(SamConfig(variant="vit_b", checkpoint="random"), prefix)
        yield prefix
