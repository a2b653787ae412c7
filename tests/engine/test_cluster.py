"""Connecting to Ray, starting it, and removing its folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mortal import until
from ray._private import parameter, worker

from rayseg.engine import cluster
from rayseg.errors import ConfigError, Stalled
from rayseg.store import ACCESS


def test_a_machine_too_busy_to_start_ray_gives_an_error_with_a_remedy(monkeypatch, tmp_path):
    def init(**_):
        raise Exception("The current node timed out during startup. This could happen because ...")  # noqa: TRY002

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "remove_afterwards", lambda folder: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Stalled, match="run the same command again later, or use --engine inline"):
        cluster.connect(None)
    monkeypatch.setattr("ray.init", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cluster.connect("local")


def test_agents_of_a_private_ray_listen_at_any_free_port(monkeypatch, tmp_path):
    """So that the Ray of a server accepts jobs while other clusters run on the machine."""
    own, given = parameter.RayParams, []

    def init(**_):
        given.append(parameter.RayParams().dashboard_agent_listen_port)
        raise ZeroDivisionError

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "remove_afterwards", lambda folder: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        cluster.connect("local")
    assert given == [0]
    assert parameter.RayParams is own


@pytest.mark.parametrize(
    ("inherited", "passed"), [({}, ["AWS_REGION", "RAYSEG_SIGN"]), ({"AWS_REGION": "a"}, ["RAYSEG_SIGN"])]
)
def test_workers_get_the_variables_of_stores_once_and_stdout_is_for_results(monkeypatch, capsys, inherited, passed):
    """From the job if this process is one, else from this process: Ray refuses a variable that both give."""
    for name in ACCESS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "a")
    monkeypatch.setenv("RAYSEG_SIGN", "https://sign.example.org")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": inherited}}))
    given = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **named: given.append(named["runtime_env"]["env_vars"]))
    monkeypatch.setattr("ray._private.worker._worker_logs_enabled", True)
    cluster.connect("10.0.0.1:6379")
    assert [sorted(variables) for variables in given] == [passed]
    # as Ray's thread does when a worker dies
    lost = {"lines": ["A worker died or was killed ..."], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(lost, ignore_prefix=False)
    assert capsys.readouterr().out == ""


def test_an_address_of_ray_client_is_refused_with_a_remedy():
    with pytest.raises(ConfigError, match="give the address of the head, HOST:6379"):
        cluster.expect_reachable("ray://127.0.0.1:10001")


def test_rays_folder_is_removed_after_its_last_process(tmp_path):
    """Also after a process whose command line no longer names the folder, as Ray's agents, but which writes into it."""
    folder = tmp_path / "ray"
    folder.mkdir()
    with (folder / "log").open("w") as log, subprocess.Popen(["sleep", "2"], stdout=log) as late:
        log.close()
        driver = f"from rayseg.engine import cluster; cluster.remove_afterwards({str(folder)!r})"
        subprocess.run([sys.executable, "-c", driver], check=True)
        time.sleep(0.3)
        assert folder.exists() or late.poll() is not None
    until(lambda: not folder.exists(), seconds=60)


WAITS = """
import sys
import time
import ray
from rayseg.engine import cluster
cluster.connect(None)
print(ray._private.worker._global_node.all_processes[sys.argv[1]][0].process.pid, flush=True)
ray.get(ray.remote(lambda: time.sleep(600)).remote())
"""


@pytest.mark.more
@pytest.mark.ray
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_private_ray_that_dies_ends_its_command_with_a_sentence(server):
    words, pipe = [sys.executable, "-c", WAITS, server], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as command:
        os.kill(int(command.stdout.readline()), signal.SIGKILL)
        assert command.wait(120) == 3
        last = command.stderr.read().strip().splitlines()[-1]
    assert last.startswith(f"rayseg: {server} of this command's private Ray died")
    assert last.endswith("run the same command to resume")
