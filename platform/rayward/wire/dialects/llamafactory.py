"""LLaMA-Factory's reward API: `POST /v1/score/evaluation`, which its PPO trainer calls with `reward_model_type: api`.

    {"model": str, "messages": [str], "max_length"?: null} -> {"id", "object": "score.evaluation", "model", "scores": [float]}

Each message is a whole text, decoded with its special tokens.
"""

from __future__ import annotations

from rayward.wire.dialect import Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, TextList, own_model, text_items
from rayward.wire.dialects.replies import OPENAI_STATUSES, body, detail_error, flat_rewards
from rayward.wire.rules import Limits

CLIENTS_MODEL = "model"
"""What its own client sends, whatever is served."""


class EvaluationRequest(Peer):
    """What its server takes."""

    model: str
    messages: TextList


FORM = Form(EvaluationRequest, refused={"max_length": "texts are never cut; one that is too long is an error"})
REPLY = {
    "type": "object",
    "required": ["id", "object", "model", "scores"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "score.evaluation"},
        "model": {"type": "string"},
        "scores": {"type": "array", "items": {"type": "number"}},
    },
}


def parse(request: bytes, limits: Limits) -> Call:
    """Messages as texts."""
    asked = FORM.read(request, limits)
    model = None if asked.model == CLIENTS_MODEL else own_model(asked.model)
    return Call(text_items(asked.messages, limits, "messages"), render, model=model)


def render(answered: Answered) -> Body:
    """Its reply."""
    scores = flat_rewards(answered)
    content = {"id": f"scoreval-{answered.request_id}", "object": "score.evaluation", "model": answered.model, "scores": scores}
    return body(content, answered)


ROUTES = (
    Route(
        path="/v1/score/evaluation",
        dialect="llamafactory",
        summary="Rewards as LLaMA-Factory's API gives them",
        parse=parse,
        error=detail_error,
        request=FORM.schema(),
        reply=REPLY,
        statuses=OPENAI_STATUSES,
    ),
)
