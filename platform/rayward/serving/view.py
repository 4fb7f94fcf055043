"""The table of routes as one ingress sees it: read from storage every second, and what its versions say of themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias

from rayward.errors import RaywardError, UnavailableError
from rayward.serving.calls import ScoreCall, ScoredCall
from rayward.serving.routes import Choice, Release, RouteTable
from rayward.wire.native import ModelInfo

logger = logging.getLogger("ray.serve")

REFRESH_S = 1.0
"""How often the table of routes is read."""


class ScorerHandle(Protocol):
    """The replicas of one version. Whatever it raises is of our tree; a cancelled call is cancelled at the replica too."""

    def score(self, call: ScoreCall) -> Coroutine[Any, Any, ScoredCall]:
        """Raises ReplicaDiedError, UnavailableError, OverloadedError, ServerError, DeadlineError."""
        ...

    async def info(self) -> ModelInfo:
        """What is served; may wait for a replica."""
        ...

    async def num_replicas(self) -> int | None:
        """Replicas that run; None: nobody knows just now."""
        ...


class Handles(Protocol):
    """Where the scorers are."""

    def of(self, model: str, version: str) -> ScorerHandle:
        """The handle of one version; the same one for every call."""
        ...

    def keep(self, versions: set[tuple[str, str]]) -> None:
        """Only these are still in the table; others may be let go."""
        ...


ReadTable: TypeAlias = Callable[[], RouteTable | None]
"""Reads the table from storage; blocks; None: there is none yet."""


class TableView:
    """The newest table that could be read.

    Args:
        read: the table in storage.
        handles: the scorers, asked for what the table does not say of them.
        clock: monotonic seconds.
    """

    def __init__(self, read: ReadTable, handles: Handles, clock: Callable[[], float]) -> None:
        self._read = read
        self._handles = handles
        self._clock = clock
        self._table: RouteTable | None = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        self._infos: dict[tuple[str, str], ModelInfo] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    @property
    def table(self) -> RouteTable | None:
        """As it was read last; None: not yet."""
        return self._table

    @property
    def age_s(self) -> float:
        """Since it was read; infinite before."""
        return self._clock() - self._read_at

    async def refresh(self, *, not_older_than_s: float = -1.0) -> None:
        """Read the table now, unless it was read so lately. While storage does not answer, the last one stands."""
        async with self._reading:
            if self._table is not None and self.age_s <= not_older_than_s:
                return
            try:
                table = await asyncio.to_thread(self._read)
            # Whatever goes wrong with the storage, requests go on by the table that was read last.
            except Exception as exc:
                logger.warning("the table of routes cannot be read (%s: %s); the last one stands", type(exc).__name__, exc)
                return
            self._read_at = self._clock()
            if table is not None and not table.generation and self._table is not None:
                # A file that has gone is no word of the manager's.
                table = None
            if table is not None and (self._table is None or table.generation != self._table.generation):
                self._table = table
                known = {(model, version) for model, routes in table.models.items() for version in routes.releases}
                self._handles.keep(known)
                self._infos = {key: info for key, info in self._infos.items() if key in known}
        self._ask_for_infos()

    async def choose(self, model: str | None, version: str | None, request_id: str) -> Choice:
        """Who answers a request; raises as `RouteTable.choose`."""
        if self._table is None:
            await self.refresh()
        try:
            return self._choose(model, version, request_id)
        except RaywardError:
            # Published a moment ago, perhaps; but a client that asks for nonsense makes nobody read all the time.
            await self.refresh(not_older_than_s=REFRESH_S / 2)
            return self._choose(model, version, request_id)

    def _choose(self, model: str | None, version: str | None, request_id: str) -> Choice:
        if self._table is None:
            raise UnavailableError("the table of routes was not read yet", remedy="retry; see the server's log if this stays so")
        return self._table.choose(model, version, request_id)

    def release(self, model: str, version: str) -> Release | None:
        """What the table says of a version."""
        routes = self._table.models.get(model) if self._table is not None else None
        return routes.releases.get(version) if routes is not None else None

    def _current(self) -> list[tuple[str, Release | None]]:
        models = self._table.models if self._table is not None else {}
        return [(model, routes.releases.get(routes.current or "")) for model, routes in models.items()]

    def models(self) -> list[ModelInfo]:
        """Of every model, what its current version says of itself, as far as that is known."""
        found = []
        for model, release in self._current():
            info = None if release is None else release.info or self._infos.get((model, release.version))
            if info is not None:
                found.append(info.model_copy(update={"id": model}))
        return found

    def ready(self) -> bool:
        """Whether there are models, and each has a version that answers."""
        current = self._current()
        return bool(current) and all(release is not None and release.state == "ready" and not release.starting for _, release in current)

    def _ask_for_infos(self) -> None:
        for model, release in self._current():
            # A version that is scaled to zero is not woken for this.
            if release is None or release.info is not None or not release.config.min_replicas:
                continue
            key = (model, release.version)
            if key not in self._infos and key not in self._asking:
                self._asking[key] = asyncio.get_running_loop().create_task(self._ask_for_info(*key))

    async def _ask_for_info(self, model: str, version: str) -> None:
        try:
            self._infos[model, version] = await self._handles.of(model, version).info()
        except RaywardError as exc:
            logger.info("version %s of %s does not say what it is: %s", version, model, exc.problem)
        finally:
            del self._asking[model, version]

    async def close(self) -> None:
        """End what runs in the background."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
