"""The load-balancing loss of a mixture of experts is that of the whole step, as Transformers computes it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tests.helpers.comparisons import random_comparisons
from tests.helpers.training import LLAMA, make_shares, tiny_engine
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import pack
from rayward.config.training import TrainingConfig
from rayward.errors import ConfigError
from rayward.model.build import build_reward_model
from rayward.model.reward_model import to_tensors
from rayward.model.routers import check_routers, expert_load
from rayward.model.weights import RandomInit
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.table import Objective
from rayward.training.engines.build import initialize
from rayward.training.engines.torch import TorchEngine
from rayward.training.loop import train_step

OBJECTIVE = Objective(BradleyTerryObjective())
EXPERTS: dict[str, Any] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
COEFFICIENT = 0.5


def experts(name: str, **training: Any) -> TorchEngine:
    values = {**LLAMA, **EXPERTS[name], "model_type": name}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    settings = TrainingConfig.model_validate({"engine": "torch", "gradient_checkpointing": False, **training})
    engine = TorchEngine(lambda dtype: build_reward_model(config, max_tokens=256, dtype=dtype), settings)
    initialize(engine, RandomInit(engine.reward_model.model, seed=1))
    return engine


@pytest.fixture(scope="module")
def comparisons() -> list[EncodedComparison]:
    return random_comparisons(24, seed=5)


def routers_logits(engine: TorchEngine, comparison: EncodedComparison) -> tuple[torch.Tensor, ...]:
    tensors = to_tensors(pack([comparison]), engine.device)
    backbone = engine.reward_model.backbone
    assert tensors.segments is not None
    ids, positions = tensors.input_ids, tensors.position_ids
    whole = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    if comparison.num_completions > 1:
        raise AssertionError("one completion a comparison, or the plain mask is not the packed one")
    backbone.set_attn_implementation("sdpa")
    found: tuple[torch.Tensor, ...] = backbone(
        input_ids=ids, attention_mask=whole, position_ids=positions, use_cache=False, output_router_logits=True
    ).router_logits
    engine.reward_model.use_packed_attention()
    return found


@pytest.mark.parametrize("name", list(EXPERTS))
def test_the_sums_of_a_step_are_the_loss_of_transformers(name: str, comparisons: list[EncodedComparison]) -> None:
    engine = experts(name)
    singles = [one_completion(comparison) for comparison in comparisons[:6]]
    with torch.no_grad():
        layers = [torch.cat(rows) for rows in zip(*(routers_logits(engine, single) for single in singles), strict=True)]
        expected = load_balancing_loss_func(cast(Any, tuple(layers)), num_experts=4, top_k=2)
        parts = [engine.forward_with_routing(pack(group), None)[2] for group in (singles[:1], singles[1:4], singles[4:], [])]
        sums = torch.stack(parts).sum(dim=0)
    assert (expert_load(sums) * sums[1]).sum().item() == pytest.approx(float(expected), rel=1e-5)
    assert float(parts[-1].abs().sum()) == 0.0, "an empty micro-batch counts nothing"


def one_completion(comparison: EncodedComparison) -> EncodedComparison:
    from dataclasses import replace

    return replace(comparison, branch_ids=comparison.branch_ids[:1], text_starts=None, step_ends=None, labels=type(comparison.labels)())


@pytest.mark.parametrize("changes", [{"budget": 170}, {"budget": 250}, {"gradient_checkpointing": True}], ids=str)
def test_neither_micro_batches_nor_checkpointing_change_a_step(comparisons: list[EncodedComparison], changes: dict[str, Any]) -> None:
    found = []
    for budget, training in ((100_000, {}), (changes.get("budget", 100_000), {k: v for k, v in changes.items() if k != "budget"})):
        engine = experts("mixtral", **training)
        shares = list(make_shares(comparisons, budget=budget))
        found.append([train_step(engine, share, OBJECTIVE, 1e-3, router_coefficient=COEFFICIENT) for share in shares])
    for whole, cut in zip(*found, strict=True):
        for key in ("loss", "reward_loss", "router_loss", "gradient_norm"):
            assert cut[key] == pytest.approx(whole[key], rel=1e-4), key
        assert whole["loss"] == pytest.approx(whole["reward_loss"] + COEFFICIENT * whole["router_loss"], rel=1e-9)
        assert whole["router_loss"] > 1.9, "top 2 of 4 experts in balance cost 2"


def test_the_routers_learn_balance(comparisons: list[EncodedComparison]) -> None:
    losses: dict[float, float] = {}
    for coefficient in (1e-9, 2.0):
        engine = experts("mixtral")
        for _ in range(6):
            for share in make_shares(comparisons, budget=100_000):
                losses[coefficient] = train_step(engine, share, OBJECTIVE, 3e-3, router_coefficient=coefficient)["router_loss"]
    assert losses[2.0] < losses[1e-9]


def test_without_a_coefficient_nothing_is_recorded(comparisons: list[EncodedComparison]) -> None:
    (share, *_) = make_shares(comparisons)
    assert not {"router_loss", "reward_loss"} & set(train_step(tiny_engine(), share, OBJECTIVE, 1e-3))


def test_a_model_without_routers_is_refused() -> None:
    check_routers(experts("mixtral").reward_model.backbone)
    with pytest.raises(ConfigError, match="LlamaModel has no routers"):
        check_routers(tiny_engine().reward_model.backbone)
