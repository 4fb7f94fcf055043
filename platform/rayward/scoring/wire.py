"""The native wire schema of `POST /v1/score`.

    request   {"items": [{"prompt": str | messages, "completions": [str | messages, ...]}, ...], "model"?: str, "weights"?: str,
               "normalise"?: "raw" | "centred" | "standardised", "n_critiques"?: int, "temperature"?: float}
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

Shared by server and client: pydantic and the standard library only. The rules a request must keep: `rayward.scoring.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from rayward.errors import RaywardError, RequestError
from rayward.section import Normalise

STATUS_BY_CODE = {
    "invalid_json": 400,
    "unknown_model": 404,
    "body_too_large": 413,
    "too_many_items": 413,
    "too_many_completions": 413,
    "text_too_long": 413,
}
"""HTTP status of a broken rule; every other rule is 422."""


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One prompt and its completions, past all rules of the wire.

    Attributes:
        prompt: turns as {"role", "content"} mappings, ending with a user or tool turn.
        completions: K >= 1 texts of the assistant turn that follows.
        weights: name of the weight set that makes the reward of several outputs; None: the model's own.
        normalise: raw, centred or standardised.
        n_critiques: of a model that writes critiques: the reward is the mean over so many.
        temperature: of their sampling; 0: the likeliest text.
        seed: of their sampling; critiques: given critiques of each completion, which are then not written. Neither is on the wire.
    """

    prompt: tuple[dict[str, str], ...]
    completions: tuple[str, ...]
    weights: str | None = None
    normalise: Normalise = "raw"
    n_critiques: int = 1
    temperature: float = 0.0
    critiques: tuple[tuple[str, ...], ...] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one item has no rewards. Codes: `too_long`, `template`, `non_finite`, `unknown_weights`, `no_normaliser`, `no_critiques`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What became of one item: K finite rewards, or an error; never both.

    Attributes:
        outputs: for a head with several outputs, their values for each completion.
        steps: of a process reward model, the probability that each step is right, for each completion.
        critiques: of a model that writes them, the critiques of each completion.
        reward_std: population standard deviation of the rewards over several critiques, for each completion.
        tokens: tokens of the K conversations; tokens_computed: of these, after sharing prefixes.
    """

    rewards: tuple[float, ...] | None = None
    error: ItemError | None = None
    outputs: tuple[tuple[float, ...], ...] | None = None
    steps: tuple[tuple[float, ...], ...] | None = None
    critiques: tuple[tuple[str, ...], ...] | None = None
    reward_std: tuple[float, ...] | None = None
    tokens: int = 0
    tokens_computed: int = 0


class RuleError(RequestError):
    """A request that breaks a rule of this schema; knows its wire code and HTTP status."""

    def __init__(self, code: str, problem: str, *, remedy: str, item: int | None = None) -> None:
        super().__init__(problem, remedy=remedy, item=item)
        self.code = code

    @property
    def status(self) -> int:
        """HTTP status for the code."""
        return STATUS_BY_CODE.get(self.code, 422)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class WireMessage(_Wire):
    """One turn."""

    role: str
    content: str


def _kind(value: object) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) else None


TextOrMessages = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[WireMessage], Tag("messages")],
    Discriminator(_kind, custom_error_type="text_or_messages", custom_error_message="Input should be a string or a list of messages"),
]


class WireItem(_Wire):
    """A prompt (text, or turns ending with a user or tool turn) and its completions (text, or one assistant turn each)."""

    prompt: TextOrMessages
    completions: list[TextOrMessages]


class ScoreRequest(_Wire):
    """Body of `POST /v1/score`."""

    items: list[WireItem]
    model: str | None = None
    weights: str | None = None
    normalise: Normalise = "raw"
    n_critiques: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0


class WireItemError(_Wire):
    """Error of one item in a 200 reply."""

    code: str
    message: str


FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class WireResult(_Wire):
    """Result of one item: `rewards` or `error`, exactly one of them."""

    rewards: list[FiniteFloat] | None = None
    outputs: list[list[FiniteFloat]] | None = None
    steps: list[list[FiniteFloat]] | None = None
    critiques: list[list[str]] | None = None
    reward_std: list[FiniteFloat] | None = None
    error: WireItemError | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.rewards is None) == (self.error is None):
            raise ValueError("a result holds either rewards or an error")
        return self


class Usage(_Wire):
    """Tokens of the conversations asked for, and tokens computed for them (shared prefixes once)."""

    tokens: int
    tokens_computed: int


class ScoreReply(_Wire):
    """Body of a 200 reply."""

    id: str
    model: str
    version: str
    results: list[WireResult]
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
    return ScoreReply(
        id=reply_id,
        model=model,
        version=version,
        results=[
            WireResult(
                rewards=None if result.rewards is None else list(result.rewards),
                outputs=_lists(result.outputs),
                steps=_lists(result.steps),
                critiques=_lists(result.critiques),
                reward_std=None if result.reward_std is None else list(result.reward_std),
            )
            if result.error is None
            else WireResult(error=WireItemError(code=result.error.code, message=result.error.message))
            for result in results
        ],
        usage=Usage(tokens=sum(r.tokens for r in results), tokens_computed=sum(r.tokens_computed for r in results)),
    )


Value = TypeVar("Value")


def _lists(rows: Sequence[Sequence[Value]] | None) -> list[list[Value]] | None:
    return None if rows is None else [list(row) for row in rows]


def error_reply(error: RaywardError, code: str | None = None) -> tuple[int, ErrorReply]:
    """HTTP status and body for an error; `code` names errors that are no rule violation."""
    if isinstance(error, RuleError):
        code, status = error.code, error.status
    else:
        status = error.http_status
    item = error.item if isinstance(error, RequestError) else None
    return status, ErrorReply(error=ErrorDetail(code=code or "internal", message=error.problem, remedy=error.remedy, item=item))
