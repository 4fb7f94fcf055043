"""Scoring on CUDA: the rewards of the CPU, at every token too, and bitwise the same in any company where that is asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.helpers.models import make_export

from rayward.scoring.scorer import ScoreItem, Scorer


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # FlexAttention wants heads of 16 numbers at least.
    return make_export(tmp_path_factory.mktemp("models") / "tiny", hidden_size=64)


def make_items(number: int, *, trace: bool = False) -> list[ScoreItem]:
    chance = random.Random(0)

    def text(longest: int) -> str:
        return "".join(chance.choice("abc de f") for _ in range(chance.randint(1, longest))).strip() or "a"

    return [
        ScoreItem(
            ({"role": "user", "content": text(60)},), tuple(f"{k}{text(30)}" for k in range(chance.randint(1, 6))), trace=trace
        )
        for _ in range(number)
    ]  # fmt: skip


def test_rewards_are_those_of_the_cpu(export: Path) -> None:
    items = make_items(200)
    wanted = Scorer.load(export, device="cpu").score(items)
    found = Scorer.load(export, device="cuda", tokens_per_batch=4096).score(items)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.rewards is not None
        assert ours.rewards == pytest.approx(theirs.rewards, abs=1e-4)


def test_a_trace_ends_in_the_reward(export: Path) -> None:
    for result in Scorer.load(export, device="cuda").score(make_items(20, trace=True)):
        assert result.rewards is not None
        assert result.traces is not None
        assert [trace.rewards[-1] for trace in result.traces] == pytest.approx(result.rewards, abs=1e-5)


def test_batch_invariant_rewards_are_bitwise_those_of_an_item_alone(export: Path) -> None:
    items = make_items(60)
    scorer = Scorer.load(export, device="cuda", batch_invariant=True)
    alone = [scorer.score([item])[0].rewards for item in items]
    for seed in range(3):
        order = random.Random(seed).sample(range(len(items)), len(items))
        together = scorer.score([items[index] for index in order])
        assert [result.rewards for result in together] == [alone[index] for index in order]
