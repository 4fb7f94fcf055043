"""Trainers and clients of other systems, unmodified, against the running server.

Run by `make clients`, in an environment that has them beside Rayward: TRL and the OpenAI client of the `bench` extra, and OpenRLHF and verl
without what they depend on, since their pins and ours exclude each other.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import make_export
from transformers import LlamaConfig, LlamaForCausalLM

from rayward import RewardClient
from rayward.client.adapters import trl as adapter
from rayward.client.exchange import Text
from rayward.config.scoring import ScoringConfig
from rayward.contract.tokenizer import load_tokenizer
from rayward.scoring.scorer import ScoreItem, Scorer

pytestmark = [
    pytest.mark.clients,
    pytest.mark.usefixtures("ray_local"),
    # Warnings of other people's code.
    pytest.mark.filterwarnings("default"),
]

APP = f"rayward-clients-{os.getpid()}"
QUESTIONS = ("What is two plus two?", "Hello", "Name a colour.", "Wie geht es?")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def scorer(export: Path) -> Scorer:
    return Scorer.load(export, device="cpu")


@pytest.fixture(scope="module")
def url(ray_local: None, export: Path) -> Iterator[str]:
    from ray import serve

    from rayward.serving import app

    config = ScoringConfig(model=str(export), device="cpu", tokens_per_batch=512, cpus_per_replica=0.25)
    yield str(app.serve_model(config, port=0, name=APP))
    serve.shutdown()


def offline(scorer: Scorer, prompt: str, completions: Sequence[str]) -> list[float]:
    (result,) = scorer.score([ScoreItem(({"role": "user", "content": prompt},), tuple(completions))])
    assert result.rewards is not None
    return list(result.rewards)


# TRL

TOO_LONG = "much too long " * 500


class Recording:
    """Breaks the first completion of every step, and keeps what was asked and answered."""

    steps: list[tuple[Sequence[Text], Sequence[Text], list[float | None]]]

    def broken(self, completions: Sequence[Any]) -> list[Any]:
        return [[{"role": "assistant", "content": TOO_LONG}], *completions[1:]]


class Function(Recording, adapter.RewardFunction):
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **given: Any) -> list[float | None]:
        completions = self.broken(completions)
        rewards = super().__call__(prompts, completions, **given)
        self.steps.append((prompts, completions, rewards))
        return rewards


class AsyncFunction(Recording, adapter.AsyncRewardFunction):
    async def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **given: Any) -> list[float | None]:
        completions = self.broken(completions)
        rewards = await super().__call__(prompts, completions, **given)
        self.steps.append((prompts, completions, rewards))
        return rewards


@pytest.mark.parametrize(("trainer", "kind"), [("GRPO", Function), ("GRPO", AsyncFunction), ("RLOO", Function)])
def test_trl_trains_on_rewards_and_masks_what_has_none(
    url: str, export: Path, scorer: Scorer, tmp_path: Path, trainer: str, kind: type[Any]
) -> None:
    import trl
    from datasets import Dataset

    tokenizer = load_tokenizer(str(export))
    torch.manual_seed(0)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    seen: list[torch.Tensor] = []

    class Trainer(getattr(trl, f"{trainer}Trainer")):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            seen.append(output["advantages"].flatten().clone())
            return output

    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        max_steps=3,
        beta=0.0,  # no reference model, which would be read from the hub
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    function = kind(url, deadline_s=120.0)
    function.steps = []
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS * 4]
    run = Trainer(model=policy, reward_funcs=function, args=config, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer)
    run.train()

    assert len(function.steps) == len(seen) == 3
    for (prompts_, completions, rewards), advantages in zip(function.steps, seen, strict=True):
        assert rewards[0] is None
        # No reward, no advantage: a 0 in its place would have had one, and would have moved its siblings' baseline.
        assert advantages[0] == 0.0
        scored = [index for index, reward in enumerate(rewards) if reward is not None]
        assert len(scored) >= 4
        for index in scored:
            (expected,) = offline(scorer, prompts_[index][-1]["content"], [completions[index][-1]["content"]])  # type: ignore[call-overload, index]
            assert rewards[index] == pytest.approx(expected, abs=1e-5)
        assert advantages.isfinite().all()
    logged = [entry for entry in run.state.log_history if "rewards/rayward/mean" in entry]
    assert len(logged) == 3
    assert all(entry["rayward/masked"] > 0.0 for entry in logged)


def test_trl_stops_when_the_service_is_gone() -> None:
    import trl.trainer.utils as of_trl

    function = adapter.RewardFunction("http://127.0.0.1:9", deadline_s=0.5)
    assert not of_trl.is_async_callable(function)
    assert of_trl.is_async_callable(adapter.AsyncRewardFunction("http://127.0.0.1:9"))
    assert of_trl.get_callable_name(function) == "rayward"
    with pytest.raises(Exception, match="deadline_s"):
        function(prompts=["p"], completions=["a"])


# The OpenAI client


def test_the_openai_client_reads_models_rewards_and_errors(url: str) -> None:
    import openai

    with RewardClient(url) as native:
        (expected,) = native.score("Hello", ["Hi there"])
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        turns: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
        chat = client.chat.completions.create(model="tiny", messages=turns)
        assert float(str(chat.choices[0].message.content)) == pytest.approx(expected, abs=1e-5)
        assert chat.usage is not None
        assert chat.usage.prompt_tokens > 0
        # Its default encoding is base64.
        embedded = client.embeddings.create(model="tiny", input=["plain", "texts"])
        (direct,) = client.embeddings.create(model="tiny", input="plain", encoding_format="float").data
        assert len(embedded.data) == 2
        assert embedded.data[0].embedding[-1] == pytest.approx(direct.embedding[-1], abs=1e-5)
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="tiny", messages=[turns[0]])
        assert 400 <= caught.value.status_code < 500
        assert caught.value.body


# OpenRLHF


def templated(export: Path, prompt: str, completion: str) -> tuple[str, str]:
    tokenizer = load_tokenizer(str(export))
    begun = str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], tokenize=False
    )
    return begun, str(whole).rstrip()


@pytest.mark.parametrize("by_file", [False, True])
def test_openrlhfs_own_client(url: str, export: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, by_file: bool) -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from rayward.client.adapters import openrlhf

    monkeypatch.setenv("RAYWARD_URL", url)
    executor = SingleTurnAgentExecutor([str(openrlhf.__file__) if by_file else f"{url}/get_reward"])
    fetch = executor._fetch_rewards_via_func if by_file else executor._fetch_rewards_via_http
    prompt, query = templated(export, "Hello", "Hi there")
    (reply,) = asyncio.run(fetch([query], [prompt], ["label"]))
    (expected,) = offline(scorer, "Hello", ["Hi there"])
    assert float(reply["rewards"][0]) == pytest.approx(expected, abs=1e-5)
    assert float(reply["scores"][0]) == pytest.approx(expected, abs=1e-5)


# verl


def test_verls_reward_loop_with_our_manager(url: str, export: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from omegaconf import OmegaConf
    from verl.protocol import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    monkeypatch.setenv("RAYWARD_URL", url)
    tokenizer = load_tokenizer(str(export))
    path = "pkg://rayward.client.adapters.verl_manager"
    manager_config = {"source": "importlib", "name": "RewardManager", "module": {"path": path}}
    config = OmegaConf.create({"reward": {"reward_manager": manager_config, "custom_reward_function": {"path": None}}})
    response = tokenizer("Hi there", add_special_tokens=False, return_tensors="pt")["input_ids"]
    padded = torch.nn.functional.pad(response, (0, 3), value=tokenizer.pad_token_id)
    mask = torch.cat([torch.ones(1, 4 + response.shape[1]), torch.zeros(1, 3)], dim=1).long()
    turns = np.empty(1, dtype=object)
    turns[0] = [{"role": "user", "content": "Hello"}]
    prompts = torch.zeros(1, 4, dtype=torch.long)
    data = DataProto.from_dict(
        {"prompts": prompts, "responses": padded, "attention_mask": mask}, non_tensors={"raw_prompt": turns, "data_source": np.array(["d"])}
    )

    async def main() -> Any:
        return await load_reward_manager(config, tokenizer).run_single(data)

    result = asyncio.run(main())
    (expected,) = offline(scorer, "Hello", ["Hi there"])
    assert result["reward_score"] == pytest.approx(expected, abs=1e-5)
    assert result["reward_extra_info"]["rayward_version"] == scorer.version


def test_verls_reward_loop_with_our_function(url: str, export: Path, scorer: Scorer) -> None:
    import numpy as np
    from omegaconf import OmegaConf
    from verl.protocol import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    tokenizer = load_tokenizer(str(export))
    function = {"path": "pkg://rayward.client.adapters.verl", "name": "compute_score", "reward_kwargs": {"base_url": url}}
    config = OmegaConf.create(
        {"reward": {"reward_manager": {"source": "register", "name": "naive", "module": None}, "custom_reward_function": function}}
    )
    response = tokenizer("Hi there", add_special_tokens=False, return_tensors="pt")["input_ids"]
    rows = {
        "raw_prompt": [{"role": "user", "content": "Hello"}],
        "data_source": "d",
        "reward_model": {"ground_truth": "g"},
        "extra_info": {"prompt": "Hello"},
    }
    columns = {name: np.empty(1, dtype=object) for name in rows}
    for name, value in rows.items():
        columns[name][0] = value
    mask = torch.ones(1, 4 + response.shape[1], dtype=torch.long)
    data = DataProto.from_dict(
        {"prompts": torch.zeros(1, 4, dtype=torch.long), "responses": response, "attention_mask": mask}, non_tensors=columns
    )

    async def main() -> Any:
        return await load_reward_manager(config, tokenizer).run_single(data)

    result = asyncio.run(main())
    (expected,) = offline(scorer, "Hello", ["Hi there"])
    assert result["reward_score"] == pytest.approx(expected, abs=1e-5)
