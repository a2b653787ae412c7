"""The CPU image: what it copies is there, it installs as the cluster's image does, and its command serves at once."""

import json
import stat
import subprocess
from pathlib import Path

from typer.main import get_command

from rayseg.cli import app
from rayseg.serve.settings import ServeConfig

ROOT = Path(__file__).parents[2]


def steps(name):
    """(instruction, argument) of every step, lines joined."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
    return [tuple(step.split(" ", 1)) for step in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_it_installs_what_the_image_of_the_cluster_installs():
    def installing(name):
        return [step for step in steps(name) if step[0] == "COPY" or "pip install" in step[1]]

    assert installing("Dockerfile") == installing("cluster/Dockerfile")
    assert all(
        (ROOT / word).exists() for kind, text in steps("Dockerfile") if kind == "COPY" for word in text.split()[:-1]
    )
    assert ("USER", "10001") in steps("Dockerfile")


def test_its_command_serves_with_a_token_that_it_makes_once(tmp_path):
    # 1. the shell's line, with a rayseg that tells its arguments
    (tmp_path / "rayseg").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "rayseg").chmod(0o755)
    [command] = [json.loads(text) for kind, text in steps("Dockerfile") if kind == "CMD"]
    token = tmp_path / "token"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TOKEN_FILE": str(token)}
    told, again = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(2)
    )
    # a token that was there before, as one from a secret, is not written to the log
    assert again == told[1:]
    assert told[0] == f"token: {token.read_text()}"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(ServeConfig(token_file=str(token)).token()) == 32
    # 2. the arguments are those of the command
    name, *words = told[1].split()
    with get_command(app).commands[name].make_context(name, words) as context:
        assert context.params["models"] == ["/models"]
        assert (context.params["host"], context.params["port"]) == ("0.0.0.0", 8000)
        assert context.params["token_file"] == str(token)
    assert ("EXPOSE", "8000") in steps("Dockerfile")
