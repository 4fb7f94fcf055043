"""The language-model head beside the reward head: values and gradients of plain Transformers, in every layout and partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.comparisons import random_comparisons
from tests.helpers.training import LLAMA, tiny_engine, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout, language_loss_tokens, pack
from rayward.batch.planner import plan_step
from rayward.config.model import ModelConfig
from rayward.config.training import TrainingConfig
from rayward.data.stream.shares import StepShare
from rayward.errors import ModelLoadError
from rayward.model import heads
from rayward.model.build import build_reward_model, load_reward_model
from rayward.model.pretrained import weight_source
from rayward.model.reward_model import RewardModel, language_loss_tensors, to_tensors
from rayward.model.weights import RandomInit, check_language_head
from rayward.objectives.language import LanguageObjective
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.table import Objective
from rayward.training.engines.build import initialize
from rayward.training.engines.torch import TorchEngine
from rayward.training.loop import train_step

CPU = torch.device("cpu")


def causal_model(**architecture: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    values = {**LLAMA, **architecture}
    values.pop("model_type")
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def reward_model(directory: Path, layout: Layout) -> RewardModel:
    """A reward model with its language-model head, both initialised from the causal model saved there."""
    config = LlamaConfig.from_pretrained(directory, num_labels=1, pad_token_id=0)
    model = build_reward_model(config, max_tokens=256, layout=layout, with_language=True)
    source = weight_source(model.model, ModelConfig(path=str(directory)), seed=0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            parameter.copy_(source.read(name, tuple(parameter.shape), 0, parameter.numel()).view_as(parameter))
    return model.eval()


def expected_loss(model: LlamaForCausalLM, comparisons: list[EncodedComparison], which: str) -> torch.Tensor:
    """Weighted sum over the language-loss tokens, one unpadded conversation at a time."""
    total = torch.zeros(())
    for comparison in comparisons:
        assert comparison.text_starts is not None
        assert comparison.labels.ranks is not None
        for index, branch in enumerate(comparison.branch_ids):
            if which == "best" and comparison.labels.ranks[index] > 0:
                continue
            ids = torch.from_numpy(np.concatenate([comparison.prefix_ids, branch])).long()
            log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            total = total - comparison.labels.weight * log_probs[max(comparison.text_starts[index] - 1, 0) :].sum()
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("which", ["best", "all"])
def test_loss_and_gradient_are_those_of_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, layout: Layout, which: Any
) -> None:
    monkeypatch.setattr(heads, "LOGIT_ROWS", 7)  # many chunks
    plain = causal_model(tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path)
    comparisons = random_comparisons(5, seed=3)
    model = reward_model(tmp_path, layout)
    batch = pack(comparisons, layout=layout)
    language_tokens = language_loss_tokens(batch, which)
    outputs, loss = model(to_tensors(batch, CPU), language_loss_tensors(language_tokens, CPU))
    torch.testing.assert_close(outputs, model(to_tensors(batch, CPU)), rtol=0, atol=1e-6)
    reference = expected_loss(plain, comparisons, which)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    loss.backward()
    reference.backward()
    found = dict(model.model.named_parameters())
    assert ("lm_head.weight" in found) == (not tied)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_an_empty_micro_batch_still_reaches_the_head() -> None:
    model = tiny_engine(with_language=True).reward_model
    batch = pack([])
    language_tokens = language_loss_tokens(batch, "all")
    outputs, loss = model(to_tensors(batch, CPU), language_loss_tensors(language_tokens, CPU))
    assert loss.item() == 0.0
    (outputs.sum() + loss).backward()
    gradient = dict(model.model.named_parameters())["lm_head.weight"].grad
    assert gradient is not None
    assert gradient.abs().max() == 0.0


def _share(comparisons: list[EncodedComparison], budget: int) -> StepShare:
    (plan,) = plan_step(comparisons, world_size=1, tokens_per_microbatch=budget)
    return StepShare(0, 0, 1, tuple(pack([comparisons[i] for i in group]) for group in plan))


@pytest.mark.parametrize("objective", [BradleyTerryObjective(language_coefficient=1.25, language_target="all"), LanguageObjective()])
def test_micro_batches_change_neither_loss_nor_step(objective: Any) -> None:
    comparisons = random_comparisons(8, seed=5)
    metrics, weights = [], []
    for budget in (200, 10_000):
        engine = tiny_engine(with_language=True)
        metrics.append(train_step(engine, _share(comparisons, budget), Objective(objective), 1e-3))
        weights.append({p.name: engine.read_state(p, "weight").clone() for p in engine.partitions()})
    for key in ("loss", "reward_loss", "language_loss", "gradient_norm"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-5)
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], rtol=1e-4, atol=1e-5)


def test_the_joint_loss_is_the_sum_and_without_coefficient_bradley_terry_to_the_bit() -> None:
    # arXiv 2408.11791; with a difference of 1.5 and a language-model loss of 2: 2.7014132780 at 1.25, 1.7014132780 at 0.75.
    share = _share(random_comparisons(6, seed=2), 10_000)
    plain = train_step(tiny_engine(with_language=False), share, Objective(BradleyTerryObjective()), 1e-3)
    without = train_step(tiny_engine(with_language=False), share, Objective(BradleyTerryObjective(language_coefficient=0.0)), 1e-3)
    assert plain == without
    assert "language_loss" not in plain
    for coefficient in (0.75, 1.25):
        config = BradleyTerryObjective(language_coefficient=coefficient)
        joint = train_step(tiny_engine(with_language=True), share, Objective(config), 1e-3)
        assert joint["reward_loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert joint["loss"] == pytest.approx(joint["reward_loss"] + coefficient * joint["language_loss"], rel=1e-9)


@pytest.mark.parametrize(("coefficient", "expected"), [(1.25, 2.7014132780), (0.75, 1.7014132780), (0.0, 0.2014132780)])
def test_the_published_joint_losses(coefficient: float, expected: float) -> None:
    class Fixed:
        """An engine whose model gives rewards 1.5 apart and a language-model loss of 2 a token."""

        device = CPU

        def forward(self, batch: Any) -> torch.Tensor:
            return torch.tensor([[1.5], [0.0]], requires_grad=True)

        def forward_with_language_loss(self, batch: Any, language_tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return self.forward(batch), torch.tensor(2.0 * len(language_tokens.weight), requires_grad=True)

        def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
            self.loss = loss.item()

        def step(self, learning_rate: float) -> float:
            return 1.0

        def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
            return values

    engine = Fixed()
    (comparison,) = random_comparisons(1, seed=0, most=2)
    config = BradleyTerryObjective(language_coefficient=coefficient, language_target="all")
    metrics = train_step(engine, _share([comparison], 10_000), Objective(config), 1e-3)  # type: ignore[arg-type]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-7)
    assert engine.loss == pytest.approx(expected, rel=1e-6)


def test_a_tied_head_learns_with_the_embedding() -> None:
    settings = TrainingConfig.model_validate({"engine": "torch", "gradient_checkpointing": False})
    engine = TorchEngine(lambda dtype: tiny_model(dtype, with_language=True, tie_word_embeddings=True), settings)
    initialize(engine, RandomInit(engine.reward_model.model, seed=0))
    share = _share(random_comparisons(8, seed=5), 10_000)
    losses = [train_step(engine, share, Objective(LanguageObjective()), 1e-2)["language_loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3
    model = engine.reward_model.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in {partition.name for partition in engine.partitions()}


def test_a_model_without_a_language_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1)
    with pytest.raises(ModelLoadError, match="no causal language model"):
        build_reward_model(config, max_tokens=64, with_language=True)
    scaled = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, logits_scaling=2.0)
    with pytest.raises(ModelLoadError, match="scales its logits"):
        build_reward_model(scaled, max_tokens=64, with_language=True)
    tiny_model().model.save_pretrained(tmp_path / "rewards")
    with pytest.raises(ModelLoadError, match="need the head of a language model"):
        check_language_head(tmp_path / "rewards", LlamaConfig())
    causal_model().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    with pytest.raises(ModelLoadError, match=r"lacks weights for score\.weight"):
        load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64, with_language=True)
