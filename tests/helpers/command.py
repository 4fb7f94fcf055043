"""`rayward serve` as a user runs it: a process of its own, with a home and a Ray session of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.helpers.processes import alive, descendants, end, until

from rayward.serving.preflight import free_port

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """It runs, and says that it serves.

    Attributes:
        environment: of the process; none of the settings of Ray that the tests have.
        log: what it has printed.
    """

    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    url: str
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Itself and all that it has started."""
        return [psutil.Process(self.process.pid), *descendants(self.process)]

    def interrupted(self, patience_s: float = 120.0) -> tuple[int, list[psutil.Process]]:
        """Send SIGTERM, as a supervisor does: the exit code, and what of it still runs afterwards."""
        started = self.processes()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=patience_s)
        psutil.wait_procs(started, timeout=30)
        return code, alive(started)


@contextmanager
def serving(export: Path, *settings: str, variables: Mapping[str, str] | None = None) -> Iterator[Command]:
    """From the moment that it serves; everything of it is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))  # short: socket paths are limited to 107 characters
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    home = directory / "home"
    home.mkdir()
    environment = {
        **kept, "HOME": str(home), "RAY_TMPDIR": str(directory), "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT / "platform"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(variables or {}),
    }  # fmt: skip
    port = free_port("127.0.0.1", 0)
    words = [sys.executable, "-m", "rayward.cli", "serve", str(export), "--port", str(port), "cpus_per_replica=0.1", "device=cpu"]
    log = directory / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen([*words, *settings], env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: f"at {url}" in log.read_text() or process.poll() is not None, 240.0, otherwise=lambda: log.read_text()[-4000:])
        assert process.poll() is None, log.read_text()[-4000:]
        yield Command(process, environment, url, log)
    finally:
        own = descendants(process)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
        end(own)
        shutil.rmtree(directory, ignore_errors=True)
