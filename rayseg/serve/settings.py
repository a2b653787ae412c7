"""How a server is set up: one frozen value, given by flags or by the `args` of a Serve file."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from rayseg.config import Config
from rayseg.engine.submit import is_loopback
from rayseg.errors import ConfigError
from rayseg.store import Location

LEAST_TOKEN = 16


class ServeConfig(Config):
    """What is served, to whom, and how much of it at once."""

    models: tuple[Location, ...] = ()
    """Prefixes below which every bundle is served."""
    runs: tuple[Location, ...] = ()
    """Runs that can be looked at, or prefixes below which they lie."""
    token_file: str | None = None
    """File with the token that requests must carry; anything may ask without one."""
    hosts: tuple[str, ...] = ()
    """Names by which the server is called; empty for any. Stops pages of others that call it by a name of theirs."""
    max_pixels: Annotated[int, Field(gt=0)] = 16_777_216
    """Most pixels of an upload."""
    max_bytes: Annotated[int, Field(gt=0)] = 67_108_864
    """Most bytes of a request."""
    queue: Annotated[int, Field(gt=0)] = 32
    """Requests below /v1 that are worked on or wait, in each replica of the API; more are answered 503 at once."""
    batch: Annotated[int, Field(gt=0)] = 8
    """Most patches predicted at once, of all requests for one model together."""
    exact: bool = True
    """Give the bits of `rayseg predict`, for which a GPU fills up its batches; otherwise a score may be one of 254 off
    there. A CPU gives them either way."""
    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long a batch waits for more patches."""
    replicas: Annotated[int, Field(gt=0)] = 4
    """Most replicas of the models; how many there are follows the load."""
    least_replicas: Annotated[int, Field(gt=0)] = 1
    """Fewest replicas of the models."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Share of a GPU that each replica of the models takes."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """Processors that each replica of the models takes, as Ray counts them."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """After which a request is given up."""
    imagery_hosts: tuple[str, ...] = ()
    """Hosts from which imagery of runs may be read over http(s); others are not asked."""
    log_file: Location | None = None
    """File on every node to which a line of JSON is added for each request; else they go to the replicas' stderr."""
    jobs: Location | None = None
    """Prefix for runs that clients start; none may without it."""
    jobs_catalog: Location | None = None
    """Imagery of those runs: `catalog.json#collection`."""
    jobs_configs: dict[str, Location] = Field(default_factory=dict)
    """Pipeline -> YAML file that its jobs start from."""
    jobs_at_once: Annotated[int, Field(gt=0)] = 2
    """Jobs of clients that may be under way at once; more are answered 429."""
    jobs_address: str | None = None
    """Address of the cluster's dashboard, which takes jobs; `rayseg serve` finds it."""

    @field_validator("models", "runs", "hosts", "imagery_hosts", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:  # noqa: ANN401 - what a configuration holds
        return (given,) if isinstance(given, str) else given

    def token(self) -> str:
        """The token that requests must carry, "" if none is asked for.

        Raises:
            ConfigError: the file is not there, or holds less than `LEAST_TOKEN` characters.
        """
        return read_token(self.token_file) if self.token_file else ""


def read_token(path: str) -> str:
    """The token in a file, without the space around it."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {path} cannot be read: {error}; check --token-file") from None
    if len(token) < LEAST_TOKEN or not token.isascii():
        raise ConfigError(
            f"token file {path} holds {len(token)} characters, expected {LEAST_TOKEN} or more, ASCII; "
            "make one with: openssl rand -hex 32"
        )
    return token


def expect_closed(host: str, token_file: str | None) -> None:
    """Refuse to listen to others without a token.

    Raises:
        ConfigError: the host is not loopback and there is no token.
    """
    if not is_loopback(host) and not token_file:
        raise ConfigError(
            f"host {host} can be reached by others; give --token-file with a token of {LEAST_TOKEN} characters or "
            "more, or leave --host at 127.0.0.1"
        )
