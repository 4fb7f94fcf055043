"""Requests of SGLang's clients, of verl's SGLang reading and of the OpenAI client's embeddings."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from tests.helpers.dialects import parsed, post, refusal

TEXT = "<s>[INST] Hi [/INST] Hello</s>"


def test_native_classify_of_one_text_is_one_object_with_the_version() -> None:
    reply = post("/classify", {"model": "our-model", "text": TEXT}, 1.25)
    assert reply["embedding"][0] == 1.25
    assert reply["meta_info"]["weight_version"] == "3f2a9c01b7de"
    assert (reply["meta_info"]["id"], reply["meta_info"]["prompt_tokens"], reply["meta_info"]["e2e_latency"]) == ("r1", 10, 0.25)
    assert reply["meta_info"]["taken_as"] == "rendered"


def test_native_classify_of_a_list_is_a_list() -> None:
    reply = post("/classify", {"text": [TEXT, "b"], "rid": ["x", "y"]}, 1.0, 2.0)
    assert [(row["embedding"], row["meta_info"]["id"]) for row in reply] == [([1.0], "x"), ([2.0], "y")]
    assert [row["meta_info"]["id"] for row in post("/classify", {"text": ["a", "b"]}, 1.0, 2.0)] == ["r1-0", "r1-1"]
    assert parsed("/classify", {"text": "a", "rid": "mine"}).request_id == "mine"


def test_token_ids_are_scored_as_they_are() -> None:
    assert post("/classify", {"input_ids": [1, 2]}, 1.5)["embedding"] == [1.5]
    assert [row["embedding"] for row in post("/classify", {"input_ids": [[1, 2], [3]]}, 1.5, 2.5)] == [[1.5], [2.5]]
    assert [item.token_ids for item in parsed("/v1/embeddings", {"input": [[1, 2], [3]]}).items] == [(1, 2), (3,)]


def test_native_classify_of_pairs() -> None:
    reply = post("/classify", {"text": [["Q", "a"], ["Q", "b"]], "is_cross_encoder_request": True}, 1.0, 2.0)
    assert [row["embedding"] for row in reply] == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input_ids": [1, 2], "text": TEXT}, "both of text and input_ids"),
        ({"input_ids": None}, "neither of text and input_ids"),
        ({"input_ids": "text"}, "input_ids: Input should be token ids"),
        ({"input_ids": ["text"]}, "input_ids: Input should be token ids"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"text": TEXT, "image_data": ["x"]}, "images"),
        ({"text": TEXT, "dimensions": 8}, "dimensions"),
        ({"text": ["a", "b"], "rid": ["x"]}, "1 ids in rid for 2 texts"),
        ({"text": [["a"]]}, "pair"),
        ({"text": [["a", "b"], "c"]}, "text"),
        ({"text": 5}, "text"),
    ],
)
def test_native_errors_have_its_own_shape(body: dict[str, Any], named: str) -> None:
    status, error = refusal("/classify", body)
    assert status == 400
    assert error.keys() == {"error"}
    assert error["error"].keys() == {"message"}
    assert named in error["error"]["message"]


def test_v1_classify_is_raw_where_sglang_softmaxes_to_one() -> None:
    reply = post("/v1/classify", {"model": "our-model", "input": [TEXT, "b"], "user": "u", "rid": "mine"}, -3.5, 2.0)
    assert [(row["index"], row["probs"], row["num_classes"]) for row in reply["data"]] == [(0, [-3.5], 1), (1, [2.0], 1)]
    assert reply["id"] == "classify-mine"


def test_verl_reads_the_last_number_of_the_last_embedding() -> None:
    reply = post("/v1/embeddings", {"model": "/data/rm", "input": TEXT}, -0.75)
    assert reply["data"][-1]["embedding"][-1] == -0.75


def test_openai_client_asks_for_base64_and_reads_float32() -> None:
    request = {"input": ["a", "b"], "model": "our-model", "encoding_format": "base64"}
    reply = post("/v1/embeddings", request, 1.5, -2.25)
    assert [struct.unpack("<f", base64.b64decode(row["embedding"]))[0] for row in reply["data"]] == [1.5, -2.25]
    assert [(row["object"], row["index"]) for row in reply["data"]] == [("embedding", 0), ("embedding", 1)]
    assert (reply["object"], reply["usage"]["total_tokens"]) == ("list", 20)


def test_v1_errors_are_flat_and_nested() -> None:
    status, error = refusal("/v1/embeddings", {"input": [[1, -2]], "model": "m"})
    assert status == 400
    assert (error["object"], error["code"], error["type"]) == ("error", 400, "BadRequestError")
    assert "no token id" in error["message"]
    assert error["error"]["message"] == error["message"]
    assert refusal("/v1/embeddings", {"input": "a", "dimensions": 4})[0] == 400


def test_rerank_is_a_sorted_list() -> None:
    request = {"model": "m", "query": "Q", "documents": ["a", "b", "c"], "top_n": 2, "return_documents": True}
    reply = post("/v1/rerank", request, 1.0, 3.0, 2.0)
    assert [(row["index"], row["score"], row["document"]) for row in reply] == [(1, 3.0, "b"), (2, 2.0, "c")]
    assert reply[0]["meta_info"]["weight_version"] == "3f2a9c01b7de"
    bare = post("/v1/rerank", {"query": "Q", "documents": ["a"], "return_documents": False}, 1.0)
    assert "document" not in bare[0]
    assert refusal("/v1/rerank", {"query": "Q", "documents": ["a"], "instruct": "judge"})[0] == 400
    assert refusal("/v1/rerank", {"query": "Q", "documents": ["a"], "top_n": 0})[0] == 400
