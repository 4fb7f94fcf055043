"""Critique-out-loud models as scored: a critique first, then the reward, for one critique or the mean over several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.models import CONVERSATIONS, MAX_TOKENS, make_model, plain_reward
from tests.helpers.tokenizer import make_tokenizer
from transformers import LlamaForSequenceClassification

from rayward.config.placement import Placement
from rayward.contract.contract import Contract, GoldenScore
from rayward.contract.conversation import Completion
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.errors import ContractMismatchError, ModelLoadError
from rayward.model.generation import generate
from rayward.model.weights import head_sha256
from rayward.scoring import critiques
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.load import load_scored_model
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.wire.items import Asked, ItemError
from rayward.wire.native import build_reply

ITEM = ScoreItem(({"role": "user", "content": "Name a colour."},), ("Red.", "Blue, because the sky is blue."))


def write_model(directory: Path, *, with_head: bool = True, golden_shift: float = 0.0) -> Path:
    """A reward model that writes critiques: its language head prints a few letters, then the end token."""
    directory.mkdir(parents=True)
    tokenizer = make_tokenizer(directory)
    model = make_model(tokenizer)
    model.save_pretrained(directory)
    contract = Contract.from_tokenizer(tokenizer, max_tokens=MAX_TOKENS, critique_lead_in="Judge:")
    if with_head:
        tensors = load_file(directory / "model.safetensors")
        head = torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(2)) * 0.3
        head[2] *= 3.0  # the end token comes soon
        save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    golden = []
    for prompt, completion in CONVERSATIONS:
        ids = Encoder(contract, tokenizer).encode(prompt, completion, "Fine.")
        reward = plain_reward(model, ids) + golden_shift
        golden.append(GoldenScore(prompt=prompt, completion=completion, critique="Fine.", token_ids=tuple(ids), reward=(reward,)))
    contract.model_copy(update={"golden": tuple(golden), "head_sha256": head_sha256(model.state_dict())}).save(directory)
    return directory


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "critic")


@pytest.fixture(scope="module")
def scorer(export: Path) -> Scorer:
    return Scorer.load(export, device="cpu")


def expected_reward(export: Path, item: ScoreItem, text: Completion, critique: str) -> float:
    model = LlamaForSequenceClassification.from_pretrained(export).eval()
    encoder = Encoder(Contract.load(export), load_tokenizer(str(export)))
    return plain_reward(model, encoder.encode(item.prompt, text, critique))  # type: ignore[arg-type]


def test_the_reward_is_read_after_the_critique_that_comes_with_it(export: Path, scorer: Scorer) -> None:
    (result,) = scorer.score([ITEM])
    assert result.critiques is not None
    assert result.rewards is not None
    assert result.reward_std is None
    assert [len(texts) for texts in result.critiques] == [1, 1]
    for text, reward, (critique,) in zip(ITEM.completions, result.rewards, result.critiques, strict=True):
        assert reward == pytest.approx(expected_reward(export, ITEM, text, critique), abs=1e-4)
    (wire,) = build_reply("id", "model", "version", [result]).results
    assert wire.critiques == result.critiques
    assert scorer.facts.writes_critiques


def test_a_given_critique_is_not_written_anew(export: Path, scorer: Scorer) -> None:
    item = replace(ITEM, critiques=(("Short.",), ("Wordy.",)))
    (result,) = scorer.score([item])
    assert result.critiques == item.critiques
    assert result.rewards == pytest.approx(
        [expected_reward(export, ITEM, text, critique) for text, (critique,) in zip(ITEM.completions, item.critiques or (), strict=True)],
        abs=1e-4,
    )


def test_several_critiques_give_their_mean_and_spread(export: Path, scorer: Scorer) -> None:
    # So many that they differ whatever the model's version is, which seeds them and covers rewards that no two CPUs round alike.
    (result,) = scorer.score([replace(ITEM, asked=Asked(n_critiques=24, temperature=1.0))])
    assert result.critiques is not None
    assert result.reward_std is not None
    assert [len(set(texts)) > 1 for texts in result.critiques] == [True, True]
    for k, text in enumerate(ITEM.completions):
        rewards = [expected_reward(export, ITEM, text, critique) for critique in result.critiques[k]]
        assert result.rewards is not None
        assert result.rewards[k] == pytest.approx(statistics.fmean(rewards), abs=1e-4)
        assert result.reward_std[k] == pytest.approx(statistics.pstdev(rewards), abs=1e-4)


def test_the_same_request_gets_the_same_critiques_in_any_company(scorer: Scorer) -> None:
    asked = replace(ITEM, asked=Asked(n_critiques=2, temperature=0.7))
    (alone,) = scorer.score([asked])
    other = ScoreItem(({"role": "user", "content": "Something else entirely?"},), ("No.",))
    _, company = scorer.score([other, asked])
    assert company.critiques == alone.critiques
    assert company.rewards == pytest.approx(alone.rewards, abs=1e-5)
    (reseeded,) = scorer.score([replace(asked, seed=1)])
    assert reseeded.critiques != alone.critiques


def test_an_item_without_room_for_a_critique_fails_alone(scorer: Scorer) -> None:
    long = ScoreItem(({"role": "user", "content": "x" * 150},), ("No.",))
    first, second = scorer.score([long, ITEM])
    assert first.error is not None
    assert first.error.code == "too_long"
    assert second.rewards is not None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"with_head": False}, ModelLoadError, "need the head of a language model"),
        ({"golden_shift": 0.1}, ContractMismatchError, "golden scores: conversation 0"),
    ],
)
def test_a_damaged_model_does_not_start(tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scorer.load(write_model(tmp_path / "model", **settings), device="cpu")


def test_a_member_of_an_ensemble_writes_its_critiques(tmp_path: Path, export: Path, scorer: Scorer) -> None:
    (tmp_path / "ensemble.json").write_text(f'{{"rule": "mean", "members": ["{export}", "{export}"]}}')
    ensemble = load_scored_model(tmp_path, Placement(device="cpu"))
    assert isinstance(ensemble, Ensemble)
    (alone,), (together,) = scorer.score([ITEM]), ensemble.score([ITEM])
    assert together.rewards == pytest.approx(alone.rewards, abs=1e-5)
    (refused,) = ensemble.score([replace(ITEM, asked=Asked(n_critiques=2, temperature=1.0))])
    assert refused.error is not None
    assert refused.error.code == "no_critiques"


def test_an_item_whose_critique_cannot_be_written_fails_no_other(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = scorer.score([ITEM])
    other = ScoreItem(({"role": "user", "content": "Something else entirely?"},), ("No.",))
    (opening,) = scorer._writer._openings(other)  # type: ignore[union-attr]
    write = generate

    def raising(model: Any, openings: Sequence[Any], **settings: Any) -> list[list[int]]:
        if any(list(given.ids) == list(opening.ids) for given in openings):
            raise KeyError("the text of the item")
        return write(model, openings, **settings)

    monkeypatch.setattr(critiques, "generate", raising)
    bad, good = scorer.score([other, ITEM])
    assert bad.error == ItemError("failed", "KeyError in the forward")
    assert good.critiques == alone.critiques
    assert good.rewards == pytest.approx(alone.rewards, abs=1e-5)
