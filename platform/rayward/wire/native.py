"""The native wire schema of `POST /v1/score`.

    request   {"items": [{"prompt": str | messages, "completions": [str | messages, ...], "tools"?: [schema, ...],
               "chat_template_kwargs"?: {name: JSON value}}, ...], "model"?: str, "weights"?: str,
               "normalise"?: "raw" | "centred" | "standardised", "n_critiques"?: int, "temperature"?: float}
    message   {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str | text parts | null, "tool_calls"?: [...],
               "tool_call_id"?: str, "name"?: str, "reasoning_content"?: str, "prefix"?: bool}
    reply     {"id", "model", "version", "results": [{"rewards": [float, ...], "outputs"?: [[float, ...], ...],
               "steps"?: [[float, ...], ...], "critiques"?: [[str, ...], ...], "reward_std"?: [float, ...]}
               | {"error": {"code", "message"}}, ...], "usage"}
    error     {"error": {"code", "message", "remedy", "item"}} with a 4xx or 5xx status

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
from rayward.errors import RaywardError, RequestError, RuleError
from rayward.wire.items import Asked, ItemResult


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class WireMessage(_Wire):
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
    Annotated[str, Tag("text")] | Annotated[list[WireMessage], Tag("messages")],
    Discriminator(_kind, custom_error_type="text_or_messages", custom_error_message="Input should be a string or a list of messages"),
]


class WireItem(_Wire):
    """A prompt and its completions, and what their chat template is given besides.

    A prompt is a text, or turns that end with a user or tool turn, or with one of the assistant that has `prefix: true` and goes on in the
    completion. A completion is a text, or turns that begin and end with the assistant's.
    """

    prompt: TextOrMessages
    completions: list[TextOrMessages]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ScoreRequest(_Wire):
    """Body of `POST /v1/score`."""

    items: list[WireItem]
    model: str | None = None
    weights: str | None = None
    normalise: Normalise = "raw"
    n_critiques: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    version: str | None = None
    """Pinned: nothing is scored, and the status is 409, where it is not served."""
    deadline_ms: Annotated[int, Field(ge=1)] | None = None
    """What is left of the caller's time; work that cannot be done in it is not begun."""
    trace: bool = False
    """Also the reward at every token of each completion."""

    @property
    def asked(self) -> Asked:
        """What is asked of the model, for every item alike."""
        return Asked(self.weights, self.normalise, self.n_critiques, self.temperature)


class Usage(_Wire):
    """Tokens of the conversations asked for, and tokens computed for them (shared prefixes once)."""

    tokens: int
    tokens_computed: int


class ScoreReply(_Wire):
    """Body of a 200 reply."""

    id: str
    model: str
    version: str
    results: list[ItemResult]
    usage: Usage


class ErrorDetail(_Wire):
    """What went wrong, the rule, the remedy, and the index of the item if one is at fault."""

    code: str
    message: str
    remedy: str = ""
    item: int | None = None


class ErrorReply(_Wire):
    """Body of every 4xx and 5xx reply."""

    error: ErrorDetail


class WireNormaliser(_Wire):
    """Statistics of the reference set that `centred` and `standardised` use."""

    mean: float
    std: float
    num_rewards: int
    reference: str


class ModelInfo(_Wire):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    version: str
    max_tokens: int
    outputs: list[str]
    weight_sets: list[str] = []
    normaliser: WireNormaliser | None = None
    writes_critiques: bool = False


class ModelList(_Wire):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(_Wire):
    """Body of `GET /health` while the server can score."""

    status: Literal["ok"] = "ok"
    model: str
    version: str


def build_reply(reply_id: str, model: str, version: str, results: Sequence[ItemResult]) -> ScoreReply:
    """The reply for results in the order of the request's items."""
    usage = Usage(tokens=sum(r.tokens for r in results), tokens_computed=sum(r.tokens_computed for r in results))
    return ScoreReply(id=reply_id, model=model, version=version, results=list(results), usage=usage)


def error_reply(error: RaywardError, code: str | None = None) -> tuple[int, ErrorReply]:
    """HTTP status and body for an error; `code` names errors that are no rule violation."""
    if isinstance(error, RuleError):
        code, status = error.code, error.status
    else:
        status = error.http_status
    item = error.item if isinstance(error, RequestError) else None
    return status, ErrorReply(error=ErrorDetail(code=code or "internal", message=error.problem, remedy=error.remedy, item=item))
