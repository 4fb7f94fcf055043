"""Every family gives the rewards of plain Transformers, trains every parameter that plain Transformers trains, and is saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.architectures import FAMILIES
from tests.helpers.comparisons import VOCAB_SIZE, make_comparison
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from rayward.batch.layout import pack
from rayward.config.model import ModelConfig
from rayward.contract.contract import Contract
from rayward.model.build import build_reward_model, load_reward_model, resolve_hf_config
from rayward.model.pretrained import fill
from rayward.model.reward_model import RewardModel, to_tensors
from rayward.model.weights import RandomInit, persistent_buffers
from rayward.training.engines.optimizer import set_training_mode

MAX_TOKENS = 64
CPU = torch.device("cpu")
COMPARISONS = [make_comparison("a", 6, [5, 3]), make_comparison("b", 0, [4]), make_comparison("c", 9, [2])]


def resolved(name: str) -> PretrainedConfig:
    contract = Contract(
        template="{{ messages }}", template_source="tokenizer", end_token="</s>", end_token_id=2, pad_token="<pad>", pad_token_id=0,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    architecture = {**FAMILIES[name], "model_type": name}
    return resolve_hf_config(ModelConfig(architecture=architecture, tokenizer="t", max_tokens=MAX_TOKENS), contract, vocab_size=VOCAB_SIZE)


def rewards_of(model: RewardModel) -> Tensor:
    rewards = model(to_tensors(pack(COMPARISONS, layout=model.layout), CPU))
    assert isinstance(rewards, Tensor)
    return rewards


def plain_rewards(model: PreTrainedModel) -> Tensor:
    """What plain Transformers gives, one unpadded conversation at a time."""
    rows = [np.concatenate([c.prefix_ids, branch]) for c in COMPARISONS for branch in c.branch_ids]
    return torch.cat([model(input_ids=torch.from_numpy(row).long()[None]).logits for row in rows])


def reached(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_scores_trains_and_is_saved_as_plain_transformers_does(name: str, tmp_path: Path) -> None:
    config = resolved(name)
    # Not one configuration for both: the attention is chosen in it.
    plain: PreTrainedModel = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    model = build_reward_model(config, max_tokens=MAX_TOKENS)
    fill(model.model, RandomInit(model.model, seed=1))
    state = {**dict(model.model.named_parameters()), **persistent_buffers(model.model)}
    plain.load_state_dict(state)
    set_training_mode(model)
    rewards, expected = rewards_of(model), plain_rewards(plain.eval())
    assert expected.std() > 0.01, "rewards that hardly differ would prove nothing"
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)
    rewards.sum().backward()  # type: ignore[no-untyped-call]
    expected.sum().backward()  # type: ignore[no-untyped-call]
    assert reached(model.model) >= reached(plain)
    config.save_pretrained(tmp_path)
    save_file({key: value.detach().clone() for key, value in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=MAX_TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(rewards_of(loaded), rewards.detach(), rtol=1e-6, atol=1e-6)
