"""SGLang's server: native `/classify`, and `/v1/classify`, `/v1/embeddings` and `/v1/rerank`.

Rewards are raw. SGLang itself softmaxes in `/v1/classify`, where a model of one output always answers 1.0, which is why verl reads
`data[-1].embedding[-1]` of `/v1/embeddings`; the OpenAI client reads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from rayward.errors import RaywardError, RuleError
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, TextList, input_items, own_model, pair_items, request_id_of, text_items, texts_of
from rayward.wire.dialects.replies import (
    ENGINE_STATUSES,
    body,
    flat_rewards,
    float32_base64,
    message_of,
    num_tokens,
    openai_error,
    ranked,
    usage,
)
from rayward.wire.dialects.vllm import IDS, LIST, USAGE, Inputs, Texts, classified
from rayward.wire.items import ScoreItem
from rayward.wire.rules import Limits

MEDIA = "images and sounds are not scored"
WITHOUT_EFFECT = frozenset({"user", "priority", "sampling_params", "log_metrics", "background", "received_time"})
REFUSED: Mapping[str, str] = {
    "image_data": MEDIA,
    "video_data": MEDIA,
    "audio_data": MEDIA,
    "modalities": MEDIA,
    "input_embeds": "embeddings are not scored",
    "dimensions": "a reward has one",
    "lora_path": "adapters are published as versions",
    "lora_id": "adapters are published as versions",
    "return_pooled_hidden_states": "hidden states are not given out",
}

Pairs = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}},
            ]
        }
    ),
]


class NativeRequest(Peer):
    """Of `/classify`: a text, texts, or pairs of them for a cross encoder; or token ids."""

    text: Pairs = None
    input_ids: Annotated[Any, WithJsonSchema({"anyOf": [IDS, {"type": "array", "items": IDS}]})] = None
    model: str | None = None
    rid: Texts = None
    is_cross_encoder_request: bool = False


class ClassifyRequest(Peer):
    """Of `/v1/classify`."""

    input: Inputs
    model: str | None = None
    rid: Texts = None


class EmbeddingsRequest(ClassifyRequest):
    """Of `/v1/embeddings`; base64 is what the OpenAI client asks for unless told otherwise."""

    encoding_format: Literal["float", "base64"] = "float"


class RerankRequest(Peer):
    """Of `/v1/rerank`."""

    query: str
    documents: TextList
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


NATIVE = Form(NativeRequest, WITHOUT_EFFECT, REFUSED)
CLASSIFY = Form(ClassifyRequest, frozenset({"user", "priority"}))
EMBEDDINGS = Form(EmbeddingsRequest, frozenset({"user", "priority"}), {"dimensions": "a reward has one"})
RERANK = Form(
    RerankRequest, frozenset({"user", "priority", "rid"}), {"instruct": "the contract's template decides what a conversation looks like"}
)

_ONE: JSON = {
    "type": "object",
    "required": ["embedding", "meta_info"],
    "properties": {"embedding": {"type": "array", "items": {"type": "number"}}, "meta_info": {"type": "object"}},
}
_EMBEDDINGS: JSON = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {"data": {"type": "array", "items": {"type": "object", "required": ["object", "embedding", "index"]}}, "usage": USAGE},
}


def _ids(rid: Any, number: int) -> tuple[str | None, list[str] | None]:
    # The id of the request, and one for each text where there are several.
    if rid is None:
        return None, None
    ids = texts_of(rid, "rid")
    checked = [request_id_of(each, "rid") or "" for each in ids]
    if isinstance(rid, str):
        return checked[0], None
    if len(checked) != number:
        raise RuleError("wrong_type", f"{len(checked)} ids in rid for {number} texts; the rule is as many", remedy="send one for each text")
    return checked[0] if checked else None, checked


def _native_items(asked: NativeRequest, limits: Limits) -> tuple[ScoreItem, ...]:
    text = asked.text
    if (text is None) == (asked.input_ids is None):
        given = "neither" if text is None else "both"
        raise RuleError("wrong_type", f"the request has {given} of text and input_ids; the rule is one", remedy="send text or input_ids")
    if text is None:
        if isinstance(asked.input_ids, str) or (isinstance(asked.input_ids, list) and any(isinstance(i, str) for i in asked.input_ids)):
            raise RuleError("wrong_type", "input_ids: Input should be token ids", remedy="send texts as text")
        return input_items(asked.input_ids, limits, "input_ids")
    if isinstance(text, list) and text and all(isinstance(each, list) for each in text):
        if not all(len(each) == 2 and all(isinstance(part, str) for part in each) for each in text):
            raise RuleError("wrong_type", "text: a pair is a list of two texts", remedy="send [[query, document], ...]")
        return pair_items([(query, document) for query, document in text], limits, "text")
    if asked.is_cross_encoder_request:
        raise RuleError("wrong_type", "text: a cross encoder takes pairs", remedy="send [[query, document], ...]")
    return text_items(texts_of(text, "text"), limits, "text")


def meta(answered: Answered) -> list[dict[str, Any]]:
    """What SGLang says of each text; the version stands as its weights' version."""
    taken = [result.taken_as for result in answered.results for _ in result.rewards or ()]
    return [
        {
            "id": answered.request_id if len(taken) == 1 else f"{answered.request_id}-{index}",
            "finish_reason": None,
            "prompt_tokens": number,
            "cached_tokens": 0,
            "e2e_latency": answered.timings.total_s,
            "weight_version": answered.version,
            "taken_as": how,
        }
        for index, (how, number) in enumerate(zip(taken, num_tokens(answered), strict=True))
    ]


def parse_native(request: bytes, limits: Limits) -> Call:
    """Texts or pairs; one text given as such gets one object back, a list a list."""
    asked = NATIVE.read(request, limits)
    items = _native_items(asked, limits)
    request_id, own_ids = _ids(asked.rid, sum(len(item.completions) for item in items))

    def render(answered: Answered) -> Body:
        rows = [{"embedding": [r], "meta_info": info} for r, info in zip(flat_rewards(answered), meta(answered), strict=True)]
        for row, own in zip(rows, own_ids or (), strict=False):
            row["meta_info"]["id"] = own  # type: ignore[index]
        ids = asked.input_ids
        single = isinstance(asked.text, str) or (isinstance(ids, list) and isinstance(ids[0], int))
        return body(rows[0] if single else rows, answered)

    return Call(items, render, model=own_model(asked.model), request_id=request_id)


def parse_classify(request: bytes, limits: Limits) -> Call:
    """Texts; the reply is vLLM's."""
    asked = CLASSIFY.read(request, limits)
    items = input_items(asked.input, limits, "input")
    return Call(items, classified, model=own_model(asked.model), request_id=_ids(asked.rid, len(items))[0])


def parse_embeddings(request: bytes, limits: Limits) -> Call:
    """Texts, whose rewards are vectors of one value."""
    asked = EMBEDDINGS.read(request, limits)
    items = input_items(asked.input, limits, "input")

    def render(answered: Answered) -> Body:
        rows = [
            # Little endian, as OpenAI's client decodes it whatever machine answers.
            {"object": "embedding", "index": i, "embedding": float32_base64([r], "little") if asked.encoding_format == "base64" else [r]}
            for i, r in enumerate(flat_rewards(answered))
        ]
        return body({"object": "list", "data": rows, "model": answered.model, "usage": usage(answered)}, answered)

    return Call(items, render, model=own_model(asked.model), request_id=_ids(asked.rid, len(items))[0])


def parse_rerank(request: bytes, limits: Limits) -> Call:
    """A prompt and its completions, to be sorted."""
    asked = RERANK.read(request, limits)
    items = pair_items([(asked.query, document) for document in asked.documents], limits, "documents")

    def render(answered: Answered) -> Body:
        rewards, infos = flat_rewards(answered), meta(answered)
        rows: list[dict[str, Any]] = []
        for index in ranked(rewards, asked.top_n or 0):
            document = {"document": asked.documents[index]} if asked.return_documents else {}
            rows.append({"score": rewards[index], **document, "index": index, "meta_info": infos[index]})
        return body(rows, answered)

    return Call(items, render, model=own_model(asked.model))


def native_error(status: int, error: RaywardError, code: str) -> JSON:
    """Of SGLang's native paths."""
    return {"error": {"message": f"{message_of(error)} [{code}]"}}


def v1_error(status: int, error: RaywardError, code: str) -> JSON:
    """Of its OpenAI-like paths: flat, and the same nested, which OpenAI's client reads."""
    nested = openai_error(status, error, code, statuses=ENGINE_STATUSES)
    return {"object": "error", **nested["error"], **nested}


def _route(
    path: str,
    summary: str,
    parse: Callable[[bytes, Limits], Call],
    form: Form[Any],
    reply: JSON,
    *,
    error: Callable[[int, RaywardError, str], JSON] = v1_error,
    methods: Sequence[str] = ("POST",),
) -> Route:
    return Route(
        path=path,
        dialect="sglang",
        summary=summary,
        parse=parse,
        error=error,
        request=form.schema(),
        reply=reply,
        methods=tuple(methods),
        statuses=ENGINE_STATUSES,
    )


ROUTES = (
    _route(
        "/classify",
        "Raw rewards as SGLang's embeddings, with the version",
        parse_native,
        NATIVE,
        {"anyOf": [_ONE, {"type": "array", "items": _ONE}]},
        error=native_error,
        methods=("POST", "PUT"),
    ),
    _route("/v1/classify", "Raw rewards as SGLang's classes", parse_classify, CLASSIFY, LIST),
    _route("/v1/embeddings", "Raw rewards as vectors of one value", parse_embeddings, EMBEDDINGS, _EMBEDDINGS),
    _route(
        "/v1/rerank",
        "Documents by reward as SGLang sorts them",
        parse_rerank,
        RERANK,
        {"type": "array", "items": {"type": "object", "required": ["score", "index"]}},
        methods=("POST", "PUT"),
    ),
)
