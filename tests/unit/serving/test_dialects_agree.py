"""One model, every dialect: the same conversation has the same reward whoever asks, and in whatever form it comes."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from tests.helpers.models import make_export
from tests.helpers.templates import make_family_tokenizer

from rayward.config.scoring import ScoringConfig
from rayward.contract.conversation import Message
from rayward.scoring.scorer import Scorer
from rayward.serving.auth import Keys
from rayward.serving.calls import ScoredCall
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.mounts import all_routes
from rayward.wire.items import ScoreItem
from rayward.wire.native import ModelInfo

QUESTION = "How is Oslo in winter?"
PROMPT: list[Message] = [{"role": "user", "content": QUESTION}]
ANSWERS = ("Cold.", "It is warm, I think.", "I do not know.\n\nSorry!")


@dataclass
class InProcess:
    """`Backends` that score where they are asked."""

    scorer: Scorer

    async def score(self, items: Sequence[ScoreItem], **asked: Any) -> tuple[str, ScoredCall]:
        return "rm", ScoredCall(self.scorer.version, tuple(self.scorer.score(items)))

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(id="rm", version=self.scorer.version, max_tokens=400, outputs=["reward"])]

    def ready(self) -> bool:
        return True


@dataclass
class Server:
    """An application over one model."""

    scorer: Scorer
    app: Starlette

    def post(self, path: str, body: Any) -> tuple[Any, str]:
        """The reply, and how its texts were taken."""

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=("127.0.0.1", 1234))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, json=body)

        reply = asyncio.run(run())
        assert reply.status_code == 200, reply.text
        return reply.json(), reply.headers["x-rayward-text"]

    def text(self, answer: str) -> str:
        """The conversation as a client renders it."""
        return self.scorer._encoder.render(PROMPT, answer)

    def ids(self, answer: str) -> list[int]:
        """The same as token ids."""
        return self.scorer._encoder.encode(PROMPT, answer)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    directory = tmp_path_factory.mktemp("model") / "rm"
    scorer = Scorer.load(make_export(directory, make=partial(make_family_tokenizer, name="llama3"), max_tokens=400), device="cpu")
    return Server(scorer, build_http(Front(InProcess(scorer), routes=all_routes()), ScoringConfig(), Keys(())))


@pytest.fixture(scope="module")
def rewards(server: Server) -> list[float]:
    (result,) = server.scorer.score([ScoreItem(tuple(PROMPT), ANSWERS)])
    assert result.rewards is not None
    return list(result.rewards)


Ask = Callable[[Server], tuple[list[float], str]]
"""Rewards of the answers in their order, and how the texts were taken."""


def asked(path: str, body: Callable[[Server], Any], read: Callable[[Any], list[float]]) -> Ask:
    def ask(server: Server) -> tuple[list[float], str]:
        reply, taken = server.post(path, body(server))
        return read(reply), taken

    return ask


def one_by_one(path: str, body: Callable[[Server, str], Any], read: Callable[[Any], float]) -> Ask:
    def ask(server: Server) -> tuple[list[float], str]:
        found = [server.post(path, body(server, answer)) for answer in ANSWERS]
        return [read(reply) for reply, _ in found], found[0][1]

    return ask


def texts(server: Server) -> list[str]:
    return [server.text(answer) for answer in ANSWERS]


def messages(answer: str) -> list[Any]:
    return [*PROMPT, {"role": "assistant", "content": answer}]


def in_order(rows: list[Any], name: str) -> list[float]:
    return [row[name] for row in sorted(rows, key=lambda row: row["index"])]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def tensors(server: Server) -> Any:
    rows = [server.ids(answer) for answer in ANSWERS]
    width = max(map(len, rows))
    padded = [value for row in rows for value in [*row, *[0] * (width - len(row))]]
    ids = {"name": "tokens", "datatype": "INT64", "shape": [len(rows), width], "data": padded}
    return {"inputs": [ids, {"name": "sequence_lengths", "datatype": "INT64", "shape": [len(rows), 1], "data": list(map(len, rows))}]}


def responses(answer: str) -> Any:
    return {"output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}]}


FROM_TEXTS: dict[str, Ask] = {
    "OpenRLHF": asked("/get_reward", lambda s: {"query": texts(s)}, lambda r: r["scores"]),
    "vLLM classify": asked("/classify", lambda s: {"input": texts(s)}, lambda r: [row["probs"][-1] for row in r["data"]]),
    "vLLM pooling": asked("/pooling", lambda s: {"input": texts(s)}, lambda r: [row["data"][0] for row in r["data"]]),
    "vLLM pooling of tokens": asked(
        "/pooling", lambda s: {"input": texts(s), "task": "token_classify"}, lambda r: [row["data"][-1][0] for row in r["data"]]
    ),
    "SGLang": asked("/classify", lambda s: {"text": texts(s)}, lambda r: [row["embedding"][0] for row in r]),
    "SGLang v1": asked("/v1/classify", lambda s: {"input": texts(s)}, lambda r: [row["probs"][0] for row in r["data"]]),
    "embeddings": asked("/v1/embeddings", lambda s: {"input": texts(s)}, lambda r: [row["embedding"][0] for row in r["data"]]),
    "TEI raw": asked(
        "/predict", lambda s: {"inputs": [[t] for t in texts(s)], "raw_scores": True}, lambda r: [row[0]["score"] for row in r]
    ),
    "TEI": asked("/predict", lambda s: {"inputs": [[t] for t in texts(s)]}, lambda r: [logit(row[0]["score"]) for row in r]),
    "infinity": asked("/classify", lambda s: {"input": texts(s), "raw_scores": False}, lambda r: [row[0]["score"] for row in r["data"]]),
    "LLaMA-Factory": asked("/v1/score/evaluation", lambda s: {"model": "model", "messages": texts(s)}, lambda r: r["scores"]),
    "slime": one_by_one("/slime", lambda s, a: {"prompt": s.text(a)[:-20], "response": s.text(a)[-20:]}, float),
    "Triton": asked(
        "/v2/models/reward_model/infer",
        lambda s: {"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [3, 1], "data": texts(s)}]},
        lambda r: r["outputs"][0]["data"],
    ),
}
FROM_TURNS: dict[str, Ask] = {
    "vLLM messages": one_by_one("/classify", lambda _, a: {"messages": messages(a)}, lambda r: r["data"][0]["probs"][0]),
    "vLLM score": asked("/score", lambda _: {"text_1": QUESTION, "text_2": ANSWERS}, lambda r: [row["score"] for row in r["data"]]),
    "vLLM v1 score": asked("/v1/score", lambda _: {"queries": QUESTION, "items": ANSWERS}, lambda r: [row["score"] for row in r["data"]]),
    "vLLM rerank": asked(
        "/rerank", lambda _: {"query": QUESTION, "documents": ANSWERS}, lambda r: in_order(r["results"], "relevance_score")
    ),
    "SGLang rerank": asked("/v1/rerank", lambda _: {"query": QUESTION, "documents": ANSWERS}, lambda r: in_order(r, "score")),
    "TEI rerank": asked("/rerank", lambda _: {"query": QUESTION, "texts": ANSWERS, "raw_scores": True}, lambda r: in_order(r, "score")),
    "TEI pair": one_by_one("/predict", lambda _, a: {"inputs": [QUESTION, a], "raw_scores": True}, lambda r: r[0]["score"]),
    "chat": one_by_one(
        "/v1/chat/completions", lambda _, a: {"messages": messages(a)}, lambda r: float(r["choices"][0]["message"]["content"])
    ),
    "OpenRLHF plain with prompts": one_by_one(
        "/get_reward", lambda _, a: {"query": [f"{QUESTION} {a}"], "prompts": [QUESTION]}, lambda r: r["rewards"][0]
    ),
    "slime turns": one_by_one("/slime", lambda _, a: {"prompt": PROMPT, "response": a, "label": ""}, float),
    "NeMo-Gym verify": one_by_one(
        "/verify", lambda _, a: {"responses_create_params": {"input": QUESTION}, "response": responses(a)}, lambda r: r["reward"]
    ),
    "NeMo-Gym compare": asked(
        "/compare", lambda _: {"conversation_history": PROMPT, "response_objs": [responses(a) for a in ANSWERS]}, lambda r: r["rewards"]
    ),
}
FROM_IDS: dict[str, Ask] = {
    "vLLM ids": asked("/classify", lambda s: {"input": [s.ids(a) for a in ANSWERS]}, lambda r: [row["probs"][0] for row in r["data"]]),
    "SGLang ids": one_by_one("/classify", lambda s, a: {"input_ids": s.ids(a)}, lambda r: r["embedding"][0]),
    "Triton ids": asked("/v2/models/reward_model/infer", tensors, lambda r: r["outputs"][0]["data"]),
}
ALL = [
    pytest.param(ask, how, id=name)
    for how, asks in (("rendered", FROM_TEXTS), ("templated", FROM_TURNS), ("as_given", FROM_IDS))
    for name, ask in asks.items()
]


@pytest.mark.parametrize(("ask", "how"), ALL)
def test_every_dialect_gives_the_reward_of_the_messages(server: Server, rewards: list[float], ask: Ask, how: str) -> None:
    found, taken = ask(server)
    assert taken == how
    assert found == pytest.approx(rewards, abs=1e-4)


def test_texts_of_one_prompt_pay_for_it_once(server: Server) -> None:
    reply, _ = server.post("/classify", {"input": texts(server)})
    (result,) = server.scorer.score([ScoreItem(tuple(PROMPT), ANSWERS)])
    assert reply["usage"]["prompt_tokens"] == result.tokens
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == result.tokens - result.tokens_computed > 0


def test_encodings_are_the_float32_of_the_number(server: Server) -> None:
    body = {"input": [server.text(ANSWERS[0])]}
    (plain,) = FROM_TEXTS["embeddings"](server)[0][:1]
    reply, _ = server.post("/v1/embeddings", {**body, "encoding_format": "base64"})
    assert struct.unpack("<f", base64.b64decode(reply["data"][0]["embedding"]))[0] == pytest.approx(plain, abs=1e-6)
