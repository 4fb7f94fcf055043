"""Process and outcome reward models as scored: every step's probability, and one reward of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.models import change_contract, make_export
from transformers import LlamaForSequenceClassification

from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.reading import Aggregate, RewardReadout
from rayward.contract.tokenizer import load_tokenizer
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.wire.items import Asked
from rayward.wire.native import build_reply

ITEMS = [
    ScoreItem(({"role": "user", "content": "How?"},), ("First this.|Then that.|Done.", "At once.", "One|two")),
    ScoreItem(({"role": "user", "content": "And how much of it, please?"},), ("a|b|c|d",)),
]


def export_with(directory: Path, reading: RewardReadout) -> Path:
    make_export(directory)
    change_contract(directory, reading=reading)
    return directory


@pytest.mark.parametrize("tokens_per_batch", [64, 8192])
@pytest.mark.parametrize("aggregate", ["last", "mean", "minimum", "product"])
def test_steps_are_read_at_their_ends(tmp_path: Path, tokens_per_batch: int, aggregate: Aggregate) -> None:
    directory = export_with(tmp_path / "model", RewardReadout(at="steps", separator="|", aggregate=aggregate))
    scorer = Scorer.load(directory, device="cpu", tokens_per_batch=tokens_per_batch)
    model = LlamaForSequenceClassification.from_pretrained(directory).eval()
    encoder = Encoder(Contract.load(directory), load_tokenizer(str(directory)))
    combine = {"last": lambda p: p[-1], "mean": lambda p: sum(p) / len(p), "minimum": min, "product": math.prod}[aggregate]
    results = scorer.score(ITEMS)
    for item, result in zip(ITEMS, results, strict=True):
        assert result.rewards is not None
        assert result.steps is not None
        assert result.outputs is None
        for text, reward, steps in zip(item.completions, result.rewards, result.steps, strict=True):
            encoding = encoder.encode_parts(item.prompt, text, separator="|")  # type: ignore[arg-type]
            assert encoding.step_ends is not None
            with torch.no_grad():
                logits = model.score(model.model(input_ids=torch.tensor([encoding.ids])).last_hidden_state[0])[:, 0]
            expected = logits[list(encoding.step_ends)].sigmoid().tolist()
            assert steps == pytest.approx(expected, abs=1e-5)
            assert len(steps) == text.count("|") + 1
            assert reward == pytest.approx(combine(expected), abs=1e-5)
    (wire, _) = build_reply("id", "model", "version", results).results
    assert wire.steps == results[0].steps


def test_every_token_of_the_completion_is_read(tmp_path: Path) -> None:
    directory = export_with(tmp_path / "model", RewardReadout(at="tokens", aggregate="mean_logit"))
    scorer = Scorer.load(directory, device="cpu")
    model = LlamaForSequenceClassification.from_pretrained(directory).eval()
    encoder = Encoder(Contract.load(directory), load_tokenizer(str(directory)))
    for item, result in zip(ITEMS, scorer.score(ITEMS), strict=True):
        assert result.steps is None
        for text, reward in zip(item.completions, result.rewards or (), strict=True):
            encoding = encoder.encode_parts(item.prompt, text)  # type: ignore[arg-type]
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([encoding.ids])).last_hidden_state[0]
                expected = model.score(hidden[encoding.text_start :]).mean().sigmoid().item()
            assert reward == pytest.approx(expected, abs=1e-5)


def test_a_model_without_critiques_refuses_to_write_some(tmp_path: Path) -> None:
    scorer = Scorer.load(make_export(tmp_path / "model"), device="cpu")
    (found,) = scorer.score([replace(ITEMS[1], asked=Asked(temperature=0.5, n_critiques=2))])
    assert found.error is not None
    assert found.error.code == "no_critiques"
