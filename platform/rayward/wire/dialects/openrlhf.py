"""OpenRLHF's remote reward model: `POST /get_reward` of `openrlhf/cli/serve_rm.py`, as `openrlhf/utils/agent.py` calls it.

    {"query": [str], "prompts"?: [str], "labels"?: [any]} -> {"rewards": [float], "scores": [float], "extra_logs": {name: [float]}}

A query is prompt and response decoded with their special tokens, hence templated. Where it is plain and begins with its prompt, the
contract's template is applied to prompt and response.
"""

from __future__ import annotations

from typing import Any

from rayward.errors import RuleError
from rayward.wire.dialect import Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, TextList, text_items
from rayward.wire.dialects.replies import body, detail_error, flat_rewards, output_names
from rayward.wire.rules import Limits


class RewardRequest(Peer):
    """What its client sends."""

    query: TextList
    prompts: TextList | None = None


FORM = Form(RewardRequest, without_effect=frozenset({"labels"}))
REPLY = {
    "type": "object",
    "required": ["rewards", "scores", "extra_logs"],
    "properties": {
        "rewards": {"type": "array", "items": {"type": "number"}},
        "scores": {"type": "array", "items": {"type": "number"}},
        "extra_logs": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
    },
}


def parse(request: bytes, limits: Limits) -> Call:
    """Queries as texts, with their prompts where they begin with them."""
    asked = FORM.read(request, limits)
    if asked.prompts is not None and len(asked.prompts) != len(asked.query):
        raise RuleError(
            "wrong_type",
            f"{len(asked.prompts)} prompts for {len(asked.query)} queries; the rule is as many, or none",
            remedy="send one prompt for each query",
        )
    return Call(text_items(asked.query, limits, "query", prompts=asked.prompts), render)


def render(answered: Answered) -> Body:
    """Rewards twice, and what its trainer logs as numbers: the outputs of a model with several, and whether a text was taken as it is."""
    rewards = flat_rewards(answered)
    logs: dict[str, Any] = {"text_as_given": [float(result.taken_as == "as_given") for result in answered.results]}
    columns = [result.outputs[0] for result in answered.results if result.outputs]
    if len(columns) == len(rewards):
        logs |= {name: [row[k] for row in columns] for k, name in enumerate(output_names(answered, len(columns[0])))}
    return body({"rewards": rewards, "scores": rewards, "extra_logs": logs}, answered)


ROUTES = (
    Route(
        path="/get_reward",
        dialect="openrlhf",
        summary="Rewards as OpenRLHF's remote reward model gives them",
        parse=parse,
        error=detail_error,
        request=FORM.schema(),
        reply=REPLY,
    ),
)
