"""slime's remote reward model (`--rm-type remote_rm --rm-url …/slime`): one sample a request, and the JSON reply is the reward.

    {"prompt": str | messages, "response": str, "label": any} -> float

A prompt text is what slime's data loader made, most often templated already: prompt and response are one text then.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from rayward.errors import RuleError
from rayward.wire.dialect import Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, group_items, text_items
from rayward.wire.dialects.replies import body, detail_error, flat_rewards
from rayward.wire.rules import Limits


class RewardRequest(Peer):
    """What its client sends."""

    prompt: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]
    response: str


FORM = Form(RewardRequest, without_effect=frozenset({"label"}))


def parse(request: bytes, limits: Limits) -> Call:
    """A text and its prompt, or turns and a completion."""
    asked = FORM.read(request, limits)
    if isinstance(asked.prompt, list):
        return Call(group_items(asked.prompt, [asked.response], limits), render)
    if not isinstance(asked.prompt, str):
        raise RuleError("wrong_type", "prompt: Input should be a text or a list of messages", remedy="send what the sample holds")
    if not asked.response.strip():
        raise RuleError("empty_completion", "response is empty", remedy="give such samples a reward of your own")
    return Call(text_items([asked.prompt + asked.response], limits, "prompt and response", prompts=[asked.prompt]), render)


def render(answered: Answered) -> Body:
    """The reward alone."""
    (reward,) = flat_rewards(answered)
    return body(reward, answered)


ROUTES = (
    Route(
        path="/slime",
        dialect="slime",
        summary="The reward of one sample as slime's remote_rm reads it",
        parse=parse,
        error=detail_error,
        request=FORM.schema(),
        reply={"type": "number"},
    ),
)
