"""Requests as vLLM's clients and verl send them; replies as they read them."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from tests.helpers.dialects import Scored, answered, parsed, post, refusal

TEXT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_verl_reads_the_last_probability_of_the_last_row() -> None:
    request = {"model": "sfairXC/FsfairX-LLaMA3-RM-v0.1", "input": TEXT, "use_activation": False}
    reply = post("/classify", request, 1.25)
    assert reply["data"][-1]["probs"][-1] == 1.25
    assert parsed("/classify", request).model is None, "a path of verl's configuration names no model of ours"


def test_older_verl_says_activation() -> None:
    assert post("/classify", {"model": "/data/rm", "input": TEXT, "activation": False}, -3.0)["data"][0]["probs"] == [-3.0]


@pytest.mark.parametrize("use_activation", [True, False, None])
def test_rewards_are_raw_as_for_a_regression_model(use_activation: bool | None) -> None:
    assert post("/classify", {"input": TEXT, "use_activation": use_activation}, -7.5)["data"][0]["probs"] == [-7.5]


def test_classify_reply() -> None:
    reply = post("/classify", {"model": "our-model", "input": ["a", "b"], "request_id": "mine"}, 1.0, 2.0)
    assert reply == {
        "id": "classify-mine",
        "object": "list",
        "created": 1_700_000_000,
        "model": "our-model",
        "data": [
            {"index": 0, "label": "reward", "probs": [1.0], "num_classes": 1},
            {"index": 1, "label": "reward", "probs": [2.0], "num_classes": 1},
        ],
        "usage": {"prompt_tokens": 20, "total_tokens": 20, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}},
    }
    assert parsed("/classify", {"model": "other", "input": "a"}).model == "other"


def test_messages_are_a_conversation_whose_last_turn_is_judged() -> None:
    (item,) = parsed("/classify", {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}).items
    assert (item.form, item.prompt, item.completions) == ("conversation", (MESSAGES[0],), ("Hello",))
    assert item.chat_template_kwargs == {"enable_thinking": False}
    assert post("/classify", {"messages": MESSAGES}, 0.5)["data"][0]["probs"] == [0.5]


def test_token_ids_are_scored_as_they_are() -> None:
    (item,) = parsed("/classify", {"input": [1, 5, 7]}).items
    assert (item.form, item.token_ids, item.completions) == ("tokens", (1, 5, 7), ("",))
    assert [item.token_ids for item in parsed("/pooling", {"input": [[1], [2, 3]]}).items] == [(1,), (2, 3)]
    assert post("/classify", {"input": [[1], [2, 3]]}, 0.5, 1.5)["data"][1]["probs"] == [1.5]


def test_a_tools_answer_stands_before_the_turn_that_is_judged() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    turns = [MESSAGES[0], call, {"role": "tool", "content": "42", "tool_call_id": "c"}, MESSAGES[1]]
    (item,) = parsed("/classify", {"messages": turns}).items
    assert [turn["role"] for turn in item.prompt] == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"normalize": True}, "normalize: was removed; use use_activation"),
        ({"normalize": False}, "normalize: was removed"),
        ({"truncate_prompt_tokens": 512}, "truncate_prompt_tokens is 512"),
        ({"padding": "max_length"}, "padding is max_length"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ({"dimensions": 4}, "dimensions"),
        ({"top_k": 4}, "top_k"),
        ({"chat_template_kwargs": {"a": 1}}, "goes through no template"),
        ({"messages": MESSAGES}, "both of input and messages"),
        ({"request_id": "a\r\nset-cookie: b"}, "request_id"),
        ({"input": [[]]}, "input[0] is empty"),
        ({"input": [1, -2]}, "no token id"),
        ({"input": [1, True]}, "input"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": [[1], [2.5]]}, "input[1] holds what is no token id"),
        ({"input": [2**31]}, "no token id"),
        ({"input": [1] * 1001}, "1001 token ids"),
        ({"input": [[1]] * 51}, "51 texts"),
        ({"input": []}, "input is empty"),
        ({"input": ["a", 1]}, "input"),
        ({"input": None}, "neither of input and messages"),
    ],
)
def test_what_would_change_a_score_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    status, error = refusal("/classify", {"input": TEXT, **options})
    assert status == (413 if "1001" in named or "51 texts" in named else 400)
    assert named in error["error"]["message"]
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert (error["error"]["type"], error["error"]["code"]) == ("BadRequestError", status)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"add_special_tokens": True}, "never a second one"),
        ({"messages": MESSAGES[:1]}, "the last one of an assistant"),
        ({"messages": []}, "messages are empty"),
        ({"messages": [MESSAGES[1]]}, "at least two turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, MESSAGES[1]]}, "image_url"),
    ],
)
def test_what_would_change_a_conversation_is_refused(options: dict[str, Any], named: str) -> None:
    status, error = refusal("/classify", {"messages": MESSAGES, **options})
    assert status == 400
    assert named in error["error"]["message"]


def test_options_without_effect_are_accepted() -> None:
    options = {
        "user": "u", "priority": 3, "cache_salt": "s", "truncation_side": "left", "padding": "do_not_pad", "truncate_prompt_tokens": -1,
        "add_special_tokens": False, "softmax": True, "add_generation_prompt": False, "mm_processor_kwargs": None,
    }  # fmt: skip
    assert post("/classify", {"input": TEXT, **options}, 2.0)["data"][0]["probs"] == [2.0]


def test_pooling_as_numbers() -> None:
    reply = post("/pooling", {"input": ["a", "b"], "task": "classify"}, 0.1, -2.5)
    assert reply["id"] == "pooling-r1"
    assert reply["data"] == [{"index": 0, "object": "pooling", "data": [0.1]}, {"index": 1, "object": "pooling", "data": [-2.5]}]


@pytest.mark.parametrize(("endianness", "order"), [("little", "<f"), ("big", ">f"), ("native", "=f")])
def test_pooling_as_base64_is_the_float32(endianness: str, order: str) -> None:
    reply = post("/pooling", {"input": "a", "encoding_format": "base64", "endianness": endianness}, -2.53125)
    assert struct.unpack(order, base64.b64decode(reply["data"][0]["data"])) == (-2.53125,)


def test_pooling_as_bytes_is_read_by_its_metadata() -> None:
    reply = answered("/pooling", {"input": ["a", "b"], "encoding_format": "bytes", "endianness": "big"}, Scored([1.5, -0.25]))
    metadata = json.loads(reply.headers["metadata"])
    assert reply.media_type == "application/octet-stream"
    assert isinstance(reply.content, bytes)
    for row, reward in zip(metadata["data"], [1.5, -0.25], strict=True):
        assert (row["embed_dtype"], row["endianness"], row["shape"]) == ("float32", "big", [1])
        assert struct.unpack(">f", reply.content[row["start"] : row["end"]]) == (reward,)
    assert metadata["usage"]["prompt_tokens"] == 20
    bare = answered("/pooling", {"input": ["a"], "encoding_format": "bytes_only", "endianness": "big"}, Scored([1.5]))
    assert "metadata" not in bare.headers
    assert bare.content == struct.pack(">f", 1.5)


def test_pooling_of_every_token_is_the_trace() -> None:
    (item,) = parsed("/pooling", {"input": "a", "task": "token_classify"}).items
    assert item.trace
    assert post("/pooling", {"input": "a", "task": "token_classify"}, 2.0)["data"][0]["data"] == [[0.125], [2.0]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"task": "embed"}, "a reward model has classify and token_classify"),
        ({"task": "score"}, "was removed"),
        ({"task": "encode"}, "was removed"),
        ({"embed_dtype": "float16"}, "rewards are float32"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 3}, "dimensions"),
    ],
)
def test_pooling_refuses_what_a_reward_model_has_not(options: dict[str, Any], named: str) -> None:
    status, error = refusal("/pooling", {"input": "a", **options})
    assert status == 400
    assert named in error["error"]["message"]


def test_a_trace_of_messages_is_refused() -> None:
    assert refusal("/pooling", {"messages": MESSAGES, "task": "token_classify"})[0] == 400


PAIRS = [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_score_takes_one_query_for_all(first: str, second: str) -> None:
    request = {"model": "our-model", first: "Q", second: ["a", "b", "c"]}
    (item,) = parsed("/score", request).items
    assert (item.prompt, item.completions) == (({"role": "user", "content": "Q"},), ("a", "b", "c"))
    reply = post("/score", request, 1.0, 2.0, 3.0)
    assert reply["id"] == "score-r1"
    assert reply["data"] == [{"index": i, "object": "score", "score": float(i + 1)} for i in range(3)]


def test_score_keeps_the_order_of_pairs() -> None:
    items = parsed("/score", {"text_1": ["P", "P", "Q", "P"], "text_2": ["a", "b", "c", "d"]}).items
    assert [item.completions for item in items] == [("a", "b"), ("c",), ("d",)]


def test_more_documents_than_completions_of_an_item() -> None:
    items = parsed("/score", {"text_1": "P", "text_2": list("abcdef")}).items
    assert [item.completions for item in items] == [("a", "b", "c", "d"), ("e", "f")]


def test_one_item_is_never_more_than_the_request_may_hold() -> None:
    assert refusal("/score", {"text_1": "P", "text_2": ["a"] * 51})[0] == 413


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]},
        {"text_1": "a"},
        {"queries": "a", "text_2": "b"},
        {"text_1": "a", "text_2": []},
        {"text_1": "a", "text_2": "b", "instruction": "judge"},
        {"text_1": "a", "text_2": "b", "max_tokens_per_doc": 7},
        {"text_1": "", "text_2": "b"},
        {"text_1": "a", "text_2": " "},
        {"text_1": {"content": []}, "text_2": "b"},
    ],
)
def test_bad_pairs_are_refused(body: dict[str, Any]) -> None:
    assert refusal("/score", body)[0] == 400


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/vllm/v1/rerank"])
def test_rerank_sorts_by_raw_reward(path: str) -> None:
    request = {"model": "our-model", "query": "Q", "documents": ["a", "b", "c"], "top_n": 2}
    reply = post(path, request, -5.0, 40.0, 39.0)
    assert reply["results"] == [
        {"index": 1, "document": {"text": "b", "multi_modal": None}, "relevance_score": 40.0},
        {"index": 2, "document": {"text": "c", "multi_modal": None}, "relevance_score": 39.0},
    ]
    assert reply["usage"] == {"prompt_tokens": 33, "total_tokens": 33}
    assert len(post(path, {**request, "top_n": 0}, 1.0, 2.0, 3.0)["results"]) == 3
