"""HAProxy's configuration: no port but the server's own, and our own error texts."""

import asyncio
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from rayseg.serve import haproxy


@pytest.fixture
def written(tmp_path):
    """The file that Ray Serve writes for a server on 127.0.0.1:8123."""
    replica = BackendConfig(
        name="http-rayseg", path_prefix="/", app_name="rayseg", servers=[ServerConfig("replica", "127.0.0.1", 30_000)]
    )
    cfg = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8123),
        socket_path=str(tmp_path / "s"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "state"),
        metrics_enabled=False,
    )
    api = HAProxyApi(cfg=cfg, config_file_path=str(tmp_path / "cfg"))
    api.set_backend_configs({replica.name: replica})
    api._generate_config_file_internal()
    return tmp_path / "cfg"


def test_only_the_servers_own_port_is_opened(written):
    text = written.read_text()
    assert text.count("bind ") == 3  # or Ray Serve has changed
    found = haproxy.corrected(text, "/own")
    assert [line.split()[1] for line in found.splitlines() if line.split()[:1] == ["bind"]] == ["127.0.0.1:8123"]
    errors = {line.split()[1]: line.split()[2] for line in found.splitlines() if "errorfile" in line}
    assert errors == dict.fromkeys(("502", "503", "504"), "/own/503.http")
    assert ":514" not in found
    assert "http-reuse" in text
    assert "bind 127.0.0.1:8123\n    http-request set-header X-Forwarded-For %[src]\n" in found
    assert ("http-reuse" in found, "option http-server-close" in found) == (False, True)


def test_the_program_corrects_the_file_and_becomes_haproxy(written, tmp_path):
    settings = haproxy.settings(str(tmp_path))
    program = Path(settings["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(program.stat().st_mode) == 0o700
    checked = subprocess.run(  # -c: check the configuration and end
        [program, "-c", "-f", str(written)], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "8404" not in written.read_text()
    head, body = (tmp_path / "503.http").read_bytes().split(b"\r\n\r\n")
    assert json.loads(body)["status"] == 503
    assert b"Content-Length: %d" % len(body) in head
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"application/problem+json" in head


@pytest.mark.parametrize(
    ("behind", "peer", "client"),
    [(True, "127.0.0.1", "10.0.0.7"), (True, "10.0.0.9", "10.0.0.9"), (False, "127.0.0.1", "127.0.0.1")],
    ids=["HAProxy", "past HAProxy", "no HAProxy"],
)
def test_replicas_know_the_clients_address(monkeypatch, behind, peer, client):
    if behind:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    else:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    monkeypatch.setenv("RAYSEG_HAPROXY", "/haproxy")
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["client"][0])

    scope = {"type": "http", "scheme": "http", "client": (peer, 5), "headers": [(b"x-forwarded-for", b"10.0.0.7")]}
    asyncio.run(haproxy.with_clients(app)(scope, None, None))
    assert seen == [client]
