"""Requests of Text Embeddings Inference's clients."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.helpers.dialects import Scored, as_reply, failure, parsed, post, refusal, route_of

from rayward.errors import OverloadedError, ServerError
from rayward.wire.items import ItemError


def test_one_text_is_one_list_and_raw_on_request() -> None:
    assert post("/predict", {"inputs": "Hello", "raw_scores": True}, -4.5) == [{"score": -4.5, "label": "reward"}]


def test_default_is_the_sigmoid_as_tei_has_it() -> None:
    (prediction,) = post("/predict", {"inputs": "Hello"}, 2.0)
    assert prediction["score"] == pytest.approx(1 / (1 + math.exp(-2.0)), abs=1e-15)
    assert post("/predict", {"inputs": "Hello"}, -1e6)[0]["score"] == 0.0
    assert post("/predict", {"inputs": "Hello"}, 1e6)[0]["score"] == 1.0


def test_a_batch_mixes_texts_and_pairs() -> None:
    request = {"inputs": [["whole text"], ["Q", "answer"]], "raw_scores": True, "truncate": True}
    assert post("/predict", request, 1.0, 2.0) == [[{"score": 1.0, "label": "reward"}], [{"score": 2.0, "label": "reward"}]]
    whole, pair = parsed("/predict", request).items
    assert (whole.form, pair.form, pair.completions) == ("text", "conversation", ("answer",))


def test_two_texts_in_a_list_are_a_pair() -> None:
    (item,) = parsed("/predict", {"inputs": ["Q", "answer"]}).items
    assert (item.prompt, item.completions) == (({"role": "user", "content": "Q"},), ("answer",))
    assert parsed("/predict", {"inputs": ["text"]}).items[0].form == "text"


def test_rerank_is_sorted_by_the_reward_before_the_sigmoid() -> None:
    # Both are 1.0 as float: the order is that of the rewards.
    request = {"query": "Q", "texts": ["a", "b"], "return_text": True}
    assert [(row["index"], row["text"]) for row in post("/rerank", request, 400.0, 500.0)] == [(1, "b"), (0, "a")]
    assert post("/rerank", {**request, "raw_scores": True, "return_text": False}, 1.0, 2.0) == [
        {"index": 1, "score": 2.0},
        {"index": 0, "score": 1.0},
    ]


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/predict", {"inputs": []}, "empty"),
        ("/predict", {"inputs": ["a", "b", "c"]}, "validation"),
        ("/predict", {"inputs": [["a"], "b"]}, "validation"),
        ("/predict", {"inputs": [[]]}, "validation"),
        ("/predict", {"inputs": 3}, "validation"),
        ("/predict", {"inputs": "a", "truncation_direction": "up"}, "validation"),
        ("/predict", {"inputs": "a", "prompt_name": "q"}, "validation"),
        ("/rerank", {"query": "Q", "texts": []}, "empty"),
        ("/rerank", {"query": "Q", "texts": [" "]}, "validation"),
        ("/predict", b"{", "validation"),
    ],
)
def test_errors_are_a_text_and_a_kind(path: str, body: Any, kind: str) -> None:
    status, error = refusal(path, body)
    assert status == 422
    assert error.keys() == {"error", "error_type"}
    assert error["error_type"] == kind


def test_too_many_texts() -> None:
    assert refusal("/predict", {"inputs": [["a"]] * 51})[0] == 413


def test_errors_of_the_server() -> None:
    route = route_of("/predict")
    assert as_reply(route, OverloadedError("full", remedy="wait"), 429, "overloaded")[1]["error_type"] == "overloaded"
    assert as_reply(route, ServerError("died", remedy="retry"), 502, "scorer_failed") == (
        424,
        {"error": "died; retry [scorer_failed]", "error_type": "backend"},
    )
    status, error = failure("/predict", {"inputs": "a"}, Scored([], errors={0: ItemError.of("non_finite", "NaN")}))
    assert (status, error["error_type"]) == (422, "backend")
