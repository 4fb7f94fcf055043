"""Requests of infinity's generated client, which always sends `raw_scores`."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.helpers.dialects import post, refusal


def classify_input(texts: list[str], *, raw_scores: bool = False) -> dict[str, Any]:
    """The client's body."""
    return {"input": texts, "model": "default/not-specified", "raw_scores": raw_scores}


@pytest.mark.parametrize("raw_scores", [True, False])
@pytest.mark.parametrize("path", ["/classify", "/infinity/classify"])
def test_classify_is_raw_as_its_pipeline_leaves_a_regression_model(path: str, raw_scores: bool) -> None:
    reply = post(path, classify_input(["a", "b"], raw_scores=raw_scores), -4.0, 2.5)
    assert reply["object"] == "classify"
    assert reply["data"] == [[{"score": -4.0, "label": "reward"}], [{"score": 2.5, "label": "reward"}]]
    assert reply["id"].startswith("infinity-")
    assert reply["usage"] == {"prompt_tokens": 20, "total_tokens": 20}


def test_under_its_own_prefix_raw_scores_may_be_left_out() -> None:
    assert post("/infinity/classify", {"input": ["a"]}, 1.0)["object"] == "classify"


def test_rerank_is_the_sigmoid_unless_raw_scores() -> None:
    request = {"query": "Q", "documents": ["a", "b"], "raw_scores": False, "model": "default/not-specified", "return_documents": True}
    reply = post("/rerank", request, 0.0, 2.0)
    assert [(row["index"], row["document"]) for row in reply["results"]] == [(1, "b"), (0, "a")]
    assert reply["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-2.0)))
    raw = post("/rerank", {**request, "raw_scores": True, "top_n": 1}, 0.0, 2.0)
    assert [row["relevance_score"] for row in raw["results"]] == [2.0]


@pytest.mark.parametrize("body", [classify_input([]), {"input": "text", "raw_scores": False}, {"input": ["a"], "raw_scores": 1}])
def test_bad_requests_have_openais_error(body: dict[str, Any]) -> None:
    status, error = refusal("/classify", body)
    assert status == 400
    assert error["error"].keys() == {"message", "type", "param", "code"}
