"""The literal command of the README: `ray job submit --working-dir . -- python jobs/train_rm.py …` against `ray start --head`.

Real here: a head node of its own (own ports, own temporary directory), the job server, the uploaded working directory.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.processes import descendants, end
from tests.helpers.runs import losses, tiny_config, write_world

from rayward.config.load import dump_config

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def submit(address: str, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- …` in the repository, until the job ends."""
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """Address of a fresh head node's job server; the node and all its processes are gone afterwards."""
    directory = tempfile.mkdtemp(prefix="rw", dir="/tmp")  # short: socket paths are limited to 107 characters
    head, address = start_head(directory)
    try:
        deadline = time.monotonic() + 240
        patience = time.monotonic() + 60
        while (trial := submit(address, "true")).returncode != 0:  # the job agent registers some time after the server answers
            assert time.monotonic() < deadline, f"the head node takes no job: {trial.stdout[-1000:]}{trial.stderr[-2000:]}"
            if head.poll() is not None or time.monotonic() > patience:  # one of the ports was taken before the head took it
                stop(head)
                head, address = start_head(directory)
                patience = time.monotonic() + 60
            time.sleep(0.5)
        yield address
    finally:
        stop(head)
        shutil.rmtree(directory, ignore_errors=True)


def start_head(directory: str) -> tuple[subprocess.Popen[bytes], str]:
    """A head node and the address of its job server; it lives when all of its ports were still free."""
    # The agent too: its default port belongs to the cluster of the other tests, and without an agent no job is taken.
    port, dashboard, agent, client = free_ports(4)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={directory}", "--disable-usage-stats",
    ]  # fmt: skip
    with open(Path(directory) / "head.log", "a") as log:
        return subprocess.Popen(command, env=environment(), stdout=log, stderr=log), f"http://127.0.0.1:{dashboard}"


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the node and all its processes."""
    processes = descendants(head)
    head.terminate()
    head.wait(timeout=60)
    end(processes)


def test_a_submitted_job_trains_and_exports(job_server: str, tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    config = tmp_path / "job.yaml"
    config.write_text(dump_config(tiny_config(world, tmp_path / "storage", "job", num_workers=2, max_steps=4)))
    done = submit(job_server, "python", "jobs/train_rm.py", str(config), "--no-evaluation")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    run = tmp_path / "storage" / "job"
    assert len(losses(run)) == 4
    assert (run / "export" / "contract.json").is_file()
    assert "golden scores of the training forward agree" in done.stdout


def test_a_bad_setting_fails_the_job_with_its_message(job_server: str) -> None:
    done = submit(job_server, "python", "jobs/train_rm.py", "training.lr=1")
    assert done.returncode == 1
    assert "training.lr = 1: unknown key" in done.stdout + done.stderr
