"""A scoring service for the page, in this process: models of every kind, rewards by a rule, a board full of traffic. No Ray, no torch.

with PageService() as service:
    browser.open(service.url)
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import uvicorn

from rayward.config.scoring import ScoringConfig
from rayward.contract.conversation import text_of, turns_of
from rayward.errors import ModelLoadError, OverloadedError, RuleError, VersionError
from rayward.serving.auth import Keys, parse_variable
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, ScoredCall, Stats
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.metrics import Recorder
from rayward.serving.mounts import all_routes
from rayward.serving.reporting import Board
from rayward.serving.routes import Canary, ModelRoutes, Release, RouteTable
from rayward.serving.seeing import Seeing
from rayward.serving.status import ServiceStatus, build_status
from rayward.wire.dialect import Timings
from rayward.wire.items import ItemError, ItemResult, ScoreItem, TokenTrace
from rayward.wire.native import ModelInfo, WireNormaliser, WireRelease

HELPER, ATTRIBUTES, CRITIC, STEPS = "helper-8b", "attributes-70b", "critic-8b", "math-steps"
CURRENT, CANARY, FAILED = "3f2a9c01b7de", "b81e77d0a4c2", "0c55aa91e3f7"

MODELS = (
    ModelInfo(
        id=HELPER,
        version=CURRENT,
        max_tokens=4096,
        outputs=["reward"],
        normaliser=WireNormaliser(mean=0.42, std=1.87, num_rewards=20_000, reference="held-out prompts"),
        releases=[
            WireRelease(version=CURRENT, state="ready", role="current", share=0.9),
            WireRelease(version=CANARY, state="ready", role="canary", share=0.1),
            WireRelease(version=FAILED, state="failed", error="golden scores differ"),
        ],
    ),
    ModelInfo(
        id=ATTRIBUTES,
        version="77aa01bc93de",
        max_tokens=8192,
        outputs=["helpfulness", "correctness", "coherence", "complexity", "verbosity"],
        weight_sets=["balanced", "terse"],
    ),
    ModelInfo(id=CRITIC, version="c0ffee123456", max_tokens=16384, outputs=["reward"], writes_critiques=True),
    ModelInfo(id=STEPS, version="5eed5eed5eed", max_tokens=4096, outputs=["reward"]),
)

CRITIQUE = (
    "The answer names the most likely cause, explains how to recognise it, and gives one change to try first. "
    "It could say more about the oven's temperature.\n\nScore: {score:.1f} of 10"
)


def reward_of(text: str) -> float:
    """A number that looks like a reward: it likes words of reason, and neither shouting nor very short answers."""
    good = len(re.findall(r"\b(because|first|then|if|and|until|minutes?|slope|casefold|show)\b", text))
    bad = text.count("!") + len(re.findall(r"\b(kick|hard|cannot|always|difficult|book|reverse)\b", text, re.IGNORECASE))
    return 0.55 * good - 1.1 * bad + 0.35 * math.log1p(len(text)) - 1.4


def _trace(text: str) -> TokenTrace:
    tokens = tuple(re.findall(r"\s?[^\s\w]|\s?\w{1,6}|\w{1,6}|\s+", text)) or (text,)
    seen, rewards = "", []
    for token in tokens:
        seen += token
        rewards.append(reward_of(seen))
    return TokenTrace(tokens, tuple(rewards))


def result_of(item: ScoreItem, model: str) -> ItemResult:
    """What a replica would answer. Texts ask for errors: `error:too_long`."""
    (completion,) = item.completions
    text = text_of(completion)
    if text.startswith("error:"):
        code = text.split()[0].removeprefix("error:")
        return ItemResult(error=ItemError.of(code, "the last user turn and the completion take 9312 tokens; the contract allows 4096"))
    if item.trace and model == STEPS:
        return ItemResult(error=ItemError.of("no_trace", "this model judges steps, and has no reward at every token"))
    if item.asked.n_critiques > 1 and model != CRITIC:
        return ItemResult(error=ItemError.of("no_critiques", "this model writes no critiques"))
    reward = reward_of(text)
    num_prompt = sum(len(turn["content"]) for turn in item.prompt) // 4 + 8
    num = num_prompt + sum(len(turn["content"]) for turn in turns_of(completion)) // 4 + 6
    chance = [1 / (1 + math.exp(-(reward + 1.5 - 0.6 * step))) for step in range(1 + text.count("\n") + text.count(". "))]
    count = item.asked.n_critiques
    return ItemResult(
        rewards=(min(chance) if model == STEPS else reward,),
        outputs=((3.1 + 0.4 * reward, 2.9 + 0.3 * reward, 3.6, 1.4 - 0.1 * reward, -0.2 + len(text) / 300),)
        if model == ATTRIBUTES
        else None,
        steps=(tuple(chance),) if model == STEPS else None,
        critiques=(tuple(CRITIQUE.format(score=5 + reward + 0.3 * number) for number in range(count)),) if model == CRITIC else None,
        reward_std=(0.31,) if model == CRITIC and count > 1 else None,
        traces=(_trace(text),) if item.trace else None,
        num_tokens=(num,),
        tokens=num,
        tokens_computed=num - num_prompt // 2,
    )


class PageBackends:
    """`Backends` over the rule."""

    async def score(
        self, items: Sequence[ScoreItem], *, request_id: str, caller: str, budget_s: float | None, model: str | None, version: str | None
    ) -> tuple[str, ScoredCall]:
        info = next((info for info in MODELS if info.id == (model or HELPER)), None)
        if info is None:
            raise RuleError("unknown_model", "the model that was asked for is not served here", remedy="GET /v1/models")
        if version not in (None, info.version, CANARY):
            raise VersionError("the pinned version is not served, and nothing was scored", remedy="pin another one, or none")
        if any("overload" in text_of(completion) for item in items for completion in item.completions):
            raise OverloadedError("41,200 tokens wait, 38 s of work; the bound is 30 s", remedy="send less at once", retry_after_s=9)
        results = tuple(result_of(item, info.id) for item in items)
        return info.id, ScoredCall(version or info.version, results, Timings(queue_s=0.0004, encode_s=0.0003, compute_s=0.0021))

    def models(self) -> list[ModelInfo]:
        return list(MODELS)

    def ready(self) -> bool:
        return True


def table() -> RouteTable:
    """The routes of the models, with a canary and a version that failed."""
    failed = ModelLoadError(
        "golden score 3 of 8 is 1.2312 and was 1.2440 at export; the tolerance is 1e-4", remedy="export again"
    ).to_json()
    routes = {
        info.id: ModelRoutes(
            releases={info.version: Release(version=info.version, source="/models/x", state="ready", published_at=3.0, info=info)},
            current=info.version,
        )
        for info in MODELS
    }
    releases = {
        **routes[HELPER].releases,
        CANARY: Release(version=CANARY, source="/models/y", state="ready", published_at=4.0, info=MODELS[0]),
        FAILED: Release(version=FAILED, source="/models/z", state="failed", published_at=5.0, error=failed),
    }
    routes[HELPER] = ModelRoutes(releases=releases, current=CURRENT, canary=Canary(version=CANARY, share=0.1))
    return RouteTable(generation=12, default_model=HELPER, models=routes)


class Traffic:
    """What a busy service counts, second by second.

    Args:
        board: takes the reports.
        now: its clock, in a list that can be set.
    """

    def __init__(self, board: Board, now: list[float]) -> None:
        self._board, self._now, self._drawn = board, now, random.Random(7)
        self._replicas = [self._recorder(HELPER, CURRENT, number) for number in range(6)]
        self._replicas += [self._recorder(HELPER, CANARY, 0)]
        self._replicas += [self._recorder(info.id, info.version, 0) for info in MODELS[1:]]
        self._ingress = Recorder("ingress-1", "ingress", clock=lambda: 1.7e9 + now[0])

    def _recorder(self, model: str, version: str, number: int) -> Recorder:
        source = f"{model}.{version}#{number}"
        return Recorder(source, "replica", model=model, version=version, clock=lambda: 1.7e9 + self._now[0])

    def run(self, seconds: int) -> None:
        """Let time pass."""
        for _ in range(seconds):
            wave = 0.55 + 0.35 * math.sin(self._now[0] / 40) + 0.1 * self._drawn.random()
            for number, recorder in enumerate(self._replicas):
                weight = 0.15 if number >= 6 else 1.0
                asked = int(21_000 * wave * weight)
                recorder.add("tokens_total", asked)
                recorder.add("tokens_computed_total", asked * 0.41)
                recorder.add("completions_total", int(asked / 310))
                recorder.add("forwards_total", 4)
                recorder.add("items_total", int(asked / 1240), outcome="scored")
                recorder.observe("batch_fill_ratio", min(1.0, 0.6 + 0.4 * wave))
                recorder.set(QUEUED_TOKENS, max(0.0, (wave - 0.62) * 90_000 * weight * (1 + number % 3)))
                recorder.set(TOKENS_PER_S, 11_800 - 300 * number)
                recorder.add("compute_seconds_total", min(1.0, wave))
                for stage, typical in (("encode", 0.003), ("queue", 0.02 + max(0.0, wave - 0.62)), ("compute", 0.06)):
                    for _ in range(4):
                        recorder.observe("stage_seconds", typical * self._drawn.lognormvariate(0, 0.5), stage=stage)
                self._rewards(recorder, shift=6.2 if number == 6 else 0.9)
            self._ingress.add("requests_total", 88 * wave, dialect="rayward", status="200")
            for _ in range(8):
                self._ingress.observe(
                    "request_seconds", (0.09 + max(0.0, wave - 0.62)) * self._drawn.lognormvariate(0, 0.4), dialect="rayward"
                )
            if wave > 0.93:
                self._ingress.add("refusals_total", 3, reason="overloaded")
            if self._drawn.random() < 0.1:
                self._replicas[0].add("items_total", outcome="too_long")
            for recorder in (*self._replicas, self._ingress):
                self._board.report(recorder.stats())
            self._now[0] += 1.0

    def _rewards(self, recorder: Recorder, shift: float) -> None:
        for _ in range(5):
            tokens = self._drawn.randrange(60, 900)
            reward = shift + 0.0012 * tokens + self._drawn.gauss(0, 1.6)
            pairs = (("n", 1.0), ("reward", reward), ("reward_squared", reward**2), ("tokens", tokens))
            for name, amount in (*pairs, ("tokens_squared", tokens**2), ("reward_tokens", reward * tokens)):
                recorder.move("reward_sums", amount, of=name)
            recorder.observe("reward", reward)
            recorder.observe("reward_standardised", (reward - 0.42) / 1.87)


class PageManager:
    """Keeps the board; `away` makes it fail."""

    def __init__(self) -> None:
        self.now = [0.0]
        self.board = Board(lambda: self.now[0])
        self.table = table()
        self.away = False
        self.traffic = Traffic(self.board, self.now)
        self.traffic.run(620)

    async def report(self, stats: Stats) -> None:
        self._look()

    async def stats(self) -> Sequence[Stats]:
        self._look()
        return self.board.stats(self.table)

    async def status(self) -> ServiceStatus:
        self._look()
        self.traffic.run(2)
        return build_status(self.table, self.board, wall_clock=lambda: 1.7e9 + self.now[0])

    def _look(self) -> None:
        if self.away:
            raise ConnectionError("no manager")


class PageService:
    """The application on a free port of this machine.

    Args:
        keys: as RAYWARD_API_KEYS; empty: anybody may.
    """

    def __init__(self, keys: str = "", port: int = 0) -> None:
        self.manager = PageManager()
        recorder = Recorder("ingress-0", "ingress")
        seeing = Seeing(self.manager, recorder.stats)
        front = Front(PageBackends(), all_routes(), seeing.endpoints(), background=[seeing.report], recorder=recorder)
        app = build_http(front, ScoringConfig(model="x"), Keys(parse_variable(keys)))
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        sockets = [self._server.config.bind_socket()]
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": sockets}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join(30.0)


def as_pasted(prompt: str, completions: Sequence[str]) -> str:
    """An item as JSON, as somebody would paste it."""
    return json.dumps({"prompt": prompt, "completions": list(completions)})
