"""vLLM's pooling server: `/classify` and `/pooling` over texts or messages, `/score` and `/rerank` over pairs.

Rewards are raw with any `use_activation`: an exported reward model is `problem_type: regression`, whose activation in vLLM is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from rayward.errors import RuleError
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import (
    Form,
    Peer,
    conversation_items,
    input_items,
    own_model,
    pair_items,
    request_id_of,
    texts_of,
)
from rayward.wire.dialects.replies import (
    ENGINE_STATUSES,
    Endianness,
    body,
    flat_rewards,
    float32_base64,
    float32_bytes,
    label,
    openai_error,
    ranked,
    usage,
)
from rayward.wire.items import ScoreItem
from rayward.wire.rules import Limits

Texts = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]
IDS = {"type": "array", "items": {"type": "integer"}}
Inputs = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, IDS, {"type": "array", "items": IDS}]}),
]
Messages = Annotated[list[Any], WithJsonSchema({"type": "array", "items": {"type": "object"}})]

WITHOUT_EFFECT = frozenset({"user", "priority", "cache_salt", "truncation_side", "use_activation", "activation", "softmax"})
REFUSED: Mapping[str, str] = {
    "mm_processor_kwargs": "images and sounds are not scored",
    "instruction": "the contract's template decides what a conversation looks like",
    "max_tokens_per_query": "texts are never cut; a pair that is too long is an error",
    "max_tokens_per_doc": "texts are never cut; a pair that is too long is an error",
}
CHAT_REFUSED: Mapping[str, str] = {
    "mm_processor_kwargs": "images and sounds are not scored",
    "media_io_kwargs": "images and sounds are not scored",
    "add_generation_prompt": "the last assistant turn is judged, and no turn is opened after it",
    "continue_final_message": "a reward is read at the end of a turn",
    "chat_template": "the contract's template is the one the model was trained with",
    "dimensions": "a reward has one",
}
REMOVED: Mapping[str, str] = {"normalize": "was removed; use use_activation"}
REMOVED_TASKS = ("score", "encode")


class _Common(Peer):
    model: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None
    padding: Literal["max_length", "do_not_pad"] | None = None

    def checked(self) -> str | None:
        """The request's id; refuses what would change a text."""
        if self.truncate_prompt_tokens not in (None, -1):
            raise RuleError(
                "unsupported_option",
                f"truncate_prompt_tokens is {self.truncate_prompt_tokens}; texts are never cut, one that is too long is an error",
                remedy="leave it out; -1, the model's own limit, is accepted because it cuts nothing that fits",
            )
        if self.padding == "max_length":
            raise RuleError("unsupported_option", "padding is max_length; nothing is padded here", remedy="leave padding out")
        return request_id_of(self.request_id, "request_id")


class ClassifyRequest(_Common):
    """Of `/classify`: one of input and messages."""

    input: Inputs = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def items(self, limits: Limits, *, trace: bool = False) -> tuple[ScoreItem, ...]:
        """Texts or token ids as they are, or one conversation."""
        if (self.input is None) == (self.messages is None):
            given = "both" if self.messages is not None else "neither"
            raise RuleError(
                "wrong_type", f"the request has {given} of input and messages; the rule is one", remedy="send input or messages"
            )
        if self.messages is None:
            if self.chat_template_kwargs:
                raise RuleError("unsupported_option", "chat_template_kwargs: input goes through no template", remedy="send messages")
            return input_items(self.input, limits, "input", trace=trace)
        if self.add_special_tokens:
            raise RuleError(
                "unsupported_option",
                "add_special_tokens with messages: the template writes the BOS token, and there is never a second one",
                remedy="leave it out",
            )
        if trace:
            raise RuleError("unsupported_option", "task is token_classify, which is answered for input alone", remedy="send input")
        return conversation_items(self.messages, limits, chat_template_kwargs=self.chat_template_kwargs)


class PoolingRequest(ClassifyRequest):
    """Of `/pooling`."""

    task: str | None = None
    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] = "float"
    embed_dtype: str = "float32"
    endianness: Endianness = "native"

    def is_per_token(self) -> bool:
        """Whether a value for every token is asked for; refuses tasks that no reward model has."""
        if self.task in REMOVED_TASKS:
            raise RuleError("unsupported_option", f"task {self.task!r} was removed; use classify", remedy="leave task out")
        if self.task not in (None, "classify", "token_classify"):
            raise RuleError(
                "unsupported_option",
                f"task is {self.task[:40]!r}; a reward model has classify and token_classify (Try --pooler-config.task in vLLM)",
                remedy="leave task out",
            )
        if self.embed_dtype != "float32":
            raise RuleError(
                "unsupported_option", f"embed_dtype is {self.embed_dtype[:40]!r}; rewards are float32", remedy="leave embed_dtype out"
            )
        return self.task == "token_classify"


class ScoreRequest(_Common):
    """Of `/score`: two lists, or one text and a list, under one of four pairs of names."""

    text_1: Texts = None
    text_2: Texts = None
    data_1: Texts = None
    data_2: Texts = None
    queries: Texts = None
    documents: Texts = None
    items: Texts = None
    chat_template_kwargs: dict[str, Any] | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Prompts and completions."""
        for first, second in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                ones, others = texts_of(getattr(self, first), first), texts_of(getattr(self, second), second)
                if len(ones) == 1:
                    ones = ones * len(others)
                if len(ones) != len(others):
                    raise RuleError(
                        "wrong_type",
                        f"{len(ones)} {first} and {len(others)} {second}; the rule is as many, or one for all",
                        remedy=f"send one of {first} for each of {second}",
                    )
                return list(zip(ones, others, strict=True))
        raise RuleError(
            "missing_field",
            "the request has no pair of texts",
            remedy="send queries and documents, queries and items, data_1 and data_2, or text_1 and text_2",
        )


class RerankRequest(_Common):
    """Of `/rerank`."""

    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=0)] = 0
    chat_template_kwargs: dict[str, Any] | None = None


CLASSIFY = Form(ClassifyRequest, WITHOUT_EFFECT, CHAT_REFUSED, REMOVED)
POOLING = Form(PoolingRequest, WITHOUT_EFFECT, CHAT_REFUSED, REMOVED)
SCORE = Form(ScoreRequest, WITHOUT_EFFECT, REFUSED, REMOVED)
RERANK = Form(RerankRequest, WITHOUT_EFFECT, REFUSED, REMOVED)

USAGE: JSON = {"type": "object", "required": ["prompt_tokens", "total_tokens"]}
LIST: JSON = {
    "type": "object",
    "required": ["id", "object", "created", "model", "data", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "list"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "data": {"type": "array", "items": {"type": "object"}},
        "usage": USAGE,
    },
}
RERANKED: JSON = {
    "type": "object",
    "required": ["id", "model", "usage", "results"],
    "properties": {"results": {"type": "array", "items": {"type": "object", "required": ["index", "document", "relevance_score"]}}},
}


def listed(answered: Answered, kind: str, data: Sequence[JSON]) -> JSON:
    """vLLM's reply around a list."""
    return {
        "id": f"{kind}-{answered.request_id}",
        "object": "list",
        "created": answered.created,
        "model": answered.model,
        "data": list(data),
        "usage": usage(answered),
    }


def classified(answered: Answered) -> Body:
    """One class, whose `probs` is the raw reward."""
    name = label(answered)
    rows = [{"index": index, "label": name, "probs": [reward], "num_classes": 1} for index, reward in enumerate(flat_rewards(answered))]
    return body(listed(answered, "classify", rows), answered)


@dataclass(frozen=True, slots=True)
class _Pooled:
    """Renders what `/pooling` asked for."""

    format: str
    endianness: Endianness
    per_token: bool

    def __call__(self, answered: Answered) -> Body:
        vectors = self._vectors(answered)
        if self.format in ("bytes", "bytes_only"):
            return self._bytes(answered, vectors)
        rows = [{"index": index, "object": "pooling", "data": self._data(vector)} for index, vector in enumerate(vectors)]
        return body(listed(answered, "pooling", rows), answered)

    def _vectors(self, answered: Answered) -> list[list[float]]:
        rewards = flat_rewards(answered)
        if not self.per_token:
            return [[reward] for reward in rewards]
        return [list(trace.rewards) for result in answered.results for trace in result.traces or ()]

    def _data(self, vector: list[float]) -> JSON:
        if self.format == "base64":
            return float32_base64(vector, self.endianness)
        return [[value] for value in vector] if self.per_token else vector

    def _bytes(self, answered: Answered, vectors: list[list[float]]) -> Body:
        parts = [float32_bytes(vector, self.endianness) for vector in vectors]
        rows, start = [], 0
        for index, part in enumerate(parts):
            shape = [len(vectors[index]), 1] if self.per_token else [1]
            row = {"index": index, "embed_dtype": "float32", "endianness": self.endianness, "start": start, "end": start + len(part)}
            rows.append(row | {"shape": shape})
            start += len(part)
        metadata = json.dumps({key: value for key, value in listed(answered, "pooling", rows).items() if key != "object"})
        headers = {} if self.format == "bytes_only" else {"metadata": metadata}
        return body(b"".join(parts), answered, headers=headers, media_type="application/octet-stream")


def _scored(answered: Answered) -> Body:
    rows = [{"index": index, "object": "score", "score": reward} for index, reward in enumerate(flat_rewards(answered))]
    return body(listed(answered, "score", rows), answered)


def _reranked(answered: Answered, documents: Sequence[str], top_n: int) -> Body:
    rewards, used = flat_rewards(answered), usage(answered)
    content = {
        "id": f"score-{answered.request_id}",
        "model": answered.model,
        "usage": {name: used[name] for name in ("prompt_tokens", "total_tokens")},
        "results": [
            {"index": index, "document": {"text": documents[index], "multi_modal": None}, "relevance_score": rewards[index]}
            for index in ranked(rewards, top_n)
        ],
    }
    return body(content, answered)


def parse_classify(request: bytes, limits: Limits) -> Call:
    """Texts, or one conversation."""
    asked = CLASSIFY.read(request, limits)
    request_id = asked.checked()
    return Call(asked.items(limits), classified, model=own_model(asked.model), request_id=request_id)


def parse_pooling(request: bytes, limits: Limits) -> Call:
    """Texts, or one conversation; a value for each, or for each token."""
    asked = POOLING.read(request, limits)
    request_id, per_token = asked.checked(), asked.is_per_token()
    render = _Pooled(asked.encoding_format, asked.endianness, per_token)
    return Call(asked.items(limits, trace=per_token), render, model=own_model(asked.model), request_id=request_id)


def parse_score(request: bytes, limits: Limits) -> Call:
    """Pairs as prompts and completions."""
    asked = SCORE.read(request, limits)
    request_id = asked.checked()
    items = pair_items(asked.pairs(), limits, "the request", asked.chat_template_kwargs)
    return Call(items, _scored, model=own_model(asked.model), request_id=request_id)


def parse_rerank(request: bytes, limits: Limits) -> Call:
    """A prompt and its completions, to be sorted."""
    asked = RERANK.read(request, limits)
    request_id = asked.checked()
    documents = texts_of(asked.documents, "documents")
    items = pair_items([(asked.query, document) for document in documents], limits, "documents", asked.chat_template_kwargs)
    return Call(
        items,
        lambda answered: _reranked(answered, documents, asked.top_n),
        model=own_model(asked.model),
        request_id=request_id,
    )


def _route(path: str, summary: str, parse: Callable[[bytes, Limits], Call], form: Form[Any], reply: JSON) -> Route:
    return Route(
        path=path,
        dialect="vllm",
        summary=summary,
        parse=parse,
        error=partial(openai_error, statuses=ENGINE_STATUSES),
        request=form.schema(),
        reply=reply,
        statuses=ENGINE_STATUSES,
    )


ROUTES = (
    _route("/classify", "Raw rewards as vLLM's classes", parse_classify, CLASSIFY, LIST),
    _route("/pooling", "Raw rewards as vLLM's pooled vectors", parse_pooling, POOLING, LIST),
    _route("/score", "Raw rewards of pairs as vLLM's scores", parse_score, SCORE, LIST),
    _route("/v1/score", "Raw rewards of pairs as vLLM's scores", parse_score, SCORE, LIST),
    _route("/rerank", "Documents by reward as vLLM sorts them", parse_rerank, RERANK, RERANKED),
    _route("/v1/rerank", "Documents by reward as vLLM sorts them", parse_rerank, RERANK, RERANKED),
    _route("/v2/rerank", "Documents by reward as vLLM sorts them", parse_rerank, RERANK, RERANKED),
)
