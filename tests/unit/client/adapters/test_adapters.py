"""Adapters as the trainers call them: shapes of arguments and replies, samples without a reward, a service that does not answer."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from tests.unit.client.test_client import error, reply

from rayward.client import samples
from rayward.client.adapters import openrlhf, slime, trl, verl
from rayward.client.adapters.plain import Rewards
from rayward.client.exchange import TextRefusedError
from rayward.client.samples import Judge, Sample
from rayward.errors import ConfigError, DeadlineError, PartialError, RequestError, ScoringError

TOO_LONG = {"error": {"code": "too_long", "message": "m"}}


class Server:
    """A reward is a completion's length; `long` cannot be scored, `lost` has no answer now."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.down = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.requests.append(body)
        self.paths.append(request.url.path)
        if self.down:
            return error(503)
        if request.url.path == "/get_reward":
            if any("long" in text for text in body["query"]):
                return httpx.Response(422, json={"detail": "item 0 has no reward (too_long)"})
            rewards = [float(len(text)) for text in body["query"]]
            return httpx.Response(200, json={"rewards": rewards, "scores": rewards, "extra_logs": {}})
        return reply([self._result(item) for item in body["items"]], version=body.get("version", "v1"))

    def _result(self, item: dict[str, Any]) -> dict[str, Any]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in item["completions"]]
        if "lost" in texts:
            return {"error": {"code": "interrupted", "message": "gone", "retryable": True}}
        return TOO_LONG if "long" in texts else {"rewards": [float(len(text)) for text in texts]}

    @property
    def settings(self) -> dict[str, Any]:
        return {"transport": httpx.MockTransport(self), "sleep": _no_wait, "deadline_s": 0.5}


async def _no_wait(seconds: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Named in the environment, and reached without a socket."""
    server = Server()
    monkeypatch.setenv("RAYWARD_URL", "http://server")
    given = samples.environment
    for module in (samples, openrlhf, slime):
        monkeypatch.setattr(module, "environment", lambda: {**given(), **server.settings})
    caches: list[Any] = [openrlhf._client, slime._client, slime._judge, verl._judge]
    for cache in caches:
        cache.cache_clear()
    yield server
    for cache in caches:
        cache.cache_clear()


# Samples


def test_samples_of_one_prompt_travel_together(server: Server) -> None:
    turns = [{"role": "user", "content": "q"}]
    judged = Judge().judge_blocking([Sample("p", "a"), Sample(turns, "bb"), Sample("p", "ccc"), Sample(turns, "dddd")])
    assert judged.rewards == (1.0, 2.0, 3.0, 4.0)
    assert [len(item["completions"]) for item in server.requests[0]["items"]] == [2, 2]
    assert judged.versions == ("v1",) * 4


def test_one_bad_completion_leaves_its_siblings_their_rewards_of_the_same_version(server: Server) -> None:
    judged = Judge(version="v7").judge_blocking([Sample("p", text) for text in ("a", "long", "bb", "", "cc\x00")])
    assert judged.rewards == (1.0, None, 2.0, None, None)
    assert [e and e.code for e in judged.errors] == [None, "too_long", None, "empty_completion", "nul_byte"]
    assert judged.num_masked == 3
    assert judged.versions[:3] == ("v7",) * 3
    assert [request["version"] for request in server.requests] == ["v7", "v7"]
    with pytest.raises(PartialError) as caught:
        judged.floats()
    assert caught.value.failed == (1, 3, 4)
    assert judged.floats(-3.0) == [1.0, -3.0, 2.0, -3.0, -3.0]


def test_large_groups_travel_as_several(server: Server) -> None:
    judged = Judge().judge_blocking([Sample("p", "x" * (i + 1)) for i in range(150)])
    assert judged.rewards == tuple(float(i + 1) for i in range(150))
    assert [len(item["completions"]) for item in server.requests[0]["items"]] == [64, 64, 22]


def test_a_sample_that_the_service_lost_is_no_masked_one(server: Server) -> None:
    with pytest.raises(PartialError, match="interrupted") as caught:
        Judge(max_retries=1).judge_blocking([Sample("p", "a"), Sample("q", "lost"), Sample("r", "bb")])
    assert caught.value.failed == (1,)
    assert caught.value.rewards == ((1.0,), None, (2.0,))


def test_a_service_that_is_down_raises(server: Server) -> None:
    server.down = True
    with pytest.raises(DeadlineError):
        Judge().judge_blocking([Sample("p", "a")])


def test_requests_without_an_answer_are_told_by_their_samples(server: Server) -> None:
    def some(request: httpx.Request) -> httpx.Response:
        return error(503) if b"down" in request.content else server(request)

    settings = {**server.settings, "transport": httpx.MockTransport(some), "max_retries": 0, "max_items_per_request": 1}
    with pytest.raises(PartialError) as caught:
        Judge("http://a", **settings).judge_blocking([Sample("p", "a"), Sample("down", "b"), Sample("p", "ccc"), Sample("down", "d")])
    assert caught.value.failed == (1, 3)
    assert caught.value.rewards == ((1.0,), None, (3.0,), None)


def test_what_is_no_json_is_masked_like_any_bad_sample(server: Server) -> None:
    judged = Judge().judge_blocking([Sample(torch.zeros(2), "a"), Sample("p", "b")])  # type: ignore[arg-type]
    assert judged.rewards == (None, 1.0)


def test_the_environment_says_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_URL", raising=False)
    with pytest.raises(ConfigError, match="RAYWARD_URL"):
        Judge()
    monkeypatch.setenv("RAYWARD_MODEL", "rm")
    monkeypatch.setenv("RAYWARD_VERSION", "v3")
    monkeypatch.setenv("RAYWARD_DEADLINE_S", "12.5")
    assert samples.environment() == {"model": "rm", "version": "v3", "deadline_s": 12.5}
    assert repr(Judge("http://a").client) == "AsyncRewardClient(http://a, model=rm, version=v3)"
    for bad in ("soon", "nan", "inf"):
        monkeypatch.setenv("RAYWARD_PENALTY", bad)
        with pytest.raises(ConfigError, match="RAYWARD_PENALTY"):
            samples.penalty_from_environment()
    monkeypatch.setenv("RAYWARD_PENALTY", "-2")
    assert samples.penalty_from_environment() == -2.0


# A loop of one's own


def test_plain(server: Server) -> None:
    rewards_of = pickle.loads(pickle.dumps(Rewards("http://a"))) and Rewards()
    assert rewards_of(["p", "p", "q"], ["a", "", "ccc"]) == [1.0, None, 3.0]
    assert asyncio.run(rewards_of.concurrently(["p"], ["bb"])) == [2.0]
    assert rewards_of.judged(["p"], ["long"]).errors[0].code == "too_long"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="zip"):
        rewards_of(["p"], [])


# TRL


def as_trl_calls(function: Any, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """As GRPO's and RLOO's `_calculate_rewards` do: by keyword, with token ids, columns and loggers; None becomes NaN."""
    logged: dict[str, Any] = {}
    given = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [[1, 2]] * len(prompts),
        "trainer_state": SimpleNamespace(global_step=0),
        "log_extra": lambda name, values: logged.__setitem__(name, values),
        "log_metric": lambda name, value: logged.__setitem__(name, value),
        **columns,
    }
    output = function(**given)
    if inspect.iscoroutine(output):
        output = asyncio.run(output)
    assert logged["rayward_version"] == ["v1" if r is not None else "" for r in output]
    assert logged["rayward/masked"] == output.count(None) / len(output)
    return [math.nan if reward is None else reward for reward in output]


@pytest.mark.parametrize("kind", [trl.RewardFunction, trl.AsyncRewardFunction])
def test_trl(server: Server, kind: Callable[[], Any]) -> None:
    function = kind()
    prompts = [[{"role": "user", "content": "q"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in ("a", "", "ccc")]
    first, masked, third = as_trl_calls(function, prompts, completions, answer=["1", "2", "3"])
    assert (first, third) == (1.0, 3.0)
    assert math.isnan(masked)
    assert as_trl_calls(function, ["p", "p"], ["a", "bb"]) == [1.0, 2.0]
    assert function.__name__ == "rayward"
    copy = pickle.loads(pickle.dumps(trl.RewardFunction("http://a", name="safety")))
    assert copy.__name__ == "safety"


def test_trls_own_test_tells_the_two_kinds_apart() -> None:
    # `trl.trainer.utils.is_async_callable`.
    assert not inspect.iscoroutinefunction(trl.RewardFunction("http://a").__call__)
    assert inspect.iscoroutinefunction(trl.AsyncRewardFunction("http://a").__call__)


def test_trl_prompts_that_the_assistant_has_begun_go_on(server: Server) -> None:
    prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It"}]
    trl.RewardFunction()([prompt], [[{"role": "assistant", "content": " is."}]])
    assert server.requests[0]["items"][0]["prompt"][-1] == {"role": "assistant", "content": "It", "prefix": True}
    assert "prefix" not in prompt[-1]


def test_trl_stops_when_the_service_does_not_answer(server: Server) -> None:
    server.down = True
    with pytest.raises(ScoringError):
        trl.RewardFunction()(["p"], ["a"])


# verl


def as_verl_calls(function: Any, **extra: Any) -> dict[str, Any]:
    """As the naive reward manager does for an asynchronous function."""
    call = {"data_source": "d", "solution_str": "abc", "ground_truth": "g", "extra_info": {"num_turns": 2, "prompt": "p"}, **extra}
    assert inspect.iscoroutinefunction(function)
    result: dict[str, Any] = asyncio.run(function(**call))
    return result


def test_verl_function(server: Server) -> None:
    assert as_verl_calls(verl.compute_score) == {"score": 3.0, "rayward_version": "v1"}
    assert as_verl_calls(verl.compute_score, reward_router_address="x:1", reward_model_tokenizer=None)["score"] == 3.0
    turns = [{"role": "user", "content": "q"}]
    assert as_verl_calls(verl.compute_score, extra_info={"chat": turns}, prompt_key="chat", model="rm")["score"] == 3.0
    assert server.requests[-1]["items"][0]["prompt"] == turns
    assert server.requests[-1]["model"] == "rm"
    with pytest.raises(ConfigError, match="extra_info has no 'prompt'"):
        as_verl_calls(verl.compute_score, extra_info={})
    with pytest.raises(PartialError, match="too_long"):
        as_verl_calls(verl.compute_score, solution_str="long")
    assert as_verl_calls(verl.compute_score, solution_str="long", penalty=-1.0)["score"] == -1.0
    server.down = True
    with pytest.raises(ScoringError):
        as_verl_calls(verl.compute_score, penalty=-1.0)


class RewardManagerBase:
    """Signature of verl 0.9.1's `verl.experimental.reward_loop.reward_manager.base.RewardManagerBase`."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None:
        self.tokenizer = tokenizer
        self.loop = asyncio.get_event_loop()


class Rows(list[Any]):
    """Slices like verl's DataProto."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return Rows(found) if isinstance(key, slice) else found


def install(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    """A module that only a trainer's own environment has."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        whole = ".".join(parts[:depth])
        if whole not in sys.modules:
            monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
    for key, value in names.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def test_verl_manager(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "verl.experimental.reward_loop.reward_manager.base", RewardManagerBase=RewardManagerBase)
    monkeypatch.delitem(sys.modules, "rayward.client.adapters.verl_manager", raising=False)
    manager_of = importlib.import_module("rayward.client.adapters.verl_manager").RewardManager
    decoded: list[tuple[list[int], bool]] = []

    def decode(ids: torch.Tensor, skip_special_tokens: bool) -> str:
        decoded.append((ids.tolist(), skip_special_tokens))
        return "x" * len(ids)

    def row(**columns: Any) -> Any:
        batch = {"responses": torch.tensor([5, 6, 7, 0]), "attention_mask": torch.tensor([1, 1, 1, 1, 1, 0])}
        return SimpleNamespace(batch=batch, non_tensor_batch={"data_source": "d", **columns})

    async def main() -> Any:
        manager = manager_of(config=None, tokenizer=SimpleNamespace(decode=decode), compute_score=None, reward_router_address=None)
        result = await manager.run_single(Rows([row(), row(raw_prompt=[{"role": "user", "content": "q"}])]))
        with pytest.raises(ConfigError, match="return_raw_chat"):
            await manager.run_single(Rows([row()]))
        return result

    assert asyncio.run(main()) == {"reward_score": 3.0, "reward_extra_info": {"score": 3.0, "rayward_version": "v1"}}
    assert decoded == [([5, 6, 7], True)]
    assert server.requests[0]["items"] == [{"prompt": [{"role": "user", "content": "q"}], "completions": ["xxx"]}]


# OpenRLHF


def test_openrlhf_by_its_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `openrlhf/utils/agent.py` loads and calls it: by path, one sample, in a thread.
    path = Path(openrlhf.__file__)
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "environment", lambda: {"deadline_s": 5.0, "transport": httpx.MockTransport(server)})

    async def main() -> Any:
        return await asyncio.to_thread(module.reward_func, ["<s>q</s>abc"], ["<s>q</s>"], ["label"])

    result = asyncio.run(main())
    assert torch.equal(result["rewards"], torch.tensor([11.0]))
    assert torch.equal(result["scores"], result["rewards"])
    assert result["extra_logs"] == {}
    assert server.requests == [{"query": ["<s>q</s>abc"], "prompts": ["<s>q</s>"]}]
    assert server.paths == ["/get_reward"]


def test_openrlhf_without_a_reward(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextRefusedError, match="too_long"):
        openrlhf.reward_func(["long"], ["l"], [None])
    monkeypatch.setenv("RAYWARD_PENALTY", "-4")
    assert openrlhf.reward_func(["long", "abc"], ["l", "a"], [None, None])["rewards"].tolist() == [-4.0, 3.0]
    server.down = True
    with pytest.raises(ScoringError):
        openrlhf.reward_func(["abc"], ["a"], [None])


def test_a_wrong_path_is_no_bad_sample(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_PENALTY", "-4")
    monkeypatch.setattr(Server, "__call__", lambda self, request: httpx.Response(404, text="nothing here"))
    with pytest.raises(RequestError, match="nothing here"):
        openrlhf.reward_func(["abc"], ["a"], [None])


# slime


def slimes(prompt: Any, response: str) -> Any:
    return SimpleNamespace(prompt=prompt, response=response, label=None, metadata={})


def test_slime(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "q"}]
    one = slimes(turns, "abc")
    assert asyncio.run(slime.custom_rm(None, one)) == 3.0
    assert one.metadata == {"rayward_version": "v1"}
    group = [slimes(turns, "a"), slimes("<s>q", "bb"), slimes(turns, "ccc")]
    assert asyncio.run(slime.custom_rm(None, group)) == [1.0, 6.0, 3.0]
    assert {"query": ["<s>qbb"], "prompts": ["<s>q"]} in server.requests
    bad = [slimes(turns, "long"), slimes("<s>", "long"), slimes("<s>", "abc"), slimes(turns, "a")]
    with pytest.raises((PartialError, TextRefusedError)):
        asyncio.run(slime.custom_rm(None, bad))
    monkeypatch.setenv("RAYWARD_PENALTY", "-1")
    assert asyncio.run(slime.custom_rm(None, bad)) == [-1.0, -1.0, 6.0, 1.0]
    server.down = True
    with pytest.raises(ScoringError):
        asyncio.run(slime.custom_rm(None, bad))


# NeMo-RL


class EnvironmentReturn(NamedTuple):
    """Fields of NeMo-RL's, in their order."""

    observations: Any
    metadata: Any
    next_stop_strings: Any
    rewards: Any
    terminateds: Any
    answers: Any


def test_nemo_rl(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    registry: dict[str, str] = {}
    registered: dict[str, str] = {}
    install(monkeypatch, "nemo_rl.environments.interfaces", EnvironmentInterface=object, EnvironmentReturn=EnvironmentReturn)
    install(monkeypatch, "nemo_rl.environments.utils", register_env=registered.__setitem__)
    install(monkeypatch, "nemo_rl.distributed.ray_actor_environment_registry", ACTOR_ENVIRONMENT_REGISTRY=registry)
    install(monkeypatch, "nemo_rl.distributed.virtual_cluster", PY_EXECUTABLES=SimpleNamespace(SYSTEM="python"))
    monkeypatch.delitem(sys.modules, "rayward.client.adapters.nemo_rl", raising=False)
    module = importlib.import_module("rayward.client.adapters.nemo_rl")
    monkeypatch.setattr(module, "environment", lambda: server.settings)

    module.register()
    (name, actor), python = next(iter(registered.items())), registry[module.ACTOR]
    assert (name, python) == ("rayward", "python")
    holder, _, attribute = actor.rpartition(".")
    assert getattr(importlib.import_module(holder), attribute).__ray_metadata__.class_name == "Environment"

    environment = module.Environment({"base_url": "http://server", "num_workers": 3})
    log = [{"role": "user", "content": "<s>q</s>"}, {"role": "assistant", "content": "abc"}]
    with_turns = {"ground_truth": "g", "prompt": [{"role": "user", "content": "q"}]}
    result = environment.step([log, log], [with_turns, {"ground_truth": "g"}])
    assert result.rewards.tolist() == [3.0, 11.0]
    assert result.terminateds.tolist() == [True, True]
    assert result.answers == ["abc", "abc"]
    assert {"query": ["<s>q</s>abc"], "prompts": ["<s>q</s>"]} in server.requests
    _, metrics = environment.global_post_process_and_metrics({"total_reward": torch.tensor([1.0, 3.0])})
    assert metrics["rayward/mean_reward"] == 2.0

    long = [log[0], {"role": "assistant", "content": "long"}]
    for metadata in (with_turns, None):
        with pytest.raises((PartialError, TextRefusedError)):
            environment.step([long], [metadata])
    lenient = module.Environment({"base_url": "http://server", "penalty": -5})
    assert lenient.step([long, log, long, log], [with_turns, with_turns, None, None]).rewards.tolist() == [-5.0, 3.0, -5.0, 11.0]
    with pytest.raises(ConfigError, match="one of the assistant"):
        environment.step([[*log, *log]], [with_turns])
