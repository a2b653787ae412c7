"""Settings of a server: one frozen value, from command-line flags or from the `args` of a Ray Serve file."""

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rayseg.config import Config
from rayseg.engine.submit import is_loopback
from rayseg.errors import ConfigError
from rayseg.store import Location

MIN_TOKEN_LENGTH = 16


class ServeConfig(Config):
    """Models and runs to serve, access control and limits."""

    models: tuple[Location, ...] = ()
    """Prefixes below which every bundle is served."""
    runs: tuple[Location, ...] = ()
    """Runs to show, or prefixes of runs."""
    token_file: str | None = None
    """File with the token that requests must carry; without it no token is required."""
    hosts: tuple[str, ...] = ()
    """Accepted values of the Host header; empty accepts any. Protects against DNS rebinding by other sites."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may send requests, such as https://maps.example.org; "*" for any. Without it only the server's
    own page may."""
    requests_per_minute: Annotated[int, Field(gt=0)] | None = None
    """Maximum requests of each client address per minute and replica; further ones get a 429. Behind a proxy of your
    own all clients have its address."""
    max_pixels: Annotated[int, Field(gt=0)] = 16_777_216
    """Maximum pixels of an upload."""
    max_bytes: Annotated[int, Field(gt=0)] = 67_108_864
    """Maximum bytes of a request."""
    max_bytes_in_flight: Annotated[int, Field(gt=0)] = 268_435_456
    """Maximum bytes of all uploads in each replica that receives requests; further ones get a 503."""
    max_pixels_in_flight: Annotated[int, Field(gt=0)] = 33_554_432
    """Maximum pixels of all images that each replica predicts at once; further ones get a 503."""
    min_bytes_per_second: Annotated[int, Field(gt=0)] = 8_192
    """Minimum mean rate of an upload after its first ten seconds; slower ones get a 408."""
    queue: Annotated[int, Field(gt=0)] = 32
    """Maximum requests of each kind (predictions and jobs, map tiles, files, metadata) that run or wait in each replica
    that receives requests; further ones get a 503 at once. An upload counts when it has arrived."""
    batch: Annotated[int, Field(gt=0)] = 8
    """Maximum patches per batch, over all requests for one model."""
    exact: bool = True
    """Return the same bits as `rayseg predict`, for which a GPU pads its batches; without it a score can differ by 1
    of 254 on a GPU. A CPU returns the same bits either way."""
    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Time that a batch waits for further patches."""
    replicas: Annotated[int, Field(gt=0)] = 4
    """Maximum replicas of the models; their number follows the load."""
    least_replicas: Annotated[int, Field(gt=0)] = 1
    """Minimum replicas of the models."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per replica of the models; fractions are allowed."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs per replica of the models, in Ray's logical units."""
    models_per_replica: Annotated[int, Field(gt=0)] = 3
    """Maximum models in the memory of a replica; the one that was not used for the longest time is unloaded."""
    preload: bool = False
    """Load all models when a replica starts; without it a model is loaded by the first request for it."""
    api_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas of an API of its own, which receives requests, decodes uploads and draws map tiles. 0: each replica of
    the models does so itself."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Time limit of a request."""
    imagery_hosts: tuple[str, ...] = ()
    """Hosts from which the imagery of runs may be read over http(s); imagery on other hosts is not read."""
    basemap: str = ""
    """Map tiles under the imagery of a run, which the browser fetches: `https://host/{z}/{x}/{y}.png`."""
    clicks: Location | None = None
    """Local folder that clicks on runs are appended to, as `<run>.clicks.geojsonl`; without it the page cannot correct
    maps."""
    paths: bool = False
    """Show the paths of runs and clicks in the page, for commands to copy; `rayseg view` sets it."""
    log_file: Location | None = None
    """File on every node for the access log, one JSON line per request; default: stderr of the replicas."""
    jobs: Location | None = None
    """Prefix for runs that clients start; without it clients cannot start runs."""
    jobs_catalog: Location | None = None
    """Imagery of those runs: `catalog.json#collection`."""
    jobs_configs: dict[str, Location] = Field(default_factory=dict)
    """Pipeline -> YAML file with the base configuration of its jobs."""
    jobs_at_once: Annotated[int, Field(gt=0)] = 2
    """Maximum concurrent jobs of clients; further ones get a 429."""
    jobs_address: str | None = None
    """Address of the Ray dashboard that accepts jobs; `rayseg serve` sets it."""

    @field_validator("models", "runs", "hosts", "imagery_hosts", "cors_origins", mode="before")
    @classmethod
    def _accept_one(cls, value: Any) -> Any:  # noqa: ANN401 - a raw configuration value
        return (value,) if isinstance(value, str) else value

    @field_validator("basemap")
    @classmethod
    def _expect_template(cls, value: str) -> str:
        parts = urlsplit(value)
        placed = all(name in parts.path + parts.query for name in ("{z}", "{x}", "{y}"))
        # The host stands in a header of the page: nothing may follow it there.
        if value and not (parts.scheme in {"http", "https"} and re.fullmatch(r"[\w.:-]+", parts.netloc) and placed):
            raise ValueError(
                f"basemap is {value!r}, expected a URL such as https://host/{{z}}/{{x}}/{{y}}.png; correct it"
            )
        return value

    def token(self) -> str:
        """Read the token that requests must carry, without surrounding whitespace; "" if none is required.

        Raises:
            ConfigError: the file is missing, or holds fewer than `MIN_TOKEN_LENGTH` ASCII characters.
        """
        if not self.token_file:
            return ""
        try:
            token = Path(self.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token file {self.token_file} cannot be read: {error}; check --token-file") from None
        if len(token) < MIN_TOKEN_LENGTH or not token.isascii():
            raise ConfigError(
                f"token file {self.token_file} holds {len(token)} characters, expected {MIN_TOKEN_LENGTH} or more, all "
                "ASCII; create one with: openssl rand -hex 32"
            )
        return token


def require_room(config: ServeConfig, models: int) -> None:
    """Refuse to load more models at the start than a replica keeps.

    Raises:
        ConfigError: it keeps fewer.
    """
    if config.preload and models > config.models_per_replica:
        raise ConfigError(
            f"--preload loads {models} models, a replica keeps models_per_replica={config.models_per_replica}; raise "
            f"it with --set models_per_replica={models}, or serve fewer"
        )


def require_token(host: str, token_file: str | None) -> None:
    """Refuse to listen on an address other than loopback without a token.

    Raises:
        ConfigError: the host is not loopback and no token file is set.
    """
    if not is_loopback(host) and not token_file:
        raise ConfigError(
            f"host {host} is reachable from other machines and no token is set; pass --token-file with a token of "
            f"{MIN_TOKEN_LENGTH} or more characters, or leave --host at 127.0.0.1"
        )
