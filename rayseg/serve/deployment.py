"""The server as a Ray Serve application: an API deployment that decodes uploads, and replicas of the models.

`cluster/serve.yaml` names `build`; `rayseg serve` runs the same application.
"""

import asyncio
from importlib import import_module
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from rayseg.errors import ConfigError, RaysegError
from rayseg.serve import haproxy, middleware, problems
from rayseg.serve.app import api
from rayseg.serve.models import Classes, LocalBackend, ModelIndex, Prediction, Served
from rayseg.serve.problems import Unavailable
from rayseg.serve.settings import ServeConfig
from rayseg.serve.uploads import Image

NAME = "rayseg"
_MAX_CONNECTIONS = 1000
_READY_SECONDS = 3.0
_CONCURRENT_BATCHES = 2  # while one is copied to the device or waits for its threads, the other computes
_ENVIRONMENT = {
    # Blocking work runs in threads of its own already; Serve's extra loops would only add a hop.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_ENDING: Any = {"graceful_shutdown_timeout_s": 60, "graceful_shutdown_wait_loop_s": 0.2}
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # the middleware writes the access log
_LOST = (RayActorError, WorkerCrashedError, DeploymentUnavailableError)


def build(config: ServeConfig) -> serve.Application:
    """The application for `serve deploy`; a cluster is reachable from other machines, so a token is required.

    Raises:
        ConfigError: no token file is named.
    """
    if not config.token_file:
        raise ConfigError(
            "token_file is not set, and a cluster is reachable from other machines; name a file that exists on every "
            "node, or use `rayseg serve` on loopback"
        )
    return application(config)


def application(config: ServeConfig) -> serve.Application:
    """The deployments, sized by the configuration."""
    scaling = {
        # Serve adds replicas while each has more requests in progress than fill a batch.
        "min_replicas": min(config.least_replicas, config.replicas),
        "max_replicas": config.replicas,
        "target_ongoing_requests": config.batch,
    }
    values = config.model_dump(mode="json")
    computing = {"num_cpus": config.cpus, "num_gpus": config.gpus, "runtime_env": {"env_vars": _ENVIRONMENT}}
    # The middleware limits requests, by kind and once their body has arrived; Serve would count slow uploads.
    receiving = {"max_ongoing_requests": _MAX_CONNECTIONS, "max_queued_requests": _MAX_CONNECTIONS}
    if not config.api_replicas:
        server = Server.options(  # type: ignore[attr-defined]
            autoscaling_config=scaling, ray_actor_options=computing, logging_config=_QUIET, **receiving
        )
        return server.bind(values)
    models = Models.options(
        autoscaling_config=scaling,
        max_ongoing_requests=2 * config.batch,
        max_queued_requests=config.queue,
        ray_actor_options=computing,
        logging_config=_QUIET,
    )
    api_ = Api.options(  # type: ignore[attr-defined]
        num_replicas=config.api_replicas,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _ENVIRONMENT}},
        logging_config=_QUIET,
        **receiving,
    )
    return api_.bind(values, models.bind(values))


class Replica(LocalBackend):
    """It loads models at first use and keeps some; patches of several requests share batches."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        config = ServeConfig.model_validate(values)
        middleware.configure_log(config.log_file)
        super().__init__(batch=config.batch, exact=config.exact, threads=_CONCURRENT_BATCHES, wait=config.wait_seconds)

        # Here, because the number of models is a setting.
        @serve.multiplexed(max_num_models_per_replica=config.models_per_replica)  # type: ignore[untyped-decorator]
        async def load(key: str) -> Any:  # noqa: ANN401 - a model of any kind
            return await self.run(self.load, key)

        self._models = load
        self._preloaded = True
        # Serve sends requests to a replica once this has ended.
        for model in ModelIndex(config.models).entries.values() if config.preload else ():
            try:
                await self.model(model.key)
            except Unavailable:  # `load` has logged the reason
                self._preloaded = False

    async def model(self, key: str) -> Any:  # noqa: ANN401 - a model of any kind
        """See `LocalBackend`; Serve unloads the model that was not used for the longest time."""
        return await self._models(key)

    async def ready(self) -> bool:
        """Whether the models that were to be loaded at the start are loaded."""
        return self._preloaded


Models = serve.deployment(name="Models", **_ENDING)(Replica)


@serve.deployment(**_ENDING)
@serve.ingress()
class Server(Replica):
    """A replica that receives HTTP requests and runs the models itself: no pixels travel between processes."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        config = ServeConfig.model_validate(values)
        index = ModelIndex(config.models)
        if index.entries:
            # Importing PyTorch stops the event loop for up to a second, so it comes before the first request.
            await asyncio.to_thread(import_module, "rayseg.models.segmenter")
        await super().__init__(values)
        self._app = api(config, self, index)
        self._app.names_requests = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return haproxy.with_clients(self._app)

    async def drain(self) -> None:
        """Refuse new requests from now on, and return when the accepted ones are answered."""
        await self._app.drain()


class RayBackend:
    """The `Backend` whose models are replicas of a deployment."""

    def __init__(self, handle: DeploymentHandle, timeout: float) -> None:
        self._handle, self._timeout = handle, timeout
        self._by_key: dict[str, DeploymentHandle] = {}

    async def segment(self, model: Served, image: Image) -> Prediction:
        """See `rayseg.serve.models.Backend`."""
        prediction: Prediction = await self._result(self._of(model).segment.remote(model, image))
        return prediction

    async def classify(self, model: Served, image: Image, *, explain: bool) -> Classes:
        """See `rayseg.serve.models.Backend`."""
        classes: Classes = await self._result(self._of(model).classify.remote(model, image, explain=explain))
        return classes

    async def instances(self, model: Served, image: Image, options: dict[str, Any]) -> list[dict[str, Any]]:
        """See `rayseg.serve.models.Backend`."""
        masks: list[dict[str, Any]] = await self._result(self._of(model).instances.remote(model, image, options))
        return masks

    async def labels(self, image: Image, options: dict[str, Any]) -> np.ndarray:
        """See `rayseg.serve.models.Backend`."""
        labels_HW: np.ndarray = await self._result(self._handle.labels.remote(image, options))
        return labels_HW

    async def follow(self, *arguments: object) -> np.ndarray | None:
        """See `rayseg.serve.models.Backend`."""
        # One replica keeps the features of a run.
        handle = self._handle.options(multiplexed_model_id=f"clicks@{arguments[0]}")
        classes_HW: np.ndarray | None = await self._result(handle.follow.remote(*arguments))
        return classes_HW

    async def ready(self) -> bool:
        """See `rayseg.serve.models.Backend`."""
        try:
            # To every replica, past the queue: a busy one is ready, too.
            return any(await asyncio.wait_for(self._handle.broadcast("ready").results_async(), _READY_SECONDS))
        except (TimeoutError, DeploymentUnavailableError, RayActorError):
            return False

    def _of(self, model: Served) -> DeploymentHandle:
        """The handle that routes to replicas with that model loaded."""
        # `options` makes a new handle each time; one per model is kept.
        if model.key not in self._by_key:
            self._by_key[model.key] = self._handle.options(multiplexed_model_id=model.key)
        return self._by_key[model.key]

    async def _result(self, response: Any) -> Any:  # noqa: ANN401 - a response of a handle
        try:
            async with asyncio.timeout(self._timeout):
                return await response
        except BackPressureError:
            raise problems.busy("all models are busy; retry in a moment") from None
        except TimeoutError:
            raise problems.busy(f"the model did not answer within {self._timeout:g} s; retry later") from None
        except RayTaskError as error:
            # The model's own error, raised in its process, is the client's error.
            if isinstance(error.cause, RaysegError):
                raise error.cause from None
            raise
        except _LOST as error:
            raise problems.busy("the model's process died during the request; retry") from error


@serve.deployment(**_ENDING)
@serve.ingress()
class Api:
    """The replica that receives HTTP requests."""

    def __init__(self, values: dict[str, Any], models: DeploymentHandle) -> None:
        config = ServeConfig.model_validate(values)
        middleware.configure_log(config.log_file)
        self._app = api(config, RayBackend(models, config.timeout_seconds), ModelIndex(config.models))
        self._app.names_requests = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return haproxy.with_clients(self._app)

    async def drain(self) -> None:
        """Refuse new requests from now on, and return when the accepted ones are answered."""
        await self._app.drain()
