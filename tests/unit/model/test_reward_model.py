from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.helpers.architectures import make_architecture
from tests.helpers.comparisons import make_comparison, random_comparisons
from torch import Tensor

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout, pack
from rayward.model.attention import ONE_CALL_TOKENS
from rayward.model.reward_model import RewardModel, to_tensors

CPU = torch.device("cpu")
SHARED = ["llama", "nemotron", "qwen2", "gpt2"]
COMPARISONS = [
    *random_comparisons(4, seed=5, longest=20, most=5),
    make_comparison("no prefix", 0, [4, 9]),
    make_comparison("one", 6, [3]),
    make_comparison("long", ONE_CALL_TOKENS, [12, 30, 7]),
    make_comparison("one token each", 5, [1, 2]),
]


def plain_rewards(name: str, comparisons: Sequence[EncodedComparison], **changes: Any) -> Tensor:
    """What plain Transformers gives, one unpadded conversation at a time."""
    import numpy as np

    model = make_architecture(name, **changes).eval()
    rows = [np.concatenate([c.prefix_ids, branch]) for c in comparisons for branch in c.branch_ids]
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.from_numpy(row).long()[None]).logits for row in rows])


def rewards_of(model: RewardModel, comparisons: Sequence[EncodedComparison]) -> Tensor:
    rewards = model(to_tensors(pack(comparisons, layout=model.layout), CPU))
    assert isinstance(rewards, Tensor)
    return rewards


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", SHARED)
def test_a_reward_is_that_of_the_conversation_alone(name: str, layout: Layout) -> None:
    model = RewardModel(make_architecture(name).eval(), max_tokens=1024, layout=layout)
    with torch.no_grad():
        rewards = rewards_of(model, COMPARISONS)
    expected = plain_rewards(name, COMPARISONS)
    assert rewards.dtype == torch.float32
    assert expected.std() > 0.1, "rewards that hardly differ would prove nothing"
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


def test_sharing_is_chosen_where_it_is_possible() -> None:
    assert RewardModel(make_architecture("llama"), max_tokens=64).layout == "packed"
    mistral = RewardModel(make_architecture("mistral"), max_tokens=64)
    assert mistral.layout == "padded"
    assert mistral.why_padded is not None


@pytest.mark.parametrize("name", ["mistral", "gemma2", "bert"])
def test_models_that_cannot_share_take_the_padded_way(name: str) -> None:
    model = RewardModel(make_architecture(name).eval(), max_tokens=1024)
    assert model.layout == "padded"
    with torch.no_grad():
        torch.testing.assert_close(rewards_of(model, COMPARISONS), plain_rewards(name, COMPARISONS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_packed_and_padded_have_the_same_gradients(name: str, checkpointing: bool) -> None:
    gradients: dict[str, dict[str, Tensor]] = {}
    layouts: tuple[Layout, ...] = ("packed", "padded")
    for layout in layouts:
        model = RewardModel(make_architecture(name), max_tokens=1024, layout=layout).train()
        if checkpointing and layout == "packed":
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rewards = rewards_of(model, COMPARISONS)
        direction = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(0))
        (rewards * direction).sum().backward()
        gradients[layout] = {key: p.grad for key, p in model.model.named_parameters() if p.grad is not None}
        assert set(gradients[layout]) == {key for key, _ in model.model.named_parameters()}
    for key, packed in gradients["packed"].items():
        scale = gradients["padded"][key].abs().max().item()
        torch.testing.assert_close(packed, gradients["padded"][key], rtol=1e-4, atol=2e-5 * max(scale, 1e-3))


def test_siblings_and_neighbours_cannot_be_seen() -> None:
    model = RewardModel(make_architecture("llama").eval(), max_tokens=1024)
    first = make_comparison("a", 8, [5, 6])
    changed = EncodedComparison("a", first.prefix_ids, (first.branch_ids[0], first.branch_ids[1][::-1].copy()), first.labels)
    neighbour = make_comparison("b", 3, [4, 4])
    with torch.no_grad():
        one, two = rewards_of(model, [neighbour, first]), rewards_of(model, [neighbour, changed])
    torch.testing.assert_close(one[:3], two[:3], rtol=0, atol=1e-6)
    assert (one[3] - two[3]).abs() > 1e-2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_empty_micro_batch_contributes_exactly_nothing(layout: Layout) -> None:
    model = RewardModel(make_architecture("llama"), max_tokens=1024, layout=layout)
    rewards = rewards_of(model, [])
    assert rewards.shape == (0, 1)
    (rewards.sum() * 0.0).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None, "every parameter takes part, or ZeRO-3 would wait for ever"
        assert parameter.grad.abs().max() == 0


def test_the_head_is_computed_in_fp32_under_a_bf16_backbone() -> None:
    model = RewardModel(make_architecture("llama").to(torch.bfloat16).eval(), max_tokens=1024)
    seen: list[Tensor] = []
    model.backbone.register_forward_hook(lambda _m, _i, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        rewards = rewards_of(model, COMPARISONS)
        batch = pack(COMPARISONS)
        pooled = seen[0][batch.end_row, batch.end_column]
        expected = pooled.double() @ model.model.score.weight.double().T
    assert seen[0].dtype == torch.bfloat16
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards.double(), expected, rtol=1e-6, atol=1e-6)
    assert (rewards.to(torch.bfloat16).float() - rewards).abs().max() > 0, "bf16 could not even hold these values"


def test_several_outputs() -> None:
    model = RewardModel(make_architecture("llama", num_labels=3).eval(), max_tokens=1024)
    with torch.no_grad():
        rewards = rewards_of(model, COMPARISONS)
    torch.testing.assert_close(rewards, plain_rewards("llama", COMPARISONS, num_labels=3), rtol=1e-5, atol=1e-5)
    assert rewards.shape[1] == 3
