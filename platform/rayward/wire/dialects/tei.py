"""Text Embeddings Inference: `/predict` and `/rerank`.

TEI knows no `problem_type`: with `raw_scores: false`, its default, a model of one output answers with the sigmoid of the reward. So do
these paths; an RL client sends `raw_scores: true`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from rayward.errors import OverloadedError, RaywardError, RuleError, UnavailableError
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, TextList, pair_items, text_items
from rayward.wire.dialects.replies import body, flat_rewards, label, message_of, ranked, sigmoid
from rayward.wire.items import ScoreItem
from rayward.wire.rules import Limits

Inputs = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
                {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2}},
            ]
        }
    ),
]
_STATUSES = {502: 424, 400: 422}
_TYPES = {413: "validation", 422: "validation", 424: "backend", 429: "overloaded", 503: "unhealthy", 504: "overloaded"}


class _Common(Peer):
    raw_scores: bool = False
    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"


class PredictRequest(_Common):
    """Of `/predict`: a text, a pair, or a list of lists of one or two texts."""

    inputs: Inputs


class RerankRequest(_Common):
    """Of `/rerank`."""

    query: str
    texts: TextList
    return_text: bool = False


PREDICT = Form(PredictRequest)
RERANK = Form(RerankRequest)


def _sequences(inputs: object) -> tuple[list[list[str]], bool]:
    # The sequences of one or two texts, and whether they are a batch.
    if isinstance(inputs, str):
        return [[inputs]], False
    if isinstance(inputs, list) and inputs:
        single = isinstance(inputs[0], str)
        sequences = [inputs] if single else inputs
        if all(isinstance(s, list) and len(s) in (1, 2) and all(isinstance(text, str) for text in s) for s in sequences):
            return sequences, not single
    elif inputs == []:
        raise RuleError("empty_items", "inputs is empty; the rule is at least one text", remedy="send a text")
    raise RuleError(
        "wrong_type",
        "inputs: Input should be a text, a pair of texts, or a list of lists of one or two texts",
        remedy='send "text", ["prompt", "completion"] or [["text"], ["prompt", "completion"], ...]',
    )


def parse_predict(request: bytes, limits: Limits) -> Call:
    """Texts as they are, pairs as prompt and completion."""
    asked = PREDICT.read(request, limits)
    sequences, batch = _sequences(asked.inputs)
    if len(sequences) > limits.max_items:
        raise RuleError(
            "too_many_items",
            f"inputs has {len(sequences)} texts; the limit is {limits.max_items}",
            remedy="split them over several requests",
        )
    items: list[ScoreItem] = []
    for sequence in sequences:
        if len(sequence) == 2:
            items += pair_items([(sequence[0], sequence[1])], limits, "inputs")
        else:
            items += text_items(sequence, limits, "inputs")

    def render(answered: Answered) -> Body:
        name = label(answered)
        rows = [[{"score": reward if asked.raw_scores else sigmoid(reward), "label": name}] for reward in flat_rewards(answered)]
        return body(rows if batch else rows[0], answered)

    return Call(tuple(items), render)


def parse_rerank(request: bytes, limits: Limits) -> Call:
    """A prompt and its completions, to be sorted."""
    asked = RERANK.read(request, limits)
    items = pair_items([(asked.query, text) for text in asked.texts], limits, "texts")

    def render(answered: Answered) -> Body:
        rewards = flat_rewards(answered)
        rows: list[dict[str, Any]] = []
        for index in ranked(rewards):
            text = {"text": asked.texts[index]} if asked.return_text else {}
            rows.append({"index": index, **text, "score": rewards[index] if asked.raw_scores else sigmoid(rewards[index])})
        return body(rows, answered)

    return Call(items, render)


def error_body(status: int, error: RaywardError, code: str) -> JSON:
    """TEI's error: a text and a kind."""
    if code == "empty_items":
        kind = "empty"
    elif code == "non_finite":
        kind = "backend"
    elif isinstance(error, OverloadedError):
        kind = "overloaded"
    elif isinstance(error, UnavailableError):
        kind = "unhealthy"
    else:
        kind = _TYPES.get(status, "backend" if status >= 500 else "validation")
    return {"error": f"{message_of(error)} [{code}]", "error_type": kind}


ROUTES = (
    Route(
        path="/predict",
        dialect="tei",
        summary="Rewards as TEI's predictions; the sigmoid of them unless raw_scores is true",
        parse=parse_predict,
        error=error_body,
        request=PREDICT.schema(),
        reply={"type": "array"},
        statuses=_STATUSES,
    ),
    Route(
        path="/rerank",
        dialect="tei",
        summary="Texts by reward as TEI sorts them; the sigmoid of it unless raw_scores is true",
        parse=parse_rerank,
        error=error_body,
        request=RERANK.schema(),
        reply={"type": "array", "items": {"type": "object", "required": ["index", "score"]}},
        statuses=_STATUSES,
    ),
)
