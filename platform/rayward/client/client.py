"""Clients of the scoring server: a finite reward, or an exception. Needs httpx and pydantic, neither torch nor Ray.

The two clients differ in how they send and wait; everything else is in `rayward.client.exchange`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import httpx

from rayward.client.exchange import Answer, Item, Outcome, Rules, Scores, Send, Steps, Text, Wait, checked_url, request_headers
from rayward.contract.contract import Normalise
from rayward.wire.items import Asked
from rayward.wire.native import Health, ModelInfo, ModelList

__all__ = ["AsyncRewardClient", "Item", "RewardClient", "Scores", "Text"]
T = TypeVar("T")


class RewardClient:
    """Blocking client.

    Args:
        base_url: where the application is mounted, for example `http://127.0.0.1:8000`.
        deadline_s: bound of one call over all its attempts and waits, in seconds.
        max_retries: repetitions of one HTTP request after 429, 502, 503, 504 or a lost connection.
        model: the model that must answer; None accepts whatever is served.
        max_items_per_request: longer lists are sent as several requests.
        weights: weight set for a model with several outputs; None: the model's own.
        normalise: raw rewards, or by the model's reference statistics: centred, standardised.
        n_critiques, temperature: of a model that writes critiques: the reward is the mean over so many, sampled at this temperature.
        headers: sent with every request.
        transport, clock, sleep, jitter: seams for tests; clock counts seconds, jitter draws from [0, 1).
    """

    def __init__(
        self,
        base_url: str,
        *,
        deadline_s: float = 60.0,
        max_retries: int = 4,
        model: str | None = None,
        max_items_per_request: int = 256,
        weights: str | None = None,
        normalise: Normalise = "raw",
        n_critiques: int = 1,
        temperature: float = 0.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        asked = Asked(weights, normalise, n_critiques, temperature)
        self._rules = Rules(deadline_s, max_retries, model, max_items_per_request, asked, clock, jitter)
        self._sleep = sleep
        self._http = httpx.Client(base_url=checked_url(base_url), transport=transport, headers=request_headers(headers))

    def score(
        self,
        prompt: Text,
        completions: Sequence[Text],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Rewards of the completions of one prompt, in order.

        Args:
            prompt: a text, or turns that end with a user or tool turn, or with one of the assistant that has `prefix: true`.
            completions: of each a text, or turns that begin and end with the assistant's.
            tools, chat_template_kwargs: what the chat template is given besides turns.

        Raises:
            RequestError: the request breaks a rule of the server.
            TooLongError, ContractError: the conversation cannot be scored under the model's contract.
            OverloadedError, DeadlineError, ServerError: no reward could be had; retry later.
        """
        return self._run(self._rules.score(prompt, completions, tools, chat_template_kwargs))

    def score_items(self, items: Sequence[Item]) -> Scores:
        """Rewards or an error for each item, in order; errors of the request as a whole are raised as in `score`."""
        return self._run(self._rules.score_items(items))

    def models(self) -> list[ModelInfo]:
        """The served models."""
        return list(self._run(self._rules.get("/v1/models", ModelList)).data)

    def health(self) -> Health:
        """Model and version, if the server can score; raises as `score` does if it cannot."""
        return self._run(self._rules.get("/health", Health))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                action = steps.send(outcome)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(action, Wait):
                self._sleep(action.seconds)
                outcome = None
            else:
                try:
                    outcome = self._send(action)
                except httpx.RequestError as exc:
                    outcome = exc

    def _send(self, action: Send) -> Answer:
        # httpx bounds each read, not their sum; a body that trickles in must not outlive the deadline.
        until = self._rules.clock() + action.timeout_s
        with self._http.stream(action.method, action.path, content=action.content, timeout=action.timeout_s) as response:
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if self._rules.clock() > until:
                    raise httpx.ReadTimeout("the body did not end in time", request=response.request)
            return Answer(response.status_code, response.headers, bytes(body))


class AsyncRewardClient:
    """`RewardClient` for asyncio; same arguments (`sleep` is a coroutine function), methods and exceptions."""

    def __init__(
        self,
        base_url: str,
        *,
        deadline_s: float = 60.0,
        max_retries: int = 4,
        model: str | None = None,
        max_items_per_request: int = 256,
        weights: str | None = None,
        normalise: Normalise = "raw",
        n_critiques: int = 1,
        temperature: float = 0.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        asked = Asked(weights, normalise, n_critiques, temperature)
        self._rules = Rules(deadline_s, max_retries, model, max_items_per_request, asked, clock, jitter)
        self._sleep = sleep
        self._http = httpx.AsyncClient(base_url=checked_url(base_url), transport=transport, headers=request_headers(headers))

    async def score(
        self,
        prompt: Text,
        completions: Sequence[Text],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """As `RewardClient.score`."""
        return await self._run(self._rules.score(prompt, completions, tools, chat_template_kwargs))

    async def score_items(self, items: Sequence[Item]) -> Scores:
        """As `RewardClient.score_items`."""
        return await self._run(self._rules.score_items(items))

    async def models(self) -> list[ModelInfo]:
        """As `RewardClient.models`."""
        return list((await self._run(self._rules.get("/v1/models", ModelList))).data)

    async def health(self) -> Health:
        """As `RewardClient.health`."""
        return await self._run(self._rules.get("/health", Health))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                action = steps.send(outcome)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(action, Wait):
                await self._sleep(action.seconds)
                outcome = None
            else:
                try:
                    async with asyncio.timeout(action.timeout_s):
                        response = await self._http.request(action.method, action.path, content=action.content, timeout=action.timeout_s)
                    outcome = Answer(response.status_code, response.headers, response.content)
                except httpx.RequestError as exc:
                    outcome = exc
                except TimeoutError:
                    outcome = httpx.ReadTimeout("the answer did not end in time")
