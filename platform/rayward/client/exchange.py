"""What scoring clients say and what they make of an answer: items as they travel, results, and when a try may be repeated.

Nothing here sends or waits. A reply that does not hold one finite reward per completion is an error, never a number.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from rayward.errors import (
    AccessError,
    AlreadyTemplatedError,
    ChangedTextError,
    ConfigError,
    ContractError,
    DeadlineError,
    OverloadedError,
    PartialError,
    RaywardError,
    RequestError,
    RuleError,
    ScoringError,
    ServerError,
    TokenRangeError,
    TooLongError,
    UnavailableError,
    UnsupportedMessageError,
    VersionError,
)
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem
from rayward.wire.native import ErrorReply, ScoreReply

Text: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text, or turns as {"role", "content"} mappings, with calls of tools and thoughts where they have them."""

Item: TypeAlias = Mapping[str, Any] | ScoreItem
"""{"prompt": Text, "completions": [Text, ...], "tools"?: [schema, ...], "chat_template_kwargs"?: {name: value}}."""

CHARS_PER_TOKEN = 4
"""Of JSON in ASCII; an estimate that only decides how a long list is split."""

NOT_UP = b"/-/routes"
"""In the 404 of Serve's own proxy, which names its list of routes: no application is mounted there, or not yet."""

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Scores:
    """What came back for a list of items.

    Attributes:
        results: one per item, in order: rewards or an error.
        model: name of the model that scored.
        versions: model version that scored each item, empty where none did; all completions of one item are scored by one version.
        request_id: stands in the server's logs.
    """

    results: tuple[ItemResult, ...]
    model: str
    versions: tuple[str, ...]
    request_id: str = ""

    @property
    def failed(self) -> tuple[int, ...]:
        """Indices of the items without rewards."""
        return tuple(index for index, result in enumerate(self.results) if result.rewards is None)

    def rewards(self) -> list[list[float]]:
        """The rewards of every item, all of them finite.

        Raises:
            PartialError: an item has none; the error names which, and holds the rewards of the others.
        """
        if self.failed:
            raise partial_error(self.results)
        return [list(result.rewards or ()) for result in self.results]


@dataclass(frozen=True, slots=True)
class Entry:
    """One item on its way.

    Attributes:
        index: in the list of the call.
        payload: what travels: JSON of the wire, or a ScoreItem.
        num_tokens: an estimate.
        num_completions: rewards that a reply must hold; None where the item is not even of the right form, and the server will say so.
    """

    index: int
    payload: Any
    num_tokens: int
    num_completions: int | None


@dataclass(frozen=True, slots=True)
class Question:
    """What one call asks besides its items.

    Attributes:
        request_id: the same for every request and every try of the call, so that a canary takes all of it or nothing.
        version: pinned; None: whatever the server's routes say.
        trace: also the reward at every token.
    """

    request_id: str
    asked: Asked = Asked()
    model: str | None = None
    version: str | None = None
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """The results of the items of one request, in their order."""

    results: tuple[ItemResult, ...]
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response with its whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class TryFailedError(Exception):
    """A try that another one may better.

    Args:
        error: what the call raises when there is no other try.
        endpoint: who failed, by its number.
        wait_s: what the server asks for before the next one.
        unheard: nobody took the request: the connection was refused, or no application is mounted; such tries are repeated until the
            deadline, whatever `max_retries` says.
    """

    def __init__(self, error: ScoringError, *, endpoint: int = 0, wait_s: float = 0.0, unheard: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.endpoint = endpoint
        self.wait_s = wait_s
        self.unheard = unheard


class TextRefusedError(RequestError):
    """Example: a whole text of 5,000 tokens, and a contract of 4,096; no other try and no other server betters it."""


@dataclass(slots=True)
class Outcome:
    """What is known of the items of one call so far."""

    num_items: int
    model: str = ""
    results: dict[int, ItemResult] = field(default_factory=dict)
    versions: dict[int, str] = field(default_factory=dict)

    def take(self, entries: Sequence[Entry], reply: Reply) -> None:
        """Keep what came back; a later answer for an item goes before an earlier one."""
        self.model = reply.model
        for entry, result in zip(entries, reply.results, strict=True):
            self.results[entry.index] = result
            self.versions[entry.index] = reply.version

    def fail(self, index: int, error: ItemError) -> None:
        """An item without an answer."""
        self.results[index] = ItemResult(error=error)

    def scores(self, request_id: str) -> Scores:
        """All of it, once every item has a result."""
        order = range(self.num_items)
        versions = tuple(self.versions.get(index, "") for index in order)
        return Scores(tuple(self.results[index] for index in order), self.model, versions, request_id)


def json_item(item: Item) -> dict[str, Any]:
    """An item as JSON values of the wire.

    Raises:
        ConfigError: it asks for weights, a scale or critiques of its own, or is a flat text.
    """
    if isinstance(item, ScoreItem):
        if item != ScoreItem(item.prompt, item.completions, tools=item.tools, chat_template_kwargs=item.chat_template_kwargs):
            raise ConfigError(
                "an item is no conversation, or asks for weights, a scale, critiques or a trace of its own; a request asks the same for "
                "all its items",
                remedy="give weights, normalise, n_critiques and temperature to the client, and trace to the call",
            )
        given = {"tools": item.tools, "chat_template_kwargs": item.chat_template_kwargs}
        item = {"prompt": item.prompt, "completions": item.completions, **{name: value for name, value in given.items() if value}}
    # Tuples and other sequences become JSON arrays; keys the schema does not know are refused by the server.
    return {key: _as_json(value) for key, value in item.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_as_json(entry) for entry in value]
    return value


def encoded(index: int, item: Item) -> Entry:
    """An item as it travels over HTTP.

    Raises:
        RequestError: it holds something that JSON does not know.
    """
    fields = json_item(item)
    try:
        payload = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(
            f"item {index} is no JSON: {exc}", remedy="send texts, or turns of texts; no arrays of numbers, no tensors, no NaN", item=index
        ) from exc
    completions = fields.get("completions")
    return Entry(index, payload, len(payload) // CHARS_PER_TOKEN, len(completions) if isinstance(completions, list) else None)


def body_of(entries: Sequence[Entry], question: Question, deadline_ms: int) -> bytes:
    """The body of `POST /v1/score`."""
    rest: dict[str, Any] = {"deadline_ms": deadline_ms, **question.asked.given()}
    rest |= {name: value for name, value in (("model", question.model), ("version", question.version)) if value is not None}
    if question.trace:
        rest["trace"] = True
    # Every item was encoded once; a repetition encodes none again.
    return b'{"items":[' + b",".join(entry.payload for entry in entries) + b"]," + json.dumps(rest, separators=(",", ":")).encode()[1:]


def reply_of(entries: Sequence[Entry], body: bytes) -> Reply:
    """What a 200 reply says.

    Raises:
        ServerError: it does not hold finite rewards, as many as completions, or an error for every item.
    """
    reply = parsed(body, ScoreReply)
    check_counts(entries, reply.results)
    return Reply(tuple(reply.results), reply.model, reply.version)


def parsed(body: bytes, schema: type[M]) -> M:
    """A reply by its schema; fields that a newer server adds are passed over.

    Raises:
        ServerError: it is something else.
    """
    try:
        return schema.model_validate_json(body, extra="ignore")
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ServerError(
            f"the reply is not a {schema.__name__}: {where}: {first['msg']}", remedy="check that base_url points at a Rayward server"
        ) from exc


def check_counts(entries: Sequence[Entry], results: Sequence[ItemResult]) -> None:
    """As many results as items, as many rewards as completions.

    Raises:
        ServerError: otherwise.
    """
    remedy = "report this: the server broke its own schema"
    if len(results) != len(entries):
        raise ServerError(f"{len(entries)} items were sent and {len(results)} results came back", remedy=remedy)
    for entry, result in zip(entries, results, strict=True):
        if result.rewards is not None and len(result.rewards) != entry.num_completions:
            raise ServerError(
                f"item {entry.index} has {entry.num_completions} completions and got {len(result.rewards)} rewards", remedy=remedy
            )


def judged(answer: Answer, endpoint: int, entries: Sequence[Entry] = ()) -> Exception:
    """What a reply other than 200 means: a `TryFailedError` where another try may be answered, else the error to raise.

    Replies that are not of our form come from a proxy before the application. Its 500 is a replica that died under the request, its 408 a
    time-out, its 404 an application that is not mounted (yet): scoring has no side effects, so these are repeated too.
    """
    ours = True
    try:
        detail = ErrorReply.model_validate_json(answer.body, extra="ignore").error
        code, problem, remedy, item = detail.code, f"{detail.message} ({detail.code})", detail.remedy, detail.item
    except ValidationError:
        ours, code, item = False, "", None
        problem = f"status {answer.status}: {answer.body[:200].decode('utf-8', 'replace')}"
        remedy = "check base_url and the server's log"
    exact_ms = answer.headers.get("retry-after-ms", "")
    wait_s = retry_after_s(exact_ms) / 1e3 or retry_after_s(answer.headers.get("retry-after", ""))
    status = answer.status
    if status == 404 and not ours and NOT_UP in answer.body:
        problem = f"no application is mounted there: {problem}"
        return TryFailedError(UnavailableError(problem, remedy="check the path of base_url, or wait"), endpoint=endpoint, unheard=True)
    if status == 429 or code == "overloaded":
        overloaded = OverloadedError(problem, remedy=remedy or "send less at once, or serve more replicas", retry_after_s=wait_s)
        return TryFailedError(overloaded, endpoint=endpoint, wait_s=wait_s)
    if status == 503:
        return TryFailedError(UnavailableError(problem, remedy=remedy or "retry"), endpoint=endpoint, wait_s=wait_s)
    if status in (408, 504):
        return TryFailedError(DeadlineError(problem, remedy=remedy or "raise deadline_s"), endpoint=endpoint, wait_s=wait_s)
    if status == 502 or (status == 500 and not ours and _is_proxys(answer)):
        return TryFailedError(ServerError(problem, remedy=remedy or "retry"), endpoint=endpoint, wait_s=wait_s)
    if status in (401, 403):
        return AccessError(problem, remedy=remedy or "give api_key, or set RAYWARD_API_KEY", status=status)
    if not 400 <= status < 500:
        return ServerError(problem, remedy=remedy)
    index = entries[item].index if item is not None and item < len(entries) else item
    if index != item:
        problem = f"(item {item} of a request is item {index} of the call) {problem}"
    if status == 409:
        return VersionError(problem, remedy=remedy, item=index)
    return RuleError(code, problem, remedy=remedy, item=index) if ours else RequestError(problem, remedy=remedy, item=index)


def _is_proxys(answer: Answer) -> bool:
    # The web server's own words for an application that ended without an answer; a traceback of another server is somebody else's fault.
    return answer.body.strip() in (b"", b"Internal Server Error")


_KINDS: dict[str, tuple[type[ContractError], str]] = {
    "too_long": (TooLongError, "shorten the prompt's last turn or the completion"),
    "template": (ContractError, "use turns and roles that the model's template knows"),
    "unsupported_message": (UnsupportedMessageError, "leave that part out, or serve a model whose template shows it"),
    "already_templated": (AlreadyTemplatedError, "send the messages or texts as they were before any template"),
    "changed_by_template": (ChangedTextError, "serve a model whose template prints completions as they are"),
    "token_out_of_range": (TokenRangeError, "leave that text out, or use the tokenizer that the model was trained with"),
}


def item_exception(error: ItemError) -> RaywardError:
    """The error of one item, for a call that has only this one."""
    if error.code in _KINDS:
        kind, remedy = _KINDS[error.code]
        return kind(error.message, remedy=remedy)
    if error.code == "deadline_exceeded":
        return DeadlineError(error.message, remedy="raise deadline_s, send less at once, or serve more replicas")
    if error.code == "overloaded":
        return OverloadedError(error.message, remedy="send less at once, or serve more replicas")
    if error.retryable:
        return UnavailableError(f"{error.message} ({error.code})", remedy="try again")
    return ServerError(f"no reward ({error.code}): {error.message}", remedy="leave the sample out; check the model if this repeats")


def item_error(exc: RaywardError) -> ItemError:
    """What stands for an item whose request failed."""
    if isinstance(exc, DeadlineError):
        return ItemError("deadline_exceeded", exc.problem, retryable=True)
    if isinstance(exc, OverloadedError):
        return ItemError("overloaded", exc.problem, retryable=True)
    code = getattr(exc, "code", None)
    return ItemError(code if isinstance(code, str) and code else "interrupted" if exc.retryable else "failed", exc.problem, exc.retryable)


def partial_error(results: Sequence[ItemResult]) -> PartialError:
    """The error of a list of results of which some are errors."""
    errors = {index: result.error for index, result in enumerate(results) if result.error is not None}
    shown = "; ".join(f"item {index}: {error.code}: {error.message[:200]}" for index, error in list(errors.items())[:3])
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return PartialError(
        f"{len(errors)} of {len(results)} items have no reward ({shown}{more})",
        remedy="mask the samples of `failed`; `rewards` holds those of the others",
        failed=tuple(errors),
        codes=tuple(error.code for error in errors.values()),
        rewards=tuple(result.rewards for result in results),
    )


def retry_after_s(text: str) -> float:
    """Seconds to wait by a `Retry-After` header, a number or an HTTP date; 0 when absent or unreadable."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0.0 <= seconds < float("inf") else 0.0
