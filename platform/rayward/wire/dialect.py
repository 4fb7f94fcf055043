"""What a dialect is: how one HTTP request of another system becomes items, and how results become the reply that its clients read.

A dialect never scores, waits or opens a socket: `parse` turns a body into a `Call`, the ingress has it scored, and `Call.render` turns what
came back into the body of a reply. One file per dialect in `rayward.wire.dialects`; `rayward.wire.dialects.table` is the one list.

    route = route.pick(body) if route.pick else route             where dialects share a path: whose body it is
    route.parse(body, limits) -> Call(items, render, ...)         raises RuleError, refused before anything is tokenized
    ingress: Call.items -> Answered                               a route that asks for no scores has no items
    call.render(answered) -> Body                                 raises ItemFailedError where the schema has no room for an item's error
    route.error(status, error, code) -> JSON                      every refusal, in the dialect's own error shape

Pydantic and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rayward.errors import RaywardError, RequestError
from rayward.wire.items import ItemError, ItemResult, ScoreItem
from rayward.wire.rules import Limits

JSON: TypeAlias = Any
"""A value of the standard JSON types."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds.

    Attributes:
        queue_s: its longest wait for the compute thread.
        encode_s: rendering and tokenizing.
        compute_s: from its first forward to the end of its last.
        total_s: in the ingress, from the end of the body to the reply.
    """

    queue_s: float = 0.0
    encode_s: float = 0.0
    compute_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back for the items of one request, in their order, all scored by one version.

    Attributes:
        request_id: the caller's, or ours.
        model, version: who scored.
        created: seconds since 1970.
        outputs: names of the head's outputs, as `ModelInfo` has them; empty: not known.
    """

    request_id: str
    model: str
    version: str
    results: tuple[ItemResult, ...]
    created: int
    timings: Timings = Timings()
    outputs: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all conversations asked for."""
        return sum(result.tokens for result in self.results)


@dataclass(frozen=True, slots=True)
class Body:
    """The body of a 200 reply.

    Attributes:
        content: JSON value, or a whole body that is no JSON.
        headers: besides those that every reply has.
    """

    content: JSON | bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Call:
    """One request, past every rule that needs no tokenizer.

    Attributes:
        items: what is scored. A flat dialect makes one item of form `text` of every text: prefixes that they share are found later.
        render: the reply's body of what came back.
        model: who is asked; None: the only or default one.
        version: pinned; nothing is scored where it is not served.
        deadline_ms: what is left of the caller's time; None: not said.
        request_id: the caller's.
    """

    items: tuple[ScoreItem, ...]
    render: Callable[[Answered], Body]
    model: str | None = None
    version: str | None = None
    deadline_ms: int | None = None
    request_id: str | None = None


Parse: TypeAlias = Callable[[bytes, Limits], Call]
RenderError: TypeAlias = Callable[[int, RaywardError, str], JSON]
"""HTTP status, error, code of the wire -> body."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path of a dialect.

    Attributes:
        dialect: name of the dialect, for metrics and headers.
        statuses: those of our HTTP statuses that the dialect's clients know by another one.
        request, reply: JSON schemas for the OpenAPI document.
        asks: `ready` and `alive`: probes of other systems, which have no items; `ready` is refused with 503 while nothing can score.
        pick: where dialects share a path, the route whose body it is, with an error shape of its own.
        media_types: of a request body; any charset.
    """

    path: str
    dialect: str
    summary: str
    parse: Parse
    error: RenderError
    request: Mapping[str, JSON]
    reply: Mapping[str, JSON]
    methods: tuple[str, ...] = ("POST",)
    statuses: Mapping[int, int] = field(default_factory=dict)
    asks: Literal["scores", "ready", "alive"] = "scores"
    pick: Callable[[bytes], Route] | None = None
    media_types: tuple[str, ...] = ("application/json",)


class ItemFailedError(RequestError):
    """An item has no reward, and the dialect's schema has no place to say so beside the others; the whole request is refused.

    Args:
        code: of the item's error.
        status: 422 for what is the item's own fault, 503 for what another try may not meet.
    """

    def __init__(self, error: ItemError, *, item: int) -> None:
        super().__init__(
            f"item {item} has no reward ({error.code}): {error.message}",
            remedy="retry" if error.retryable else "leave that item out; POST /v1/score reports such items beside the others' rewards",
            item=item,
        )
        self.code = error.code
        self.status = 503 if error.retryable else 422


def rewards_of(results: Sequence[ItemResult]) -> list[tuple[float, ...]]:
    """The rewards of every item, for schemas without room for errors.

    Raises:
        ItemFailedError: the first item that has none.
    """
    found = []
    for index, result in enumerate(results):
        if result.rewards is None:
            assert result.error is not None
            raise ItemFailedError(result.error, item=index)
        if not result.is_finite():
            raise ItemFailedError(ItemError.of("non_finite", "the model gave a number that is not finite"), item=index)
        found.append(result.rewards)
    return found


def refuse_plain_texts(items: Sequence[ScoreItem], results: Sequence[ItemResult]) -> None:
    """Where nobody may send texts that went through no chat template (`flat_text: refuse`).

    Raises:
        ItemFailedError: the first one that was sent all the same.
    """
    for index, (item, result) in enumerate(zip(items, results, strict=True)):
        if item.form == "text" and result.taken_as == "as_given" and result.error is None:
            error = ItemError.of("not_templated", "the text has none of the contract's turns, and flat_text is refuse")
            raise ItemFailedError(error, item=index)
