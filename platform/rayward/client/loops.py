"""Event loops of clients: a core for each loop that a client is used on, and the thread on which blocking clients run theirs."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rayward.client.core import Core

T = TypeVar("T")
CLOSE_TIMEOUT_S = 2.0


class Cores:
    """A core per event loop, made on first use: sockets belong to the loop that they were opened on.

    Args:
        make: a new core; called on the loop.
    """

    def __init__(self, make: Callable[[], Core]) -> None:
        self._make = make
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Core] = WeakKeyDictionary()

    def here(self) -> Core:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        core = self._by_loop.get(loop)
        if core is None:
            for other in [other for other in self._by_loop if other.is_closed()]:
                del self._by_loop[other]
            core = self._by_loop[loop] = self._make()
        return core

    async def close(self) -> None:
        """Close that of the running loop."""
        core = self._by_loop.pop(asyncio.get_running_loop(), None)
        if core is not None:
            await core.close()


class _Background:
    """The loop that all blocking clients of this process share, on a daemon thread that starts with the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self.thread = threading.Thread(target=self._loop.run_forever, name="rayward-client", daemon=True)
                self.thread.start()
            return self._loop

    def forget(self) -> None:
        # A forked child has the loop, but not its thread.
        self._lock = threading.Lock()
        self._loop = self.thread = None

    def current(self) -> asyncio.AbstractEventLoop | None:
        return self._loop


_background = _Background()
os.register_at_fork(after_in_child=_background.forget)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, blocking; also where an event loop runs in this thread."""
    loop = _background.loop()
    tasks: list[asyncio.Task[Any]] = []

    async def tracked() -> T:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        return await coroutine

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    try:
        return asyncio.run_coroutine_threadsafe(tracked(), loop).result()
    except BaseException:
        # An interrupt may come before there is a future to cancel; one turn of the loop later, the task has noted itself.
        loop.call_soon_threadsafe(loop.call_soon, cancel)
        raise


def close(cores: Cores) -> None:
    """Close what a blocking client has opened on the background loop, if that still runs."""
    loop = _background.current()
    if loop is None or not loop.is_running():
        return
    future = asyncio.run_coroutine_threadsafe(cores.close(), loop)
    if threading.current_thread() is _background.thread:
        # A collection of garbage on the loop itself cannot wait for it.
        return
    try:
        future.result(CLOSE_TIMEOUT_S)
    except TimeoutError:
        # At the end of the process: the operating system closes what is left.
        future.cancel()
