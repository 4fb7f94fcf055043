"""One encoder process as its parent sees it: started, spoken to, ended."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from rayward.errors import RaywardError
from rayward.scoring.units import EncodedItem
from rayward.serving.engine.encoder_process import Unready
from rayward.wire.items import ScoreItem

PROGRAM = "from rayward.serving.engine.encoder_process import main; main()"
"""Not `-m`, whose classes would be those of `__main__`; nor multiprocessing, which would run the main module of its parent."""

SOCKET_BYTES = 1 << 20
"""What one side may write before the other reads it, as far as the kernel allows."""

STEP_S = 0.5
"""How often it is looked whether waiting still makes sense."""

GONE = (EOFError, OSError, pickle.UnpicklingError)
"""What is raised where the process has ended, by each method that talks to it."""


class EncoderHandle:
    """Starts a process; the thread that does must outlive it, for it dies with that thread.

    Args:
        spec: pickled EncoderSpec.
        memory_bytes: what it may take beyond what its tokenizer needs.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, spec: bytes, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",
            # That there is no torch, as is meant.
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno()), str(os.getpid()), str(memory_bytes)]
        self._spec = spec
        self._pipe = Connection(ours.detach())
        try:
            with theirs:
                self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        except OSError:
            self._pipe.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def start_error(self, seconds: float, stop: Callable[[], bool]) -> object:
        """None when its tokenizer is loaded; else why it is not: an error of ours, or words."""
        try:
            self._pipe.send_bytes(self._spec)
            if not self.wait(seconds, stop):
                return f"it has not loaded its tokenizer after {seconds:g} s"
            answer = self._pipe.recv()
        except GONE:
            return f"it ended with {self._process.wait()}"
        if not isinstance(answer, Unready):
            return None
        return RaywardError.from_json(answer.error) if answer.typed else answer.error

    def send(self, jobs: Sequence[tuple[int, ScoreItem]]) -> None:
        """Items with the numbers that their answers have."""
        self._pipe.send(jobs)

    def wait(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Whether there is an answer within the time, or before `stop` says so."""
        until = time.monotonic() + seconds
        while not self._pipe.poll(min(max(until - time.monotonic(), 0.0), STEP_S)):
            if stop() or time.monotonic() >= until:
                return False
        return True

    def answers(self) -> Iterator[tuple[int, EncodedItem]]:
        """Those that are there."""
        while self._pipe.poll(0):
            yield self._pipe.recv()

    def end(self) -> int:
        """Kill it, where it still runs; its exit status."""
        self._process.kill()
        status = self._process.wait()
        self._pipe.close()
        return status
