"""DeepSpeed's compiled operator, before a worker needs it.

On its first start on a machine, DeepSpeed compiles its collectives for the CPU (about a minute), under a lock file of torch's which
only the compiling process removes. Killed meanwhile, it leaves a lock that every later start waits for, without a word and without
end. So each process of ours takes its turn first, by a lock of the operating system that ends with its owner, and removes a lock
file that no living process has open; every wait is bounded.

    python -m rayward.training.engines.operator     builds or checks the operator, in a process of its own
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rayward.errors import TrainingError, find_in, marking

logger = logging.getLogger(__name__)
OPERATOR = "deepspeed_shm_comm"
TORCH_LOCK_FILE = "lock"
TURN_FILE = "rayward.turn"
TIMEOUT_S = 1800.0
"""A minute's work on an idle machine took eight on one that was eight times overloaded."""
LOOK_EVERY_S = 0.5


class Waiting:
    """A bounded wait.

    Args:
        timeout_s: from now on.
        clock, sleep: of the machine, or of a test.
    """

    def __init__(
        self, timeout_s: float = TIMEOUT_S, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep, self._timeout_s = clock, sleep, timeout_s
        self._deadline = clock() + timeout_s
        self._said = False

    def look_again(self, path: Path, *, held: bool = True) -> None:
        """Sleep until the next look at what is waited for; where somebody holds it, say so once.

        Raises:
            TrainingError: it takes too long.
        """
        if self._clock() >= self._deadline:
            raise TrainingError(
                f"another process has held {path} for {self._timeout_s:g} s; DeepSpeed's operator is compiled in about a minute",
                remedy="end that process, or delete the file if nothing compiles on any machine that shares this directory",
            )
        if held and not self._said:
            self._said = True
            logger.warning("waiting for another process that builds DeepSpeed's operator and holds %s", path)
        self._sleep(LOOK_EVERY_S)


def operator_directory() -> Path:
    """Where torch compiles the operator: under TORCH_EXTENSIONS_DIR, or in the user's cache."""
    # torch has no public way to ask; a test compares this with what torch does.
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(OPERATOR, verbose=False))


def is_built(directory: Path) -> bool:
    """Whether there is a compiled operator that nobody is working on."""
    return (directory / f"{OPERATOR}.so").is_file() and not (directory / TORCH_LOCK_FILE).exists()


def build_operator(build: Callable[[], None], directory: Path, waiting: Waiting) -> None:
    """Build or load the operator in this process, which then holds it.

    Args:
        build: what takes torch's lock, compiles where needed, and loads.
        directory: that torch builds in.

    Raises:
        TrainingError: another process does not come to an end.
    """
    with _turn(directory / TURN_FILE, waiting):
        clear_stale_lock(directory / TORCH_LOCK_FILE, waiting)
        build()


def clear_stale_lock(lock: Path, waiting: Waiting) -> None:
    """Wait while a living process holds torch's lock; remove it when none does. Nobody of ours takes it meanwhile (`_turn`).

    Raises:
        TrainingError: a living process does not release it in time.
    """
    unheld = 0
    while lock.exists():
        unheld = unheld + 1 if _nobody_holds(lock) else 0
        # Two looks: the first may fall between a release and the removal that goes with it.
        if unheld == 2:
            logger.warning("removing %s: the process that compiled DeepSpeed's operator was killed", lock)
            lock.unlink(missing_ok=True)
            return
        waiting.look_again(lock, held=unheld == 0)


def _nobody_holds(lock: Path) -> bool:
    # Torch keeps the file open until it releases the lock. What cannot be seen (another user, no /proc) counts as held.
    processes = Path("/proc")
    try:
        if lock.stat().st_uid != os.getuid() or not (processes / "self" / "fd").is_dir():
            return False
    except FileNotFoundError:
        return False
    target = str(lock.resolve())
    return not any(target in _opened_by(process) for process in processes.iterdir() if process.name.isdecimal())


def _opened_by(process: Path) -> Iterator[str]:
    try:
        for number in os.listdir(process / "fd"):
            yield os.readlink(process / "fd" / number)
    except OSError:
        # It ended, or is another user's, whose cache is another directory.
        return


@contextmanager
def _turn(path: Path, waiting: Waiting) -> Iterator[None]:
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting.look_again(path)
        yield


def load_operator() -> None:
    """Load what DeepSpeed loads when it sets up its collectives on the CPU; it then finds it loaded.

    Raises:
        TrainingError: another process does not come to an end.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(OPERATOR, False):
        build_operator(lambda: builder.load(verbose=False), operator_directory(), Waiting())


def build_before_workers(environment: Mapping[str, str], *, directory: Path | None = None, waiting: Waiting | None = None) -> None:
    """On the driver of a local cluster: the operator is there before workers start, and the user is told what takes a minute.

    Args:
        environment: of the workers.

    Raises:
        TrainingError: it cannot be compiled, or another process does not come to an end.
    """
    directory, waiting = directory or operator_directory(), waiting or Waiting()
    with _turn(directory / TURN_FILE, waiting):
        clear_stale_lock(directory / TORCH_LOCK_FILE, waiting)
    if is_built(directory):
        return
    logger.warning("compiling DeepSpeed's operator, once on this machine; it takes about a minute")
    command = [sys.executable, "-m", "rayward.training.engines.operator"]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        problem = f"DeepSpeed's operator was not compiled in {TIMEOUT_S:g} s in {directory}"
        raise TrainingError(problem, remedy="run the same command again; look at the load of the machine") from exc
    if done.returncode != 0:
        raise find_in(done.stderr) or TrainingError(
            f"DeepSpeed's operator cannot be compiled in {directory}:\n{done.stderr[-2000:]}",
            remedy="install a C++ compiler and ninja, or use training.engine=torch with one worker",
        )


if __name__ == "__main__":
    with marking:
        load_operator()
