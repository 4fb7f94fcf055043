"""Clients of the scoring server: finite rewards, or an exception. Needs httpx and pydantic, neither torch nor Ray.

The blocking client and the one for asyncio are one core (`rayward.client.core`) on different event loops; both also take a link of another
kind in place of a URL, as `rayward.serving.direct` makes one from deployment handles.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import httpx

from rayward.client import loops
from rayward.client.core import BadItems, Core, Settings
from rayward.client.exchange import Item, Question, Scores, Text, item_exception
from rayward.client.links import HttpLink, Link, checked_urls
from rayward.contract.contract import Normalise
from rayward.errors import ConfigError
from rayward.wire.items import Asked
from rayward.wire.native import Health, ModelInfo

__all__ = ["AsyncRewardClient", "Item", "RewardClient", "Scores", "Text"]


def _new_core(link: Callable[[], Link], settings: Settings) -> Core:
    return Core(link(), settings)


class _Client:
    """What both clients are made of; arguments as in `RewardClient`."""

    def __init__(
        self,
        base_url: str | Sequence[str] | Callable[[], Link],
        *,
        deadline_s: float = 60.0,
        max_retries: int | None = None,
        model: str | None = None,
        version: str | None = None,
        max_items_per_request: int = 256,
        max_tokens_per_request: int = 32_768,
        max_concurrency: int = 32,
        hedge_after_s: float | None = None,
        api_key: str | None = None,
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
        positive = {
            "deadline_s": deadline_s,
            "max_items_per_request": max_items_per_request,
            "max_tokens_per_request": max_tokens_per_request,
            "max_concurrency": max_concurrency,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} is {value!r}; the rule is > 0", remedy="give a positive number, or leave it out")
        self._settings = Settings(
            deadline_s, max_retries, max_items_per_request, max_tokens_per_request, max_concurrency, hedge_after_s, clock, sleep, jitter
        )
        self._asked = Asked(weights, normalise, n_critiques, temperature)
        self._model = model
        self._version = version
        self._link: Callable[[], Link]
        if callable(base_url):
            self._link, self._where = base_url, "handles"
        else:
            urls = checked_urls(base_url)
            wire = partial(HttpLink, headers=headers, api_key=api_key, max_connections=2 * max_concurrency, clock=clock)
            self._link, self._where = partial(wire, urls, transport=transport), ", ".join(urls)
        self._opened(loops.Cores(partial(_new_core, self._link, self._settings)))

    def _opened(self, cores: loops.Cores) -> None:
        self._cores = cores
        # What was opened for blocking calls; other loops are closed by whoever runs them.
        weakref.finalize(self, loops.close, cores)

    def __getstate__(self) -> dict[str, Any]:
        # Connections stay behind: a copy in another process opens its own, and takes a key from its own environment.
        return {name: value for name, value in self.__dict__.items() if name != "_cores"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened(loops.Cores(partial(_new_core, self._link, self._settings)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._where}, model={self._model}, version={self._version})"

    def _question(self, request_id: str | None, version: str | None, trace: bool = False) -> Question:
        return Question(
            request_id=request_id or f"score-{uuid.uuid4().hex}",
            asked=self._asked,
            model=self._model,
            version=self._version if version is None else version,
            trace=trace,
        )

    async def _score(
        self,
        prompt: Text,
        completions: Sequence[Text],
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        question: Question,
        deadline_s: float | None,
    ) -> list[float]:
        item: dict[str, Any] = {"prompt": prompt, "completions": completions}
        if tools is not None:
            item["tools"] = tools
        if chat_template_kwargs is not None:
            item["chat_template_kwargs"] = chat_template_kwargs
        scores = await self._score_items([item], question, deadline_s, "raise")
        result = scores.results[0]
        if result.error is not None:
            raise item_exception(result.error)
        return list(result.rewards or ())

    async def _score_items(self, items: Sequence[Item], question: Question, deadline_s: float | None, bad_items: BadItems) -> Scores:
        return await self._cores.here().score_items(items, question, self._deadline_s(deadline_s), bad_items)

    async def _score_texts(
        self, texts: Sequence[str], prompts: Sequence[str] | None, question: Question, deadline_s: float | None
    ) -> list[float]:
        return await self._cores.here().score_texts(texts, prompts, question, self._deadline_s(deadline_s))

    async def _models(self) -> list[ModelInfo]:
        core = self._cores.here()
        return await core.once(core.link.models, self._settings.deadline_s)

    async def _health(self) -> Health:
        core = self._cores.here()
        return await core.once(core.link.health, self._settings.deadline_s)

    def _deadline_s(self, deadline_s: float | None) -> float:
        return self._settings.deadline_s if deadline_s is None else deadline_s


class AsyncRewardClient(_Client):
    """Client for asyncio; may be used on several event loops, copied to other processes, and shared by any number of tasks.

    Arguments, methods and exceptions are those of `RewardClient`.
    """

    async def score(
        self,
        prompt: Text,
        completions: Sequence[Text],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        version: str | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> list[float]:
        """As `RewardClient.score`."""
        return await self._score(prompt, completions, tools, chat_template_kwargs, self._question(request_id, version), deadline_s)

    async def score_items(
        self,
        items: Sequence[Item],
        *,
        version: str | None = None,
        trace: bool = False,
        deadline_s: float | None = None,
        request_id: str | None = None,
        bad_items: BadItems = "raise",
    ) -> Scores:
        """As `RewardClient.score_items`."""
        return await self._score_items(items, self._question(request_id, version, trace), deadline_s, bad_items)

    async def score_texts(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        version: str | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> list[float]:
        """As `RewardClient.score_texts`."""
        return await self._score_texts(texts, prompts, self._question(request_id, version), deadline_s)

    async def models(self) -> list[ModelInfo]:
        """As `RewardClient.models`."""
        return await self._models()

    async def health(self) -> Health:
        """As `RewardClient.health`."""
        return await self._health()

    async def close(self) -> None:
        """Close the connections that were opened on this event loop."""
        await self._cores.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class RewardClient(_Client):
    """Blocking client; may be shared by threads, copied to other processes, and used where an event loop runs.

    Args:
        base_url: where the application is mounted, for example `http://127.0.0.1:8000`; several servers with the same models, as a list or
            with commas between them; or a function that makes a link of another kind.
        deadline_s: bound of one call over all its attempts and waits, in seconds; it travels with every request.
        max_retries: repetitions of one request after 408, 429, 502, 503, 504 or a lost connection; None: as many as the deadline allows.
            Refused connections and servers that are not up yet do not count.
        model: the model that must answer; None: the server's default one.
        version: the version that must answer, else VersionError; None: the server's choice. A call can say another one.
        max_items_per_request, max_tokens_per_request: longer lists are sent as several requests; tokens are estimated from characters.
        max_concurrency: requests of this client in flight, over all its calls; others wait here.
        hedge_after_s: ask a second time when no answer has come for so long, and take the first one; None: never. It doubles work.
        api_key: None: RAYWARD_API_KEY, if it is set.
        weights: weight set for a model with several outputs; None: the model's own.
        normalise: raw rewards, or by the model's reference statistics: centred, standardised.
        n_critiques, temperature: of a model that writes critiques: the reward is the mean over so many, sampled at this temperature.
        headers: sent with every request.
        transport, clock, sleep, jitter: seams for tests; clock counts seconds, jitter draws from [0, 1).
    """

    def score(
        self,
        prompt: Text,
        completions: Sequence[Text],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        version: str | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> list[float]:
        """Rewards of the completions of one prompt, in order.

        Args:
            prompt: a text, or turns that end with a user or tool turn, or with one of the assistant that has `prefix: true`.
            completions: of each a text, or turns that begin and end with the assistant's.
            tools, chat_template_kwargs: what the chat template is given besides turns.
            version: pinned for this call.
            deadline_s: of this call.
            request_id: for the server's logs; None: a new one.

        Raises:
            RequestError: the request breaks a rule of the server; VersionError, AccessError are such.
            TooLongError, ContractError: the conversation cannot be scored under the model's contract.
            OverloadedError, UnavailableError, DeadlineError, ServerError: no reward could be had; retry later.
        """
        return loops.run(self._score(prompt, completions, tools, chat_template_kwargs, self._question(request_id, version), deadline_s))

    def score_items(
        self,
        items: Sequence[Item],
        *,
        version: str | None = None,
        trace: bool = False,
        deadline_s: float | None = None,
        request_id: str | None = None,
        bad_items: BadItems = "raise",
    ) -> Scores:
        """Rewards or an error for each item, in order; `Scores.rewards()` has them all or raises.

        Args:
            items: prompts and their completions; options as in `score`.
            trace: also the reward at every token of each completion.
            bad_items: what an item that breaks a rule of the schema does, an empty completion for example: `raise` refuses the whole call,
                `report` makes it an error of that item.

        Raises:
            PartialError: the list was sent as several requests, and some had no answer; it holds the rewards of the others.
            RequestError, OverloadedError, UnavailableError, DeadlineError, ServerError: as in `score`, of the request as a whole.
        """
        return loops.run(self._score_items(items, self._question(request_id, version, trace), deadline_s, bad_items))

    def score_texts(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        version: str | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> list[float]:
        """Rewards of whole texts in which prompt and completion stand as a chat template wrote them, by the server's default model.

        Args:
            texts: one per reward wanted.
            prompts: what each text begins with; where a text is plain, the server applies its template to prompt and rest.
            version, deadline_s, request_id: as in `score`.

        Raises:
            ConfigError: a model or options of scoring were asked for, for which this path has no place.
            TextRefusedError: a text cannot be scored, because it is too long for example.
            RequestError, OverloadedError, UnavailableError, DeadlineError, ServerError: as in `score`; one text without a reward fails all.
        """
        return loops.run(self._score_texts(texts, prompts, self._question(request_id, version), deadline_s))

    def models(self) -> list[ModelInfo]:
        """The served models, with the version that answers now: pin that to have a whole step judged by one."""
        return loops.run(self._models())

    def health(self) -> Health:
        """Model and version, if the server can score; raises as `score` does if it cannot."""
        return loops.run(self._health())

    def close(self) -> None:
        """Close the connections."""
        loops.close(self._cores)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
