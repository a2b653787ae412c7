"""How a server is set up: the file for clusters, what is refused before anything starts."""

from pathlib import Path

import pytest
import yaml
from small_world import refused
from tiny_server import free_port

from rayseg.config import load
from rayseg.errors import ConfigError
from rayseg.serve.command import reserve, with_hosts
from rayseg.serve.settings import ServeConfig

DEPLOYED = Path(__file__).parents[2] / "cluster/serve.yaml"


def test_the_file_for_clusters_is_understood_by_serve_and_asks_for_a_token():
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(DEPLOYED.read_text()))
    assert schema.proxy_location.value == "EveryNode"
    [app] = schema.applications
    built = call_user_app_builder_with_args_if_necessary(import_attr(app.import_path), app.args)
    assert built._bound_deployment.name == "Api"
    assert ServeConfig.model_validate(app.args).gpus == 0.5
    with pytest.raises(ConfigError, match="token_file is not set"):
        call_user_app_builder_with_args_if_necessary(import_attr(app.import_path), app.args | {"token_file": None})


def test_the_command_refuses_an_open_host_a_missing_prefix_and_an_unknown_setting(tmp_path):
    assert "--token-file" in refused(2, "serve", "--models", tmp_path, "--host", "0.0.0.0")
    assert "is not a folder" in refused(4, "serve", "--models", tmp_path / "none")
    assert "config key quue is unknown" in refused(2, "serve", "--models", tmp_path, "--set", "quue=3")
    assert "is not a run" in refused(2, "view", tmp_path)


def test_on_loopback_the_server_has_the_names_of_loopback_alone():
    assert with_hosts(ServeConfig(), "127.0.0.1").hosts == ("127.0.0.1", "localhost", "::1")
    assert with_hosts(ServeConfig(hosts=("maps",)), "127.0.0.1").hosts == ("maps",)
    assert with_hosts(ServeConfig(), "0.0.0.0").hosts == ()


def test_two_servers_that_start_together_do_not_share_a_port():
    """Ray Serve binds the port seconds after the check, and with SO_REUSEPORT."""
    port = free_port()
    with reserve("127.0.0.1", port), pytest.raises(ConfigError, match="choose another --port"):
        reserve("127.0.0.1", port)
    reserve("127.0.0.1", port).close()


def test_one_prefix_need_not_be_a_list():
    found = load(ServeConfig, None, ["models=s3://b/a", "hosts=maps.example.org"])
    assert (found.models, found.hosts) == (("s3://b/a",), ("maps.example.org",))
