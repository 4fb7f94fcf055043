"""infinity: `/classify` and `/rerank`, told from vLLM's of the same paths by the field `raw_scores`, which its client always sends.

`/classify` is raw either way: infinity applies what Transformers' pipeline does, which for `problem_type: regression` is nothing. `/rerank`
answers with the sigmoid unless `raw_scores` is true, as infinity does for any model.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, TextList, own_model, pair_items, text_items
from rayward.wire.dialects.replies import OPENAI_STATUSES, body, flat_rewards, label, openai_error, ranked, sigmoid, usage
from rayward.wire.rules import Limits


class ClassifyRequest(Peer):
    """Of `/classify`."""

    input: TextList
    model: str = "default/not-specified"
    raw_scores: bool = False


class RerankRequest(Peer):
    """Of `/rerank`."""

    query: str
    documents: TextList
    model: str = "default/not-specified"
    raw_scores: bool = False
    return_documents: bool = False
    top_n: Annotated[int, Field(gt=0)] | None = None


CLASSIFY = Form(ClassifyRequest)
RERANK = Form(RerankRequest)
_REPLY: JSON = {"type": "object", "required": ["object", "model", "usage", "id", "created"]}


def _reply(answered: Answered, kind: str, **rows: list[Any]) -> JSON:
    used = usage(answered)
    return {
        "object": kind,
        **rows,
        "model": answered.model,
        "usage": {name: used[name] for name in ("prompt_tokens", "total_tokens")},
        "id": f"infinity-{answered.request_id}",
        "created": answered.created,
    }


def parse_classify(request: bytes, limits: Limits) -> Call:
    """Texts as they are."""
    asked = CLASSIFY.read(request, limits)
    return Call(text_items(asked.input, limits, "input"), _classified, model=own_model(asked.model))


def _classified(answered: Answered) -> Body:
    name = label(answered)
    return body(_reply(answered, "classify", data=[[{"score": r, "label": name}] for r in flat_rewards(answered)]), answered)


def parse_rerank(request: bytes, limits: Limits) -> Call:
    """A prompt and its completions, to be sorted."""
    asked = RERANK.read(request, limits)
    items = pair_items([(asked.query, document) for document in asked.documents], limits, "documents")

    def render(answered: Answered) -> Body:
        rewards = flat_rewards(answered)
        rows: list[dict[str, Any]] = []
        for index in ranked(rewards, asked.top_n or 0):
            document = {"document": asked.documents[index]} if asked.return_documents else {}
            rows.append({"relevance_score": rewards[index] if asked.raw_scores else sigmoid(rewards[index]), "index": index, **document})
        return body(_reply(answered, "rerank", results=rows), answered)

    return Call(items, render, model=own_model(asked.model))


ROUTES = (
    Route(
        path="/classify",
        dialect="infinity",
        summary="Raw rewards as infinity's classes",
        parse=parse_classify,
        error=openai_error,
        request=CLASSIFY.schema(),
        reply=_REPLY,
        statuses=OPENAI_STATUSES,
    ),
    Route(
        path="/rerank",
        dialect="infinity",
        summary="Documents by reward as infinity sorts them; the sigmoid of it unless raw_scores is true",
        parse=parse_rerank,
        error=openai_error,
        request=RERANK.schema(),
        reply=_REPLY,
        statuses=OPENAI_STATUSES,
    ),
)
