"""What a replica does with the requests of different clients that it scores together, and the private interface of Serve."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rayward.contract.conversation import Message
from rayward.errors import ServerError
from rayward.wire.items import ItemResult, ScoreItem

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def call(*prompts: str) -> list[ScoreItem]:
    return [ScoreItem(({"role": "user", "content": prompt},), ("x",)) for prompt in prompts]


class Model:
    """Scores by the length of the prompt; raises for a call that holds "bad", and for `too_many` items together."""

    def __init__(self, too_many: int = 1000) -> None:
        self.calls: list[int] = []
        self.too_many = too_many

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        self.calls.append(len(items))
        prompts = [item.prompt[0]["content"] for item in items]
        if "bad" in prompts or len(items) >= self.too_many:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [ItemResult(rewards=(float(len(prompt)),)) for prompt in prompts]


def rewards(reply: list[ItemResult] | Exception) -> list[float]:
    assert not isinstance(reply, Exception)
    return [result.rewards[0] for result in reply if result.rewards is not None]


def test_requests_are_scored_together_and_answered_apart() -> None:
    from rayward.serving.replica import score_calls

    model = Model()
    assert [rewards(reply) for reply in score_calls(cast(Any, model), [call("a", "ab"), [], call("abc")])] == [[1.0, 2.0], [], [3.0]]
    assert model.calls == [3]


def test_a_request_that_fails_alone_too_fails_no_other() -> None:
    from rayward.serving.replica import score_calls

    model = Model()
    first, bad, last = score_calls(cast(Any, model), [call("a"), call("bad", "b"), call("abc")])
    assert (rewards(first), rewards(last)) == ([1.0], [3.0])
    assert isinstance(bad, torch.OutOfMemoryError)
    assert model.calls == [4, 1, 2, 1]


def test_requests_that_fail_only_together_are_all_answered() -> None:
    from rayward.serving.replica import score_calls

    replies = score_calls(cast(Any, Model(too_many=2)), [call("a"), call("ab")])
    assert [rewards(reply) for reply in replies] == [[1.0], [2.0]]


def replica(model: Model) -> Any:
    """A replica without Serve: its batch queue is left out."""
    from rayward.serving.replica import ScorerDeployment

    made = object.__new__(cast(Any, ScorerDeployment).func_or_class)
    made._scorer, made._thread, made._failure, made._idle = model, ThreadPoolExecutor(1), None, asyncio.Event()
    return made


@pytest.mark.parametrize(("prompts", "healthy"), [(["a", "ab"], True), (["a", "bad"], False)])
def test_a_replica_is_unhealthy_only_when_a_request_fails_alone(prompts: list[str], healthy: bool) -> None:
    made = replica(Model(too_many=2))
    batch = inspect.unwrap(type(made)._score_batch)
    replies = asyncio.run(batch(made, [SimpleNamespace(items=call(prompt)) for prompt in prompts]))
    assert [isinstance(reply, Exception) for reply in replies] == [False, not healthy]
    assert made._idle.is_set()
    if healthy:
        made.check_health()
    else:
        with pytest.raises(ServerError, match="OutOfMemoryError"):
            made.check_health()


def test_the_size_of_a_request_is_that_of_all_its_texts() -> None:
    from rayward.serving.replica import _num_chars

    called: Message = {
        "role": "assistant", "content": "c" * 10, "reasoning_content": "r" * 20,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": ["x" * 500]}}}],
    }  # fmt: skip
    prompt: tuple[Message, ...] = ({"role": "user", "content": "p" * 7},)
    assert _num_chars(ScoreItem(prompt, ("a" * 30, "b" * 3))) == 40
    rich = _num_chars(ScoreItem(prompt, ((called,),), tools=({"name": "t" * 1000},), chat_template_kwargs={"k": "v" * 100}))
    assert 7 + 10 + 20 + 500 + 1000 + 100 < rich < 1637 + 100


def test_serve_still_has_the_private_interface_that_we_use() -> None:
    import ray
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient

    why = f"Ray {ray.__version__} no longer has it: see rayward/serving/proxies.py"
    assert "raise_if_no_controller_running" in inspect.signature(context._get_global_client).parameters, why
    assert isinstance(inspect.getattr_static(ServeControllerClient, "http_config", None), property), why


def test_another_serve_says_what_it_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.serve.context

    from rayward.serving.proxies import running_address

    monkeypatch.setattr(ray.serve.context, "_get_global_client", lambda **_: None)
    assert running_address() is None
    monkeypatch.delattr(ray.serve.context, "_get_global_client")
    with pytest.raises(ServerError, match=r"no longer has ray\.serve\.context\._get_global_client"):
        running_address()
