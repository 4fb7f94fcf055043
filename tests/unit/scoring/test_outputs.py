"""A head with several outputs: how they become a reward, and what a request may ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.models import make_export, plain_outputs
from transformers import LlamaForSequenceClassification

from rayward.contract.contract import Contract, Normaliser
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.contract.weight_sets import WEIGHT_SETS
from rayward.errors import ContractMismatchError, ModelLoadError
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.wire.items import Asked
from rayward.wire.native import build_reply

OUTPUTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
WEIGHTS = (0.2, 0.5, 0.0, 0.0, -0.3)
ITEM = ScoreItem(({"role": "user", "content": "Name a colour."},), ("Red.", "Blue, because the sky is blue."))


def asking(**options: Any) -> ScoreItem:
    return replace(ITEM, asked=Asked(**options))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "rated", outputs=OUTPUTS, reward_weights=WEIGHTS)


@pytest.fixture(scope="module")
def scorer(export: Path) -> Scorer:
    return Scorer.load(export, device="cpu")


@pytest.fixture(scope="module")
def expected(export: Path) -> list[tuple[float, ...]]:
    """All outputs of both completions from plain Transformers."""
    model = LlamaForSequenceClassification.from_pretrained(export).eval()
    encoder = Encoder(Contract.load(export), load_tokenizer(str(export)))
    return [plain_outputs(model, encoder.encode(ITEM.prompt, text)) for text in ITEM.completions]  # type: ignore[arg-type]


def combined(outputs: list[tuple[float, ...]], weights: tuple[float, ...]) -> list[float]:
    return [sum(weight * value for weight, value in zip(weights, row, strict=True)) for row in outputs]


def test_the_reward_is_the_weighted_sum_and_the_outputs_come_with_it(scorer: Scorer, expected: list[tuple[float, ...]]) -> None:
    (result,) = scorer.score([ITEM])
    assert result.rewards == pytest.approx(combined(expected, WEIGHTS), abs=1e-5)
    assert result.outputs is not None
    for found, row in zip(result.outputs, expected, strict=True):
        assert found == pytest.approx(row, abs=1e-5)
    (wire,) = build_reply("id", "model", "version", [result]).results
    assert wire.outputs == result.outputs


def test_a_request_may_choose_a_published_weight_set(scorer: Scorer, expected: list[tuple[float, ...]]) -> None:
    assert scorer.facts.weight_sets == tuple(WEIGHT_SETS)
    for name, weights in WEIGHT_SETS.items():
        (result,) = scorer.score([asking(weights=name)])
        assert result.rewards == pytest.approx(combined(expected, tuple(weights.get(output, 0.0) for output in OUTPUTS)), abs=1e-5)


def test_items_with_different_wishes_share_a_call(scorer: Scorer) -> None:
    wishes = [
        ITEM,
        asking(weights="helpsteer2_goodness"),
        asking(weights="nonsense"),
        asking(normalise="centred"),
    ]
    plain, good, unknown, centred = scorer.score(wishes)
    assert plain.rewards != good.rewards
    assert unknown.rewards is None
    assert unknown.error is not None
    assert (unknown.error.code, "helpsteer2_goodness" in unknown.error.message) == ("unknown_weights", True)
    assert centred.rewards is None
    assert centred.error is not None
    assert centred.error.code == "no_normaliser"


def test_normalised_rewards_use_the_contracts_statistics_and_leave_the_version_alone(scorer: Scorer, export: Path) -> None:
    contract = Contract.load(export)
    normaliser = Normaliser(mean=0.75, std=0.5, num_rewards=100, reference="test")
    contract.model_copy(update={"normaliser": normaliser}).save(export)
    try:
        with_statistics = Scorer.load(export, device="cpu")
    finally:
        contract.save(export)
    assert with_statistics.version == scorer.version
    raw, centred, standardised = with_statistics.score([ITEM, asking(normalise="centred"), asking(normalise="standardised")])
    assert raw.rewards is not None
    assert centred.rewards == pytest.approx([reward - 0.75 for reward in raw.rewards])
    assert standardised.rewards == pytest.approx([(reward - 0.75) / 0.5 for reward in raw.rewards])
    assert raw.rewards == pytest.approx(scorer.score([ITEM])[0].rewards, abs=1e-5)


def test_every_output_is_verified_against_its_golden_score(export: Path, tmp_path: Path) -> None:
    contract = Contract.load(export)
    first = contract.golden[0]
    bent = first.model_copy(update={"reward": (*first.reward[:4], first.reward[4] + 0.1)})
    contract.model_copy(update={"golden": (bent, *contract.golden[1:])}).save(export)
    try:
        with pytest.raises(ContractMismatchError, match=r"conversation 0 scores .* in verbosity"):
            Scorer.load(export, device="cpu")
    finally:
        contract.save(export)


def test_a_contract_needs_a_weight_for_every_output(export: Path) -> None:
    with pytest.raises(ValueError, match="reward_weights has 1 weights for 5 outputs"):
        Contract.model_validate({**Contract.load(export).model_dump(), "reward_weights": (1.0,)})


def test_several_outputs_without_a_contract_are_no_reward(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "foreign", outputs=("a", "b"), reward_weights=(0.5, 0.5))
    (directory / "contract.json").unlink()
    with pytest.raises(ModelLoadError, match=r"2 outputs and no contract\.json"):
        Scorer.load(directory, device="cpu")
