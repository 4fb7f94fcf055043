"""What the scoring clients do, without doing it: generators that yield `Send` and `Wait` actions and return results.

When a request is repeated, how long to wait, how a long list is split and what a reply means is written here once;
`rayward.client.client` carries the actions out, blocking or on asyncio. Scoring has no side effects, so every request may be
repeated. A reply that does not hold one finite reward per completion is an error, never a number.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rayward.errors import (
    AlreadyTemplatedError,
    ChangedTextError,
    ConfigError,
    ContractError,
    DeadlineError,
    OverloadedError,
    RaywardError,
    RequestError,
    ScoringError,
    ServerError,
    TokenRangeError,
    TooLongError,
    UnsupportedMessageError,
)
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem
from rayward.wire.native import ErrorReply, ScoreReply

RETRYABLE_STATUSES = frozenset({429, 502, 503, 504})
BACKOFF_BASE_S = 0.1
BACKOFF_MAX_S = 5.0
Text: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text, or turns as {"role", "content"} mappings, with calls of tools and thoughts where they have them."""

Item: TypeAlias = Mapping[str, Any] | ScoreItem
"""{"prompt": Text, "completions": [Text, ...], "tools"?: [schema, ...], "chat_template_kwargs"?: {name: value}}."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What came back for a list of items.

    Attributes:
        results: one per item, in order: rewards or an error.
        model: name of the model that scored.
        versions: model version that scored each item; all completions of one item are scored by one version.
    """

    results: tuple[ItemResult, ...]
    model: str
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send one request and give back an `Answer`, or the transport's exception."""

    method: str
    path: str
    content: bytes | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait, and give back None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response with its whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Outcome: TypeAlias = Answer | httpx.RequestError | None
Steps: TypeAlias = Generator[Send | Wait, Outcome, T]


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything the two clients share: what to send, when to send it again, what a reply means.

    Attributes:
        asked: of every item; what is the default is not sent.
    """

    deadline_s: float
    max_retries: int
    model: str | None
    max_items_per_request: int
    asked: Asked
    clock: Callable[[], float]
    jitter: Callable[[], float]

    def score_items(self, items: Sequence[Item]) -> Steps[Scores]:
        """One request per `max_items_per_request` items, under one deadline."""
        until = self.clock() + self.deadline_s
        bodies = [_as_body(item) for item in items]
        results: list[ItemResult] = []
        versions: list[str] = []
        model = ""
        for start in range(0, max(len(bodies), 1), self.max_items_per_request):
            chunk = bodies[start : start + self.max_items_per_request]
            reply = yield from self._score_chunk(chunk, start, until)
            results += reply.results
            versions += reply.versions
            model = reply.model
        return Scores(tuple(results), model, tuple(versions))

    def score(
        self,
        prompt: Text,
        completions: Sequence[Text],
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> Steps[list[float]]:
        """One item; its error is raised."""
        item: dict[str, Any] = {"prompt": prompt, "completions": completions}
        if tools is not None:
            item["tools"] = tools
        if chat_template_kwargs is not None:
            item["chat_template_kwargs"] = chat_template_kwargs
        scores = yield from self.score_items([item])
        result = scores.results[0]
        if result.error is not None:
            raise _item_exception(result.error)
        assert result.rewards is not None
        return list(result.rewards)

    def get(self, path: str, schema: type[M]) -> Steps[M]:
        """GET a page of the server and read it by its schema."""
        answer = yield from self._exchange("GET", path, None, self.clock() + self.deadline_s, first_item=0)
        return _parse(answer.body, schema)

    def _score_chunk(self, chunk: list[dict[str, Any]], first_item: int, until: float) -> Steps[Scores]:
        payload: dict[str, Any] = {"items": chunk}
        if self.model is not None:
            payload["model"] = self.model
        payload |= self.asked.given()
        content = json.dumps(payload, separators=(",", ":")).encode("ascii")
        answer = yield from self._exchange("POST", "/v1/score", content, until, first_item)
        reply = _parse(answer.body, ScoreReply)
        return Scores(_check_counts(chunk, reply), reply.model, (reply.version,) * len(chunk))

    def _exchange(self, method: str, path: str, content: bytes | None, until: float, first_item: int) -> Steps[Answer]:
        failures = 0
        while True:
            remaining = until - self.clock()
            if remaining <= 0:
                _deadline_exceeded(self.deadline_s, "the deadline passed before an answer came")
            outcome = yield Send(method, path, content, remaining)
            assert outcome is not None
            if isinstance(outcome, Answer):
                if outcome.status == 200:
                    return outcome
                if outcome.status not in RETRYABLE_STATUSES:
                    raise _status_exception(outcome, first_item)
            delay = self._delay(failures, outcome) if failures < self.max_retries else 0.0
            if self.clock() + delay >= until:
                _deadline_exceeded(self.deadline_s, f"the last of {failures + 1} attempts failed: {_describe(outcome)}")
            if failures == self.max_retries:
                raise _exhausted(outcome, failures + 1)
            yield Wait(delay)
            failures += 1

    def _delay(self, failures: int, outcome: Answer | httpx.RequestError) -> float:
        ceiling = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0**failures)
        backoff = ceiling * (0.5 + 0.5 * self.jitter())
        return max(backoff, _retry_after(outcome)) if isinstance(outcome, Answer) else backoff


def checked_url(base_url: str) -> str:
    """The URL, if a client can use it.

    Raises:
        ConfigError: it has no scheme.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url {base_url!r} is not an http(s) URL", remedy="write for example http://127.0.0.1:8000")
    return base_url


def request_headers(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Headers of every request."""
    return {"content-type": "application/json", "accept": "application/json", **(extra or {})}


def _as_body(item: Item) -> dict[str, Any]:
    if isinstance(item, ScoreItem):
        if item != ScoreItem(item.prompt, item.completions, tools=item.tools, chat_template_kwargs=item.chat_template_kwargs):
            raise ConfigError(
                "an item asks for weights, a scale or critiques of its own; a request asks the same for all its items",
                remedy="give weights, normalise, n_critiques and temperature to the client",
            )
        given = {"tools": item.tools, "chat_template_kwargs": item.chat_template_kwargs}
        body = {"prompt": item.prompt, "completions": item.completions, **{name: value for name, value in given.items() if value}}
        item = body
    # Tuples and other sequences become JSON arrays; keys the schema does not know are refused by the server.
    return {key: _as_json(value) for key, value in item.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_as_json(entry) for entry in value]
    return value


def _parse(body: bytes, schema: type[M]) -> M:
    try:
        return schema.model_validate_json(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ServerError(
            f"the reply is not a {schema.__name__}: {where}: {first['msg']}", remedy="check that base_url points at a Rayward server"
        ) from exc


def _check_counts(chunk: Sequence[Mapping[str, Any]], reply: ScoreReply) -> tuple[ItemResult, ...]:
    remedy = "report this: the server broke its own schema"
    if len(reply.results) != len(chunk):
        raise ServerError(f"{len(chunk)} items were sent and {len(reply.results)} results came back", remedy=remedy)
    for index, (item, result) in enumerate(zip(chunk, reply.results, strict=True)):
        if result.rewards is not None and len(result.rewards) != len(item["completions"]):
            raise ServerError(
                f"item {index} has {len(item['completions'])} completions and got {len(result.rewards)} rewards", remedy=remedy
            )
    return tuple(reply.results)


_REFUSED_TURNS: dict[str, tuple[type[ContractError], str]] = {
    "unsupported_message": (UnsupportedMessageError, "leave that part out, or serve a model whose template shows it"),
    "already_templated": (AlreadyTemplatedError, "send the messages or texts as they were before any template"),
    "changed_by_template": (ChangedTextError, "serve a model whose template prints completions as they are"),
}


def _item_exception(error: ItemError) -> RaywardError:
    if error.code == "too_long":
        return TooLongError(error.message, remedy="shorten the prompt's last turn or the completion")
    if error.code == "template":
        return ContractError(error.message, remedy="use turns and roles that the model's template knows")
    if error.code in _REFUSED_TURNS:
        kind, remedy = _REFUSED_TURNS[error.code]
        return kind(error.message, remedy=remedy)
    if error.code == "token_out_of_range":
        return TokenRangeError(error.message, remedy="leave that text out, or use the tokenizer that the model was trained with")
    return ServerError(f"no reward ({error.code}): {error.message}", remedy="leave the sample out; check the model if this repeats")


def _status_exception(answer: Answer, first_item: int) -> ScoringError:
    try:
        detail = ErrorReply.model_validate_json(answer.body).error
        problem, remedy, item = f"{detail.message} ({detail.code})", detail.remedy, detail.item
    except ValidationError:
        text = answer.body[:200].decode("utf-8", "replace")
        problem, remedy, item = f"status {answer.status}: {text}", "check base_url and the server's log", None
    if 400 <= answer.status < 500:
        if item is not None and first_item:
            problem = f"(the request starts at item {first_item} of the call) {problem}"
        return RequestError(problem, remedy=remedy, item=None if item is None else item + first_item)
    return ServerError(problem, remedy=remedy)


def _exhausted(outcome: Answer | httpx.RequestError, num_attempts: int) -> ScoringError:
    problem = f"{num_attempts} attempts failed; the last one: {_describe(outcome)}"
    if isinstance(outcome, Answer) and outcome.status in (429, 503):
        return OverloadedError(problem, remedy="send less at once, or serve more replicas")
    return ServerError(problem, remedy="check that the server runs and is reachable at base_url")


def _describe(outcome: Answer | httpx.RequestError) -> str:
    if isinstance(outcome, Answer):
        return str(_status_exception(outcome, 0).problem)
    return f"{type(outcome).__name__}: {outcome}"


def _deadline_exceeded(deadline_s: float, problem: str) -> NoReturn:
    raise DeadlineError(f"{problem} (deadline_s={deadline_s:g})", remedy="raise deadline_s, send less at once, or serve more replicas")


def _retry_after(answer: Answer) -> float:
    # Seconds to wait: a number, or an HTTP date; 0 when absent or unreadable.
    text = answer.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0.0 <= seconds < float("inf") else 0.0
