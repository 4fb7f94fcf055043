"""`/v1/chat/completions` as reward models answer it: the conversation's last assistant turn is judged, and the answer's text is the reward.

ms-swift's `deploy` of a model of one output answers with the number as a text; NVIDIA's hosted Nemotron reward models answer with
`name:value,…` of their attributes, and the same as log probabilities. A model of several outputs answers in the second form here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from rayward.errors import RaywardError
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, ObjectList, Peer, conversation_items, own_model
from rayward.wire.dialects.replies import OPENAI_STATUSES, body, flat_rewards, label, openai_error, output_names, usage
from rayward.wire.rules import Limits

MEDIA = "images and sounds are not scored"
WITHOUT_EFFECT = frozenset(
    {
        # Of sampling: nothing is sampled. Of bookkeeping.
        "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "seed", "stop", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "length_penalty", "num_beams", "logit_bias", "logprobs", "top_logprobs",
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "tool_choice",
        "return_details", "stream_options", "reasoning_effort", "verbosity",
    }
)  # fmt: skip
REFUSED: Mapping[str, str] = {
    "stream": "a reward is one number, which comes whole",
    "best_of": "nothing is generated",
    "prompt_logprobs": "nothing is generated",
    "response_format": "the answer is the reward",
    "functions": "was replaced by tools",
    "images": MEDIA,
    "audios": MEDIA,
    "videos": MEDIA,
    "objects": MEDIA,
    "audio": MEDIA,
    "modalities": MEDIA,
    "structured_outputs_regex": "nothing is generated",
}


class ChatRequest(Peer):
    """What decides the score."""

    messages: Annotated[list[Any], WithJsonSchema({"type": "array", "items": {"type": "object"}, "minItems": 2})]
    model: str | None = None
    tools: ObjectList | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    n: Literal[1] | None = None


FORM = Form(ChatRequest, WITHOUT_EFFECT, REFUSED)
REPLY: JSON = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"object": {"const": "chat.completion"}, "choices": {"type": "array", "items": {"type": "object"}}},
}


def parse(request: bytes, limits: Limits) -> Call:
    """One conversation."""
    asked = FORM.read(request, limits)
    items = conversation_items(asked.messages, limits, tools=asked.tools, chat_template_kwargs=asked.chat_template_kwargs)
    return Call(items, render, model=own_model(asked.model))


def render(answered: Answered) -> Body:
    """One choice, whose content is the reward or the attributes; `reward` stands beside it as a number."""
    (reward,) = flat_rewards(answered)
    outputs = answered.results[0].outputs
    named = [(label(answered), reward)]
    content = repr(reward)
    if outputs:
        named = list(zip(output_names(answered, len(outputs[0])), outputs[0], strict=True))
        content = ",".join(f"{name}:{value!r}" for name, value in named)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "logprobs": {"content": [{"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in named]},
        "finish_reason": "stop",
        "reward": reward,
    }
    reply = {
        "id": f"chatcmpl-{answered.request_id}",
        "object": "chat.completion",
        "created": answered.created,
        "model": answered.model,
        "choices": [choice],
        "usage": usage(answered),
    }
    return body(reply, answered)


def error_body(status: int, error: RaywardError, code: str) -> JSON:
    """OpenAI's error; `object` and `message` are where ms-swift's client looks."""
    nested = openai_error(status, error, code)
    return {"object": "error", "message": nested["error"]["message"], **nested}


ROUTES = (
    Route(
        path="/v1/chat/completions",
        dialect="chat",
        summary="The reward of a conversation's last turn as the text of a chat completion",
        parse=parse,
        error=error_body,
        request=FORM.schema(),
        reply=REPLY,
        statuses=OPENAI_STATUSES,
    ),
)
