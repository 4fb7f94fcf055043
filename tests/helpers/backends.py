"""`Backends` without replicas: rewards are the lengths of the completions, or whatever a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from rayward.contract.conversation import Completion
from rayward.errors import RuleError, VersionError
from rayward.serving.administration import parse_asked
from rayward.serving.calls import ScoredCall, Stats
from rayward.serving.reporting import Board
from rayward.serving.routes import RouteTable
from rayward.serving.status import ServiceStatus, build_status
from rayward.wire.dialect import Timings
from rayward.wire.items import ItemError, ItemResult, ScoreItem, TokenTrace
from rayward.wire.native import ModelInfo

MODEL, VERSION = "rm", "3f2a9c01b7de"


def reward_of(completion: Completion) -> float:
    """The reward of a completion here."""
    return float(len(completion) if isinstance(completion, str) else sum(len(turn["content"]) for turn in completion))


def result_of(item: ScoreItem) -> ItemResult:
    """Rewards, or the error that the text of a completion asks for: `error:too_long`."""
    for completion in item.completions:
        if isinstance(completion, str) and completion.startswith("error:"):
            return ItemResult(error=ItemError.of(completion.removeprefix("error:"), "as asked"))
    rewards = tuple(reward_of(completion) for completion in item.completions)
    traces = tuple(TokenTrace(("a", "b"), (0.0, reward)) for reward in rewards) if item.trace else None
    lengths = tuple(int(reward) + 10 for reward in rewards)
    return ItemResult(rewards=rewards, traces=traces, num_tokens=lengths, tokens=sum(lengths), tokens_computed=sum(lengths))


@dataclass
class FakeBackends:
    """Answers at once; or raises `failure`, waits for `release`, answers with `results`."""

    failure: BaseException | None = None
    release: asyncio.Event | None = None
    results: tuple[ItemResult, ...] | None = None
    is_ready: bool = True
    calls: list[dict[str, object]] = field(default_factory=list)
    num_cancelled: int = 0

    async def score(
        self, items: Sequence[ScoreItem], *, request_id: str, caller: str, budget_s: float | None, model: str | None, version: str | None
    ) -> tuple[str, ScoredCall]:
        self.calls.append({"items": tuple(items), "request_id": request_id, "caller": caller, "budget_s": budget_s, "model": model})
        if model not in (None, MODEL):
            raise RuleError("unknown_model", "no such model", remedy="ask for rm")
        if version not in (None, VERSION):
            raise VersionError("not served", remedy="pin another")
        if self.failure is not None:
            raise self.failure
        if self.release is not None:
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        results = tuple(map(result_of, items)) if self.results is None else self.results
        return MODEL, ScoredCall(VERSION, results, Timings(queue_s=0.01, encode_s=0.002, compute_s=0.03))

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(id=MODEL, version=VERSION, max_tokens=4096, outputs=["reward"])] if self.is_ready else []

    def ready(self) -> bool:
        return self.is_ready


class FakeManager:
    """The manager as its handle looks: every method is called by `remote`. `asked` keeps what administrators asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.administer = SimpleNamespace(remote=self._administer)

    async def _administer(self, verb: str, body: bytes) -> dict[str, object]:
        parse_asked(verb, body)
        self.asked.append((verb, body))
        return {"models": []}

    async def report(self, stats: Stats) -> None:
        pass

    async def stats(self) -> list[Stats]:
        return []

    async def status(self) -> ServiceStatus:
        return build_status(RouteTable(), Board(time.monotonic))
