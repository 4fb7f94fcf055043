"""The one list of dialects, for the ingress to mount.

Where several systems have a path in common, the body says whose it is: the names that only one of them has decide, and vLLM's shape is the
rest. A client that can set a base URL chooses for sure: each of those dialects also stands under its own name, `/vllm`, `/sglang`, `/tei`,
`/infinity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from rayward.errors import RuleError
from rayward.wire.dialect import Route
from rayward.wire.dialects import chat, infinity, llamafactory, nemo_gym, openrlhf, sglang, slime, tei, triton, vllm
from rayward.wire.rules import decode

Choice: TypeAlias = Callable[[Mapping[str, Any]], str]
"""The top level of a body -> the dialect whose it is."""

PREFIXED = (vllm, sglang, tei, infinity)
"""Dialects that share paths."""


def _classify(body: Mapping[str, Any]) -> str:
    if "text" in body or "input_ids" in body:
        return "sglang"
    return "infinity" if "raw_scores" in body else "vllm"


def _rerank(body: Mapping[str, Any]) -> str:
    if "texts" in body:
        return "tei"
    return "infinity" if "raw_scores" in body or "return_documents" in body else "vllm"


def _rerank_v1(body: Mapping[str, Any]) -> str:
    # SGLang's requests need no model, vLLM's and Cohere's clients always name one.
    return "sglang" if "return_documents" in body or "instruct" in body or "model" not in body else "vllm"


SHARED: Mapping[str, Choice] = {"/classify": _classify, "/rerank": _rerank, "/v1/rerank": _rerank_v1}
"""Paths whose bodies several dialects have; for a body of none of them vLLM's rules say what is wrong."""
VLLM_PAIRS = frozenset({"queries", "documents", "data_1", "data_2", "text_1", "text_2"})
"""Fields of vLLM's `/v1/score`, none of which the native request of this path has."""


def _shared(path: str, choose: Choice) -> Route:
    own: dict[str, Route] = {route.dialect: route for module in PREFIXED for route in module.ROUTES if route.path == path}
    methods = tuple(dict.fromkeys(method for route in own.values() for method in route.methods))
    names = ", ".join(own)
    return replace(
        own["vllm"],
        summary=f"{own['vllm'].summary}; or as {names} has it, by the body's fields",
        methods=methods,
        request={"anyOf": [route.request for route in own.values()]},
        reply={"anyOf": [route.reply for route in own.values()]},
        pick=lambda body: own[_chosen(body, choose)],
    )


def _chosen(body: bytes, choose: Choice) -> str:
    try:
        value = decode(body)
    except RuleError:
        return "vllm"  # whose `parse` says what is wrong
    return choose(value) if isinstance(value, dict) else "vllm"


def with_pairs(native: Route) -> Route:
    """The native route of `/v1/score`, which also takes vLLM's requests of this path."""
    (pairs,) = (route for route in vllm.ROUTES if route.path == native.path)

    def pick(body: bytes) -> Route:
        # Nearly every body here is native, may be large, and is decoded only once: the names are looked for in the bytes first.
        if not any(f'"{name}"'.encode() in body for name in VLLM_PAIRS):
            return native
        try:
            value = decode(body)
        except RuleError:
            return native
        return pairs if isinstance(value, dict) and VLLM_PAIRS & value.keys() else native

    return replace(
        native,
        request={"anyOf": [native.request, pairs.request]},
        reply={"anyOf": [native.reply, pairs.reply]},
        pick=pick,
    )


def _all() -> tuple[Route, ...]:
    alone: Sequence[Route] = [
        route
        for module in (openrlhf, llamafactory, slime, chat, nemo_gym, triton, *PREFIXED)
        for route in module.ROUTES
        if route.path not in SHARED and route.path != "/v1/score"
    ]
    shared = [_shared(path, choose) for path, choose in SHARED.items()]
    under = [replace(route, path=f"/{route.dialect}{route.path}") for module in PREFIXED for route in module.ROUTES]
    return (*alone, *shared, *under)


ROUTES: tuple[Route, ...] = _all()
"""Every path of every dialect, each once. vLLM's `/v1/score` is joined to the native route by `with_pairs`."""
