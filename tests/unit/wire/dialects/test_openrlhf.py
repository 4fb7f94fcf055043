"""The request of OpenRLHF's `SingleTurnAgentExecutor` and what it and its trainer read of the reply."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.helpers.dialects import Scored, answered, failure, parsed, post, refusal

from rayward.wire.items import ItemError

PROMPT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
QUERY = PROMPT + "4<|im_end|>"
REQUEST = {"query": [QUERY], "prompts": [PROMPT], "labels": ["4"]}


def read_by_client(reply: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Reward, score and logs as its client keeps them."""
    scores = reply.get("scores")
    return reply.get("rewards"), scores if scores is not None else reply.get("rewards"), reply.get("extra_logs") or {}


def test_client_reads_its_reward() -> None:
    reward, score, logs = read_by_client(post("/get_reward", REQUEST, 1.25))
    assert reward == score == [1.25]
    assert logs == {"text_as_given": [0.0]}


def test_extra_logs_are_numbers_that_become_tensors() -> None:
    _, _, logs = read_by_client(post("/get_reward", REQUEST, 0.5, outputs=("helpful", "safe"), values=[[1.0, 2.0]], taken_as="as_given"))
    assert logs == {"text_as_given": [1.0], "helpful": [1.0], "safe": [2.0]}
    assert all(math.isfinite(number) for column in logs.values() for number in column)


def test_query_is_one_whole_text_and_its_prompt_is_known() -> None:
    (item,) = parsed("/get_reward", REQUEST).items
    assert (item.form, item.prompt, item.completions, item.prompt_text) == ("text", (), (QUERY,), PROMPT)


def test_prompt_that_a_query_does_not_begin_with_says_nothing() -> None:
    first, second = parsed("/get_reward", {"query": ["What is 2+2? 4", "Hi"], "prompts": ["Another", "Hi"]}).items
    assert first.prompt_text is None
    assert second.prompt_text is None, "nothing would be left to judge"


def test_old_client_sends_queries_alone() -> None:
    assert post("/get_reward", {"query": ["a", "b"]}, 1.0, 2.0)["rewards"] == [1.0, 2.0]


def test_header_says_how_texts_were_taken() -> None:
    assert answered("/get_reward", REQUEST, Scored([1.0])).headers["x-rayward-text"] == "rendered"


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"query": []}, 422, "query is empty"),
        ({"query": "text"}, 422, "query"),
        ({"prompts": ["a"]}, 422, "query"),
        ({"query": ["a"], "prompts": ["a", "b"]}, 422, "2 prompts for 1 queries"),
        ({"query": ["a"], "unknown": 1}, 422, "unknown: no field of this path"),
        ({"query": ["a", 1, 2, 3]}, 422, "query.1"),
        ({"query": ["  "]}, 422, "query[0] is empty"),
        ({"query": ["a\x00"]}, 422, "NUL"),
        ({"query": ["x" * 1001]}, 413, "query[0] has 1001 characters"),
        ({"query": ["x"] * 51}, 413, "51 texts"),
        (b"[]", 422, "no JSON object"),
        (b"{", 400, "not JSON"),
    ],
)
def test_bad_request_is_refused_by_name(body: Any, status: int, named: str) -> None:
    found, error = refusal("/get_reward", body)
    assert found == status
    assert named in error["detail"]


def test_failed_item_refuses_the_request_and_says_whether_to_retry() -> None:
    body = {"query": ["a", "b"]}
    status, error = failure("/get_reward", body, Scored([1.0], errors={1: ItemError.of("too_long", "5000 tokens; 4096 are allowed")}))
    assert (status, "too_long" in error["detail"], "item 1" in error["detail"]) == (422, True, True)
    assert failure("/get_reward", body, Scored([1.0], errors={0: ItemError.of("interrupted", "the replica went away")}))[0] == 503


def test_a_number_that_is_not_finite_is_never_given_out() -> None:
    assert failure("/get_reward", {"query": ["a"]}, Scored([math.nan]))[0] == 422
