"""The native wire schema of `POST /v1/score`.

    request   {"items": [{"prompt": str | messages, "completions": [str | messages, ...], "tools"?: [schema, ...],
               "chat_template_kwargs"?: {name: JSON value}}, ...], "model"?: str, "version"?: str, "weights"?: str,
               "normalise"?: "raw" | "centred" | "standardised", "n_critiques"?: int, "temperature"?: float, "trace"?: bool,
               "deadline_ms"?: int}
    message   {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str | text parts | null, "tool_calls"?: [...],
               "tool_call_id"?: str, "name"?: str, "reasoning_content"?: str, "prefix"?: bool}
    reply     {"id", "model", "version", "results": [{"rewards": [float, ...], "num_tokens"?: [int, ...], "outputs"?: [[float, ...], ...],
               "steps"?: [[float, ...], ...], "critiques"?: [[str, ...], ...], "reward_std"?: [float, ...],
               "traces"?: [{"tokens": [str, ...], "rewards": [float, ...]}, ...]}
               | {"error": {"code", "message", "retryable"}}, ...], "usage", "timings"}
    error     {"error": {"code", "message", "remedy", "item", "retryable"}} with a 4xx or 5xx status

`results` has the order of `items`, `rewards` the order of `completions`. A result holds finite rewards or an error, never both, never a
placeholder. For each completion, `outputs` holds the values of a model with several outputs (`GET /v1/models` names them); `steps`, of a
process reward model, the probability that each step is right; `critiques`, of a model that criticises before it scores, its `n_critiques`
texts, over which the reward is the mean and `reward_std` the deviation.

A request that breaks a rule is refused as a whole, naming item and rule; an item that only turns out to be unscorable when it is tokenized
(too long for the contract), or that asks for weights, statistics or critiques which the model has not, is an error of that item in a 200
reply.

Shared by server and client: pydantic and the standard library only. The rules a request must keep: `rayward.wire.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from rayward.contract.contract import Normalise
from rayward.errors import (
    AccessError,
    ConfigError,
    DeadlineError,
    OverloadedError,
    RaywardError,
    RequestError,
    ServerError,
    UnavailableError,
    VersionError,
)
from rayward.wire.items import Asked, ItemResult


class Wire(BaseModel):
    """Base of what stands in bodies: unknown fields are refused, types are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True)


class WireMessage(Wire):
    """One turn. What its fields may hold: `rayward.contract.conversation.parse_turn`, which tells images and sounds by name."""

    role: str
    content: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    name: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None
    prefix: Any = None
    # Of OpenAI's messages: null where there is none, and refused where there is.
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    annotations: Any = None


def _kind(value: object) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) else None


TextOrMessages = Annotated[
    # Lists end at their first fault: an error is a record of its own, and there may be millions.
    Annotated[str, Tag("text")] | Annotated[list[WireMessage], Field(fail_fast=True), Tag("messages")],
    Discriminator(_kind, custom_error_type="text_or_messages", custom_error_message="Input should be a string or a list of messages"),
]


class WireItem(Wire):
    """A prompt and its completions, and what their chat template is given besides.

    A prompt is a text, or turns that end with a user or tool turn, or with one of the assistant that has `prefix: true` and goes on in the
    completion. A completion is a text, or turns that begin and end with the assistant's.
    """

    prompt: TextOrMessages
    completions: Annotated[list[TextOrMessages], Field(fail_fast=True)]
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Options(Wire):
    """What a request asks for besides its texts; for every item alike."""

    model: str | None = None
    version: str | None = None
    """Pinned: where it is not served, nothing is scored and the status is 409."""
    weights: str | None = None
    normalise: Normalise = "raw"
    n_critiques: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    deadline_ms: Annotated[int, Field(ge=1)] | None = None
    """What is left of the caller's time; work that has not begun by then is dropped."""

    @property
    def asked(self) -> Asked:
        """What is asked of the model, for every item alike."""
        return Asked(self.weights, self.normalise, self.n_critiques, self.temperature)


class ScoreRequest(Options):
    """Body of `POST /v1/score`."""

    items: Annotated[list[WireItem], Field(fail_fast=True)]
    trace: bool = False
    """Also the reward at every token of each completion."""


class Usage(Wire):
    """Tokens of the conversations asked for, and tokens computed for them (shared prefixes once)."""

    tokens: int
    tokens_computed: int


class WireTimings(Wire):
    """Where the time of a request went: its longest wait for the compute thread, rendering and tokenizing, its forwards, all of it."""

    queue_s: float = 0.0
    encode_s: float = 0.0
    compute_s: float = 0.0
    total_s: float = 0.0


class ScoreReply(Wire):
    """Body of a 200 reply; `id` is that of the request."""

    id: str
    model: str
    version: str
    results: list[ItemResult]
    usage: Usage
    timings: WireTimings | None = None


class ErrorDetail(Wire):
    """What went wrong, the rule, the remedy, the index of the item if one is at fault, and whether another try may help."""

    code: str
    message: str
    remedy: str = ""
    item: int | None = None
    retryable: bool = False


class ErrorReply(Wire):
    """Body of every 4xx and 5xx reply."""

    error: ErrorDetail


class WireNormaliser(Wire):
    """Statistics of the reference set that `centred` and `standardised` use."""

    mean: float
    std: float
    num_rewards: int
    reference: str


class WireRelease(Wire):
    """One version of a model: what became of it, and its part.

    Attributes:
        share: of the requests that pin no version.
        error: why it failed.
    """

    version: str
    state: Literal["loading", "ready", "failed"]
    role: Literal["current", "canary", "shadow", "previous", "idle"] = "idle"
    share: float | None = None
    error: str | None = None


class ModelInfo(Wire):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    version: str
    max_tokens: int
    outputs: list[str]
    weight_sets: list[str] = []
    normaliser: WireNormaliser | None = None
    writes_critiques: bool = False
    releases: list[WireRelease] = []


class ModelList(Wire):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(Wire):
    """Body of `GET /health` while the server can score."""

    status: Literal["ok"] = "ok"
    model: str
    version: str


def build_reply(reply_id: str, model: str, version: str, results: Sequence[ItemResult], timings: WireTimings | None = None) -> ScoreReply:
    """The reply for results in the order of the request's items."""
    return ScoreReply(id=reply_id, model=model, version=version, results=list(results), usage=usage_of(results), timings=timings)


def usage_of(results: Sequence[ItemResult]) -> Usage:
    """The sums over the results."""
    return Usage(tokens=sum(r.tokens for r in results), tokens_computed=sum(r.tokens_computed for r in results))


RETRYABLE_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Of replies after which the same request may be answered."""

_CODES: tuple[tuple[type[RaywardError], str], ...] = (
    (VersionError, "version_not_served"),
    (OverloadedError, "overloaded"),
    (UnavailableError, "unavailable"),
    (DeadlineError, "deadline_exceeded"),
    (ServerError, "scorer_failed"),
    (RequestError, "bad_request"),
    (ConfigError, "config"),
)


def status_of(error: RaywardError) -> int:
    """HTTP status of an error: its own where it knows one, else that of its type."""
    own = getattr(error, "status", None)
    return own if isinstance(own, int) else error.http_status


def code_of(error: RaywardError) -> str:
    """Code of an error on the wire: its own where it knows one, else that of its type."""
    own = getattr(error, "code", None)
    if isinstance(own, str):
        return own
    if isinstance(error, AccessError):
        return "forbidden" if error.status == 403 else "unauthorized"
    return next((code for kind, code in _CODES if isinstance(error, kind)), "internal")


def error_reply(error: RaywardError, code: str | None = None) -> tuple[int, ErrorReply]:
    """HTTP status and body for an error; `code` goes before the error's own."""
    detail = ErrorDetail(
        code=code or code_of(error),
        message=error.problem,
        remedy=error.remedy,
        item=error.item if isinstance(error, RequestError) else None,
        retryable=error.retryable or status_of(error) in RETRYABLE_STATUSES,
    )
    return status_of(error), ErrorReply(error=detail)
