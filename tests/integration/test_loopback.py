"""`rayward serve` on a machine with a network: nothing of it answers there, and who has no token cannot join it.

Real here: the command in a process of its own, with a home and a Ray session of its own and no setting of Ray's in its environment.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.helpers.models import make_export
from tests.helpers.processes import descendants, end, until

from rayward import RewardClient

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    url: str

    def listening(self) -> dict[tuple[str, int], str]:
        """Address and port -> command, of all processes that belong to it."""
        found = {}
        own = psutil.Process(self.process.pid)
        for process in (own, *own.children(recursive=True)):
            try:
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        found[connection.laddr.ip, connection.laddr.port] = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
        return found

    def gcs_port(self) -> int:
        return next(port for (_, port), command in self.listening().items() if "gcs_server" in command)


def network_addresses() -> list[str]:
    """IPv4 addresses of this machine that others may reach."""
    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses if address.family == socket.AF_INET]
    return [address.address for address in found if not address.address.startswith("127.")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[Service]:
    directory = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))  # short: socket paths are limited to 107 characters
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    home = directory / "home"
    home.mkdir()
    environment = {
        **kept, "HOME": str(home), "RAY_TMPDIR": str(directory), "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT / "platform"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    port = free_port()
    command = [sys.executable, "-m", "rayward.cli", "serve", str(export), "--port", str(port), "cpus_per_replica=0.1", "device=cpu"]
    with open(directory / "serve.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        log_file = directory / "serve.log"
        until(
            lambda: f"at {url}" in log_file.read_text() or process.poll() is not None, 240.0, otherwise=lambda: log_file.read_text()[-4000:]
        )
        assert process.poll() is None, log_file.read_text()[-4000:]
        yield Service(process, environment, url)
    finally:
        own = descendants(process)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
        end(own)
        shutil.rmtree(directory, ignore_errors=True)


def test_it_scores(service: Service) -> None:
    with RewardClient(service.url, deadline_s=60.0) as client:
        assert len(client.score("Hello", ["Hi.", "No."])) == 2


def test_every_process_listens_on_loopback_alone(service: Service) -> None:
    listening = service.listening()
    commands = " ".join(listening.values())
    for part in ("gcs_server", "raylet", "ServeReplica", "ProxyActor", "ServeController", "dashboard"):
        assert part in commands, f"{part} is not among what was looked at"
    open_to_others = {key: command for key, command in listening.items() if key[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert open_to_others == {}


def test_no_port_answers_at_the_machines_other_addresses(service: Service) -> None:
    ports = [port for _, port in service.listening()]
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


def join(service: Service, **changed: str | None) -> dict[str, object]:
    """What became of a driver of ours that asks for the cluster by its address."""
    environment: dict[str, str | None] = {**service.environment, "RAY_ADDRESS": f"127.0.0.1:{service.gcs_port()}", **changed}
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


def test_who_has_the_token_joins(service: Service) -> None:
    assert join(service, RAY_AUTH_MODE="token") == {"joined": 7}


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_who_has_another_token_or_none_does_not(service: Service, tmp_path: Path, mode: str) -> None:
    refused = join(service, HOME=str(tmp_path), RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN="f" * 64 if mode == "token" else None)
    assert "refused" in refused
