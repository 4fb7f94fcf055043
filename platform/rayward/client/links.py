"""How a client reaches scorers: what a link must do, and the one over HTTP to one or several endpoints. Needs httpx and pydantic."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import httpx
from pydantic import BaseModel, ConfigDict

from rayward.client.exchange import (
    Answer,
    Entry,
    Item,
    Question,
    Reply,
    TextRefusedError,
    TryFailedError,
    body_of,
    encoded,
    judged,
    parsed,
    reply_of,
)
from rayward.errors import ConfigError, DeadlineError, ScoringError, ServerError, UnavailableError
from rayward.wire.items import FiniteFloat, ItemResult
from rayward.wire.native import Health, ModelInfo, ModelList

API_KEY = "RAYWARD_API_KEY"
CONNECT_TIMEOUT_S = 5.0
"""An address that does not even refuse is given up after so long, so that another endpoint can be tried."""

REPLY_SHARE = 0.05
REPLY_S = 0.25
"""What is kept of the caller's time for the way back, as a share of it and at most: the server ends early enough to say what it has."""

SHUNNED_S = 5.0
"""An endpoint that failed is tried after all others for so long."""


class RewardsOfTexts(BaseModel):
    """Body of a 200 reply of `POST /get_reward`."""

    model_config = ConfigDict(strict=True)

    rewards: list[FiniteFloat]


class Link(Protocol):
    """One way to scorers. Bound to the event loop it is first used on."""

    @property
    def num_endpoints(self) -> int:
        """Endpoints that can be tried one after the other without waiting."""
        ...

    def prepare(self, index: int, item: Item) -> Entry:
        """An item in the form that travels; raises RequestError where it has none."""
        ...

    async def score(self, entries: Sequence[Entry], question: Question, budget_s: float, tried: Collection[int]) -> Reply:
        """One try. Raises TryFailedError where another one may be answered.

        Args:
            tried: endpoints that failed just now.
        """
        ...

    async def texts(
        self, texts: Sequence[str], prompts: Sequence[str] | None, question: Question, budget_s: float, tried: Collection[int]
    ) -> Reply:
        """One try at whole texts, each one templated before or plain; one result each.

        Args:
            prompts: what each text begins with; of use where it is plain.
        """
        ...

    async def models(self, budget_s: float, tried: Collection[int]) -> list[ModelInfo]:
        """What is served; one try."""
        ...

    async def health(self, budget_s: float, tried: Collection[int]) -> Health:
        """Whether it can score; one try."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class Endpoints:
    """Which of several servers is asked: one that has not failed lately, with the fewest requests of ours in flight.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, num: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._in_flight = [0] * num
        self._shunned_until = [float("-inf")] * num
        self._turn = 0

    def take(self, tried: Collection[int]) -> int:
        """The endpoint for one try; `release` it afterwards."""
        now = self._clock()
        num = len(self._in_flight)
        self._turn += 1
        order = sorted(range(num), key=lambda i: (i in tried, self._shunned_until[i] > now, self._in_flight[i], (i + self._turn) % num))
        self._in_flight[order[0]] += 1
        return order[0]

    def release(self, endpoint: int, *, shun_s: float = 0.0) -> None:
        """Its try is over; `shun_s`: it should not be tried for so long if there is another one."""
        self._in_flight[endpoint] -= 1
        self._shunned_until[endpoint] = self._clock() + shun_s if shun_s else float("-inf")


class HttpLink:
    """Scorers behind one or several base URLs that serve the same models.

    Args:
        urls: where applications are mounted.
        headers: sent with every request.
        api_key: None: RAYWARD_API_KEY, if it is set.
        max_connections: open at once.
        clock: monotonic seconds.
        transport: of httpx, for tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        headers: Mapping[str, str] | None,
        api_key: str | None,
        max_connections: int,
        clock: Callable[[], float],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._clock = clock
        self._endpoints = Endpoints(len(urls), clock)
        self._http = httpx.AsyncClient(
            headers=request_headers(headers, api_key),
            transport=transport,
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    @property
    def num_endpoints(self) -> int:
        """How many URLs there are."""
        return len(self._urls)

    def prepare(self, index: int, item: Item) -> Entry:
        """An item as JSON."""
        return encoded(index, item)

    async def score(self, entries: Sequence[Entry], question: Question, budget_s: float, tried: Collection[int]) -> Reply:
        """POST /v1/score."""
        content = body_of(entries, question, deadline_ms_of(budget_s))
        endpoint, answer = await self._send("POST", "/v1/score", content, {"x-request-id": question.request_id}, budget_s, tried)
        if answer.status != 200:
            raise judged(answer, endpoint, entries)
        return reply_of(entries, answer.body)

    async def texts(
        self, texts: Sequence[str], prompts: Sequence[str] | None, question: Question, budget_s: float, tried: Collection[int]
    ) -> Reply:
        """POST /get_reward, whose reply has room for rewards alone: all texts, or an error."""
        body = {"query": list(texts)} if prompts is None else {"query": list(texts), "prompts": list(prompts)}
        content = json.dumps(body, separators=(",", ":")).encode("ascii")
        headers = {"x-request-id": question.request_id, "x-rayward-deadline-ms": str(deadline_ms_of(budget_s))}
        if question.version is not None:
            headers["x-rayward-version"] = question.version
        endpoint, answer = await self._send("POST", "/get_reward", content, headers, budget_s, tried)
        if answer.status in (413, 422):
            text = answer.body[:500].decode("utf-8", "replace")
            raise TextRefusedError(f"a text cannot be scored: {text}", remedy="leave that text out; /v1/score has an error for each item")
        if answer.status != 200:
            raise judged(answer, endpoint)
        rewards = parsed(answer.body, RewardsOfTexts).rewards
        if len(rewards) != len(texts):
            raise ServerError(f"{len(texts)} texts were sent and {len(rewards)} rewards came back", remedy="report this")
        version = answer.headers.get("x-rayward-version", "")
        return Reply(tuple(ItemResult(rewards=(reward,)) for reward in rewards), question.model or "", version)

    async def models(self, budget_s: float, tried: Collection[int]) -> list[ModelInfo]:
        """GET /v1/models."""
        return list(parsed(await self._get("/v1/models", budget_s, tried), ModelList).data)

    async def health(self, budget_s: float, tried: Collection[int]) -> Health:
        """GET /health."""
        return parsed(await self._get("/health", budget_s, tried), Health)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _get(self, path: str, budget_s: float, tried: Collection[int]) -> bytes:
        endpoint, answer = await self._send("GET", path, None, {}, budget_s, tried)
        if answer.status != 200:
            raise judged(answer, endpoint)
        return answer.body

    async def _send(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], budget_s: float, tried: Collection[int]
    ) -> tuple[int, Answer]:
        endpoint = self._endpoints.take(tried)
        shun_s = 0.0
        timeout = httpx.Timeout(budget_s, connect=min(CONNECT_TIMEOUT_S, budget_s))
        try:
            response = await self._http.request(method, self._urls[endpoint] + path, content=content, headers=headers, timeout=timeout)
            if response.status_code >= 429 or response.status_code == 404:
                shun_s = SHUNNED_S
            return endpoint, Answer(response.status_code, response.headers, response.content)
        except httpx.RequestError as exc:
            shun_s = SHUNNED_S
            unheard = isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout)
            raise TryFailedError(_lost(exc), endpoint=endpoint, unheard=unheard) from exc
        finally:
            self._endpoints.release(endpoint, shun_s=shun_s)


def deadline_ms_of(budget_s: float) -> int:
    """What the server is told of the caller's time."""
    return max(1, int(1000.0 * (budget_s - min(REPLY_S, REPLY_SHARE * budget_s))))


def _lost(exc: httpx.RequestError) -> ScoringError:
    problem = f"{type(exc).__name__}: {exc}"
    remedy = "check that the server runs and is reachable at base_url"
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        return UnavailableError(problem, remedy=remedy)
    if isinstance(exc, httpx.TimeoutException):
        return DeadlineError(problem, remedy="raise deadline_s, send less at once, or serve more replicas")
    return ServerError(problem, remedy=remedy)


def checked_urls(base_url: str | Sequence[str]) -> tuple[str, ...]:
    """The URLs, if a client can use them.

    Raises:
        ConfigError: there is none, or one has no scheme.
    """
    urls = tuple(part.strip() for part in base_url.split(",")) if isinstance(base_url, str) else tuple(base_url)
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url {url!r} is not an http(s) URL", remedy="write for example http://127.0.0.1:8000")
    if not urls:
        raise ConfigError("base_url names no server", remedy="write for example http://127.0.0.1:8000")
    return urls


def request_headers(extra: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    """Headers of every request."""
    given: dict[str, Any] = {"content-type": "application/json", "accept": "application/json"}
    key = os.environ.get(API_KEY) if api_key is None else api_key
    if key:
        given["authorization"] = f"Bearer {key}"
    return {**given, **(extra or {})}
