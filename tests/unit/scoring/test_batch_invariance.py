"""Batch-invariant scoring: bitwise the same reward in any company, on every kind of model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.architectures import make_architecture
from tests.helpers.models import make_export
from tests.helpers.tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from rayward.config.placement import Placement
from rayward.config.scoring import ReplicaConfig
from rayward.contract.tokenizer import load_tokenizer
from rayward.scoring.load import load_scored_model
from rayward.scoring.units import UnitModel
from rayward.wire.items import ScoreItem

INVARIANT = Placement(device="cpu", batch_invariant=True, tokens_per_batch=512)
WORDS = ("red", "blue", "green", "count", "to", "three", "the", "sky", "is", "of", "course", "not", "42")


def an_item(generator: random.Random) -> ScoreItem:
    def text(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))

    return ScoreItem(({"role": "user", "content": text(20)},), tuple(text(15) for _ in range(generator.randint(1, 4))))


def export(root: Path) -> Path:
    return make_export(root / "export")


def foreign(name: str, root: Path) -> Path:
    directory = make_export(root / name)
    (directory / "contract.json").unlink()
    (directory / "model.safetensors").unlink()
    make_architecture(name, vocab_size=len(load_tokenizer(str(directory)))).save_pretrained(directory)
    return directory


def ensemble(root: Path) -> Path:
    for seed in range(2):
        make_export(root / f"m{seed}", seed=seed)
    (root / "ensemble").mkdir()
    (root / "ensemble" / "ensemble.json").write_text(json.dumps({"rule": "mean", "members": ["../m0", "../m1"]}))
    return root / "ensemble"


def implicit(root: Path) -> Path:
    for seed, name in enumerate(("policy", "reference")):
        (root / name).mkdir()
        tokenizer = make_tokenizer(root / name)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    (root / "rule").mkdir()
    (root / "rule" / "implicit.json").write_text(json.dumps({"policy": "../policy", "reference": "../reference"}))
    return root / "rule"


KINDS: dict[str, Callable[[Path], Path]] = {
    "export": export,
    "bert": lambda root: foreign("bert", root),
    "gemma2": lambda root: foreign("gemma2", root),
    "ensemble": ensemble,
    "implicit": implicit,
}


def rewards_by_text(model: UnitModel, items: list[ScoreItem]) -> dict[tuple[str, str], float]:
    found = {}
    for item, result in zip(items, model.score(items), strict=True):
        assert result.rewards is not None
        for text, reward in zip(item.completions, result.rewards, strict=True):
            found[str(item.prompt), str(text)] = reward
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_is_bitwise_the_same_in_any_company(tmp_path: Path, kind: str) -> None:
    model = load_scored_model(KINDS[kind](tmp_path), INVARIANT)
    generator = random.Random(kind)
    items = [an_item(generator) for _ in range(8)]
    expected = rewards_by_text(model, items)
    for _ in range(6):
        company = [an_item(generator) for _ in range(generator.randint(0, 4))]
        chosen = generator.sample(items, generator.randint(1, len(items)))
        # Other siblings too: completions come and go and change their places.
        parts = []
        for item in chosen:
            kept = generator.sample(item.completions, generator.randint(1, len(item.completions)))
            parts.append(replace(item, completions=tuple(kept)))
        mixed = [*parts, *company]
        generator.shuffle(mixed)
        found = rewards_by_text(model, mixed)
        shared = found.keys() & expected.keys()
        assert len(shared) >= len(parts) / 2
        assert {key: found[key] for key in shared} == {key: expected[key] for key in shared}


def test_it_computes_every_completion_by_itself_and_says_so(tmp_path: Path) -> None:
    directory = export(tmp_path)
    item = ScoreItem(({"role": "user", "content": "p" * 80},), ("a", "b", "c"))
    (invariant,) = load_scored_model(directory, INVARIANT).score([item])
    (shared,) = load_scored_model(directory, Placement(device="cpu")).score([item])
    assert invariant.tokens_computed == invariant.tokens == shared.tokens > shared.tokens_computed
    assert invariant.rewards == pytest.approx(shared.rewards, abs=1e-5)
    assert len(load_scored_model(directory, INVARIANT).encode_item(item).units) == 3


def test_a_replica_is_asked_for_it_by_its_configuration() -> None:
    assert ReplicaConfig(batch_invariant=True).placement.batch_invariant
    assert not ReplicaConfig().placement.batch_invariant
