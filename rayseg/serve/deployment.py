"""The server as a Ray Serve application: an API that reads uploads, and replicas of the models that share batches.

`build` is what `cluster/serve.yaml` names; `rayseg serve` runs the same.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from rayseg.errors import ConfigError, RaysegError
from rayseg.serve import middleware, problems
from rayseg.serve.app import api
from rayseg.serve.models import Answer, Segmenter, Shelf, segmented
from rayseg.serve.settings import ServeConfig
from rayseg.serve.uploads import Image

NAME = "rayseg"
_AT_ONCE = 2  # batches: while one is brought to the device or waits for its threads, the other computes
_ENVIRONMENT = {
    # What is awaited is in threads already; loops of Serve's own would only hand it on.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # each request is a line of the door's own log
_LOST = (RayActorError, WorkerCrashedError, DeploymentUnavailableError)


def build(config: ServeConfig) -> serve.Application:
    """The application that `serve deploy` runs; others reach a cluster, so it asks for a token.

    Raises:
        ConfigError: no token file is named.
    """
    if not config.token_file:
        raise ConfigError("token_file is not set; name a file that every node has, or use `rayseg serve` on loopback")
    return application(config)


def application(config: ServeConfig, *, draining: bool = False) -> serve.Application:
    """The deployments, with the sizes that the configuration gives them.

    Args:
        config: what is served.
        draining: run again with it, the API takes nothing more, and running it ends when nothing is left to do.
    """
    scaling = {
        "min_replicas": min(config.least_replicas, config.replicas),
        "max_replicas": config.replicas,
        "target_ongoing_requests": config.batch,
    }
    models = Models.options(  # type: ignore[attr-defined]
        autoscaling_config=scaling,
        max_ongoing_requests=2 * config.batch,
        max_queued_requests=config.queue,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus, "runtime_env": {"env_vars": _ENVIRONMENT}},
        logging_config=_QUIET,
    )
    values = config.model_dump(mode="json")
    state = {"draining": draining}
    api_ = Api.options(  # type: ignore[attr-defined]
        max_ongoing_requests=config.queue + 64,
        max_queued_requests=4 * config.queue + 256,
        user_config=state,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _ENVIRONMENT}},
        logging_config=_QUIET,
    )
    return api_.bind(values, models.bind(values))


@serve.deployment(graceful_shutdown_timeout_s=60, graceful_shutdown_wait_loop_s=0.2)
class Models:
    """A replica: models by name, loaded when asked for; computing happens in threads, so answers keep coming."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._config = ServeConfig.model_validate(values)
        middleware.keep_log(self._config.log_file)
        self._shelf = Shelf.of(self._config.models)
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._probabilities.set_max_batch_size(self._config.batch)
        self._probabilities.set_batch_wait_timeout_s(self._config.wait_seconds)

    @serve.multiplexed(max_num_models_per_replica=3)  # type: ignore[untyped-decorator]
    async def _model(self, name: str) -> Any:  # noqa: ANN401 - a model of any kind
        prefix, found = self._shelf.entries[name]
        if found.architecture.factory == "sam":
            from rayseg.serve import prompts

            return await self._in_turn(prompts.load, prefix)
        return await self._in_turn(partial(Segmenter, prefix, exact=self._config.exact))

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0, max_concurrent_batches=_AT_ONCE)  # type: ignore[untyped-decorator]
    async def _probabilities(self, patches_CHW: list[np.ndarray]) -> list[np.ndarray]:
        """Patches of any requests for one model together; Serve keeps models apart."""
        model = await self._model(serve.get_multiplexed_model_id())
        found: list[np.ndarray] = await self._in_turn(model.probabilities, patches_CHW)
        return found

    async def segment(self, name: str, image: Image) -> Answer:
        """See `rayseg.serve.models.Backend`."""
        model = await self._model(name)

        async def ask(inputs: list[np.ndarray]) -> Sequence[np.ndarray]:
            found: list[np.ndarray] = await asyncio.gather(*map(self._probabilities, inputs))
            return found

        return await segmented(model.bundle, image, model.predict.input, ask, ahead=4 * self._config.batch)

    async def instances(self, name: str, image: Image, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """See `rayseg.serve.models.Backend`."""
        from rayseg.serve import prompts

        model = await self._model(name)
        found: list[dict[str, Any]] = await self._in_turn(prompts.found, model, image, asked)
        return found

    async def labels(self, image: Image, asked: dict[str, Any]) -> np.ndarray:
        """See `rayseg.serve.models.Backend`."""
        from rayseg.serve import prompts

        found: np.ndarray = await self._in_turn(prompts.labels, image, asked)
        return found

    async def _in_turn(self, function: Any, *arguments: object) -> Any:  # noqa: ANN401
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


class _Replicas:
    """The `Backend` whose models are replicas of a deployment."""

    def __init__(self, handle: DeploymentHandle, timeout: float) -> None:
        self._handle, self._timeout = handle, timeout
        self._by_name: dict[str, DeploymentHandle] = {}

    async def segment(self, name: str, image: Image) -> Answer:
        found: Answer = await self._asked(self._of(name).segment.remote(name, image))
        return found

    async def instances(self, name: str, image: Image, asked: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._asked(self._of(name).instances.remote(name, image, asked))
        return found

    async def labels(self, image: Image, asked: dict[str, Any]) -> np.ndarray:
        found: np.ndarray = await self._asked(self._handle.labels.remote(image, asked))
        return found

    def _of(self, name: str) -> DeploymentHandle:
        if name not in self._by_name:
            self._by_name[name] = self._handle.options(multiplexed_model_id=name)
        return self._by_name[name]

    async def _asked(self, answer: Any) -> Any:  # noqa: ANN401 - a response of a handle
        try:
            async with asyncio.timeout(self._timeout):
                return await answer
        except BackPressureError:
            raise problems.busy("all models are busy; ask again in a moment") from None
        except TimeoutError:
            raise problems.busy(f"the model did not answer within {self._timeout:g} s; ask again later") from None
        except RayTaskError as error:
            if isinstance(error.cause, RaysegError):
                raise error.cause from None
            raise
        except _LOST as error:
            raise problems.busy("the model's process was lost while it worked; ask again") from error


@serve.deployment(graceful_shutdown_timeout_s=60, graceful_shutdown_wait_loop_s=0.2)
@serve.ingress()
class Api:
    """The replica that clients talk to."""

    def __init__(self, values: dict[str, Any], models: DeploymentHandle) -> None:
        config = ServeConfig.model_validate(values)
        middleware.keep_log(config.log_file)
        self._door = api(config, _Replicas(models, config.timeout_seconds), Shelf.of(config.models))

        self._door.names_requests = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._door

    async def reconfigure(self, asked: dict[str, bool]) -> None:
        """Serve tells all replicas of a new user configuration: {"draining": true} ends when nothing is left to do."""
        if asked.get("draining"):
            await self._door.drained()
