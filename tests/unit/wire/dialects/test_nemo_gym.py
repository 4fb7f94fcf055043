"""Rollouts as NeMo-Gym's agents send them to a resources server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.dialects import Scored, answered, encoded, failure, parsed, post, refusal, route_of

from rayward.wire.items import ItemError

ANSWER = {
    "type": "message",
    "id": "m1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "4", "annotations": [], "logprobs": [{"token": "4", "logprob": -0.1}]}],
}
THOUGHT = {"type": "reasoning", "id": "t1", "summary": [{"type": "summary_text", "text": "two and two"}], "encrypted_content": None}
CALL = {"type": "function_call", "name": "add", "arguments": '{"a": 2}', "call_id": "c1", "id": "f1", "status": "completed"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "4"}


def verify(output: list[dict[str, Any]], given: Any = "What is 2+2?", **params: Any) -> dict[str, Any]:
    """A row as an agent posts it."""
    return {
        "responses_create_params": {"input": given, "temperature": 1.0, **params},
        "response": {"id": "resp_1", "object": "response", "output": output, "model": "policy", "parallel_tool_calls": True},
        "_ng_task_index": 3,
        "expected_answer": "4",
    }


def test_verify_gives_the_row_back_with_the_reward() -> None:
    row = verify([ANSWER])
    reply = post("/verify", row, 1.25, taken_as="templated")
    assert {name: reply[name] for name in row} == row
    assert reply["reward"] == 1.25
    assert reply["reward_model"] == {"model": "our-model", "version": "3f2a9c01b7de", "taken_as": "templated"}


def test_verify_names_the_components_of_a_reward() -> None:
    reply = post("/verify", verify([ANSWER]), 3.0, outputs=("helpful", "safe"), values=[[1.0, 2.0]])
    assert reply["reward_components"] == {"helpful": 1.0, "safe": 2.0}


def test_the_answer_is_one_assistant_turn() -> None:
    (item,) = parsed("/verify", verify([ANSWER], instructions="Be brief.")).items
    assert [turn["role"] for turn in item.prompt] == ["system", "user"]
    assert item.completions == ("4",)


def test_thoughts_calls_and_their_outputs_are_turns_of_the_completion() -> None:
    tools = [{"type": "function", "name": "add", "description": "adds", "parameters": {"type": "object"}, "strict": True}]
    (item,) = parsed("/verify", verify([THOUGHT, CALL, OUTPUT, ANSWER], tools=tools)).items
    (completion,) = item.completions
    assert not isinstance(completion, str)
    assert [turn["role"] for turn in completion] == ["assistant", "tool", "assistant"]
    assert completion[0]["reasoning_content"] == "two and two"
    assert completion[0]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}, "id": "c1"}]
    assert completion[1] == {"role": "tool", "content": "4", "tool_call_id": "c1"}
    assert item.tools == ({"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}},)


def test_a_prompt_of_several_turns() -> None:
    given = [
        {"role": "user", "content": "Hi"},
        ANSWER,
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "So?"}]},
    ]
    (item,) = parsed("/verify", verify([ANSWER], given)).items
    assert [(turn["role"], turn["content"]) for turn in item.prompt] == [("user", "Hi"), ("assistant", "4"), ("user", "So?")]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (verify([]), "completion"),
        (verify([CALL, OUTPUT]), "completion 0 has turns"),
        (verify([{"type": "web_search_call"}]), "web_search_call"),
        (verify([{**ANSWER, "content": [{"type": "refusal", "refusal": "no"}]}]), "refusal"),
        (verify([{**THOUGHT, "summary": [], "encrypted_content": "xyz"}]), "encrypted"),
        (verify([ANSWER], [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]), "input_image"),
        (verify([ANSWER], tools=[{"type": "web_search"}]), "is no function"),
        (verify([ANSWER], 7), "responses_create_params.input"),
        ({**verify([ANSWER]), "principle": "be kind"}, "principle"),
        ({"responses_create_params": {"input": "a"}}, "response"),
        (verify([ANSWER, 5]), "response.output[1]"),  # type: ignore[list-item]
        (verify([ANSWER], [{"role": "wizard", "content": "a"}]), "wizard"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(row: dict[str, Any], named: str) -> None:
    status, error = refusal("/verify", row)
    assert status == 422
    assert named in error["detail"]


def test_a_row_that_could_not_be_written_again_is_refused() -> None:
    row = json.dumps(verify([ANSWER])).encode()
    deep = row[:-1] + b', "extra": ' + b"[" * 500 + b"]" * 500 + b"}"
    status, error = refusal("/verify", deep)
    assert (status, "nested deeper than 64" in error["detail"]) == (422, True)


def test_a_failed_score_is_an_error_and_never_a_reward_of_zero() -> None:
    status, error = failure("/verify", verify([ANSWER]), Scored([], errors={0: ItemError.of("too_long", "too long")}))
    assert (status, "reward" in error) == (422, False)


def test_compare_judges_a_group() -> None:
    responses = [{"output": [ANSWER]}, {"output": [THOUGHT, {**ANSWER, "content": [{"type": "output_text", "text": "Four."}]}]}]
    request = {"conversation_history": [{"role": "user", "content": "What is 2+2?"}], "response_objs": responses, "principle": None}
    (item,) = parsed("/compare", request).items
    assert len(item.completions) == 2
    reply = post("/compare", request, 1.0, 3.0)
    assert reply == {
        "rewards": [1.0, 3.0],
        "comparison_results": None,
        "metrics": {"mean_individual_score": 2.0, "std_individual_score": 1.0},
    }
    assert refusal("/compare", {**request, "principle": "be kind"})[0] == 422
    assert refusal("/compare", {**request, "response_objs": []})[0] == 422


def test_an_agent_seeds_a_session_first() -> None:
    route = route_of("/seed_session")
    assert (route.asks, parsed("/seed_session", verify([])).items) == ("alive", ())
    assert answered("/seed_session", encoded({}), Scored([])).content == {}
