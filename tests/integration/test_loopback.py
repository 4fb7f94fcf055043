"""`rayward serve` on a machine with a network: nothing of it answers there, and who has no token cannot join it.

Real here: the command in a process of its own, with a home and a Ray session of its own and no setting of Ray's in its environment.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.helpers.command import Command, serving
from tests.helpers.models import make_export

from rayward import RewardClient


def listening(service: Command) -> dict[tuple[str, int], str]:
    """Address and port -> command, of all processes that belong to it."""
    found = {}
    for process in service.processes():
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def network_addresses() -> list[str]:
    """IPv4 addresses of this machine that others may reach."""
    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses if address.family == socket.AF_INET]
    return [address.address for address in found if not address.address.startswith("127.")]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    with serving(make_export(tmp_path_factory.mktemp("models") / "tiny")) as command:
        yield command


def test_it_scores(service: Command) -> None:
    with RewardClient(service.url, deadline_s=60.0) as client:
        assert len(client.score("Hello", ["Hi.", "No."])) == 2


def test_every_process_listens_on_loopback_alone(service: Command) -> None:
    found = listening(service)
    commands = " ".join(found.values())
    for part in ("gcs_server", "raylet", "ServeReplica", "ProxyActor", "ServeController", "dashboard"):
        assert part in commands, f"{part} is not among what was looked at"
    open_to_others = {key: command for key, command in found.items() if key[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert open_to_others == {}


def test_no_port_answers_at_the_machines_other_addresses(service: Command) -> None:
    ports = [port for _, port in listening(service)]
    answering = []
    for address in network_addresses():
        for port in ports:
            with socket.socket() as probe:
                probe.settimeout(5.0)
                if probe.connect_ex((address, port)) == 0:
                    answering.append((address, port))
    assert answering == []


JOIN = """
import json, os, sys
import ray
from rayward.cluster import connect
try:
    connect()
    print(json.dumps({"joined": ray.get(ray.remote(num_cpus=0)(lambda: 7).remote())}))
except Exception as exc:
    print(json.dumps({"refused": type(exc).__name__}))
"""


def join(service: Command, **changed: str | None) -> dict[str, object]:
    """What became of a driver of ours that asks for the cluster by its address."""
    gcs_port = next(port for (_, port), command in listening(service).items() if "gcs_server" in command)
    environment: dict[str, str | None] = {**service.environment, "RAY_ADDRESS": f"127.0.0.1:{gcs_port}", **changed}
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={key: value for key, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, object] = json.loads(lines[-1])
    return found


def test_who_has_the_token_joins(service: Command) -> None:
    assert join(service, RAY_AUTH_MODE="token") == {"joined": 7}


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_who_has_another_token_or_none_does_not(service: Command, tmp_path: Path, mode: str) -> None:
    refused = join(service, HOME=str(tmp_path), RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN="f" * 64 if mode == "token" else None)
    assert "refused" in refused


def test_a_supervisors_sigterm_takes_everything_down(service: Command) -> None:
    # The last test here: the service is gone afterwards.
    code, left = service.interrupted()
    assert (code, left) == (0, [])
    assert "SIGTERM received" not in service.log.read_text()
