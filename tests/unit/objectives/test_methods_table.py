"""Plackett-Luce, attribute regression, margins by strength, scaled Bradley-Terry, the safety term; and what holds for every method."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from rayward.batch.comparison import Labels
from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.contract.reading import Place
from rayward.contract.weight_sets import WEIGHT_SETS
from rayward.errors import ConfigError
from rayward.objectives.base import LabelFacts, ObjectiveSettings
from rayward.objectives.correctness import OutcomeObjective, ProcessObjective
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.rankings import PlackettLuceObjective
from rayward.objectives.ratings import RegressionObjective
from rayward.objectives.sums import METRIC_SUMS, reads_of
from rayward.objectives.table import OBJECTIVES, Objective

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def ranked(*ranks: float, strength: float = math.nan, weight: float = 1.0, attributes: Any = None) -> Labels:
    rated = None if attributes is None else np.array(attributes, dtype=np.float32)
    return Labels(ranks=np.array(ranks, dtype=np.float32), strength=strength, weight=weight, attributes=rated)


def column(*rewards: float) -> Tensor:
    return torch.tensor(rewards, dtype=torch.float32)[:, None].requires_grad_()


def mean_loss(outputs: Tensor, labels: list[Labels], config: ObjectiveSettings, attributes: tuple[str, ...] = ()) -> Tensor:
    objective = Objective(config, attributes)
    return objective.loss(outputs, labels).loss_sum / objective.count(labels)


def gradient(outputs: Tensor, labels: list[Labels], config: ObjectiveSettings) -> list[float]:
    mean_loss(outputs, labels, config).backward()
    assert outputs.grad is not None
    return outputs.grad.flatten().tolist()


# ---- Bradley-Terry by strength --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "strength", "expected"),
    [
        ("none", 3.0, 0.2014132780), ("column", 3.0, 0.2014132780),
        ("small", 0.0, 0.2014132780), ("small", 1.0, 0.2710977272), ("small", 2.0, 0.3608848159), ("small", 3.0, 0.4740769842),
        ("large", 1.0, 0.4740769842), ("large", 2.0, 0.9740769842), ("large", 3.0, 1.7014132780), ("strength", 2.0, 0.9740769842),
    ],
)  # fmt: skip
def test_margins_by_strength(table: str, strength: float, expected: float) -> None:
    config = BradleyTerryObjective.model_validate({"margin": table})
    assert mean_loss(column(1.5, 0.0), [ranked(0, 1, strength=strength)], config).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("strength", "expected"), [(1.0, 0.2014132780), (2.0, 0.4028265560), (3.0, 0.6042398339)])
def test_scaled_bradley_terry(strength: float, expected: float) -> None:
    scaled = BradleyTerryObjective(scale="strength")
    assert mean_loss(column(1.5, 0.0), [ranked(0, 1, strength=strength)], scaled).item() == pytest.approx(expected, rel=1e-6)
    # The mean is over pairs, not over summed strengths; the strength is inside the product.
    both = mean_loss(column(1.5, 0.0, 0.0, 1.5), [ranked(0, 1, strength=strength), ranked(0, 1, strength=1.0)], scaled).item()
    assert both == pytest.approx((expected + 1.7014132780) / 2, rel=1e-6)


def test_scaled_by_one_is_no_margin_is_regular_bit_for_bit() -> None:
    pair = [ranked(0, 1, strength=1.0)]
    regular = mean_loss(column(1.5, 0.0), pair, BradleyTerryObjective())
    assert torch.equal(mean_loss(column(1.5, 0.0), pair, BradleyTerryObjective(scale="strength")), regular)
    assert torch.equal(mean_loss(column(1.5, 0.0), pair, BradleyTerryObjective(margin="none")), regular)


def test_the_safety_term_is_the_mean_cross_entropy_of_a_comparison() -> None:
    config = BradleyTerryObjective(safety_coefficient=0.5, safety_attribute="is_safe")
    labels = [ranked(0, 1, attributes=[[1.0], [0.0]]), ranked(0, 1, attributes=[[math.nan], [1.0]], weight=3.0), ranked(0, 1)]
    rewards = column(1.0, -2.0, 0.5, 0.25, 1.0, 0.0)
    extra = mean_loss(rewards, labels, config, ("is_safe",)) - mean_loss(rewards, labels, BradleyTerryObjective())
    softplus = np.logaddexp(0.0, [-1.0, -2.0, -0.25])  # safe at +1, unsafe at -2, safe at 0.25
    assert extra.item() == pytest.approx(0.5 * ((softplus[0] + softplus[1]) / 2 + 3 * softplus[2]) / 5, rel=1e-5)


# ---- Plackett-Luce ------------------------------------------------------------------------------------------------


def test_plackett_luce_by_hand() -> None:
    # Stages of [2, 1, .5, -1]: .4951818981, .5549569196, .2014132780, 0.
    total = PlackettLuceObjective(reduction="sum")
    rewards = column(2.0, 1.0, 0.5, -1.0)
    assert mean_loss(rewards, [ranked(0, 1, 2, 3)], total).item() == pytest.approx(1.2515520957, rel=1e-6)
    assert mean_loss(rewards, [ranked(0, 1, 2, 3)], PlackettLuceObjective()).item() == pytest.approx(0.4171840319, rel=1e-6)
    assert gradient(rewards, [ranked(0, 1, 2, 3)], total) == pytest.approx([-0.39053996, -0.20169519, 0.30177082, 0.29046433], abs=1e-7)
    for stages, expected in ((1, 0.4951818981), (2, 1.0501388177), (9, 1.2515520957)):
        partial = PlackettLuceObjective(reduction="sum", top_m=stages)
        assert mean_loss(column(2.0, 1.0, 0.5, -1.0), [ranked(0, 1, 2, 3)], partial).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"), [(2, 0.6931471806), (3, 1.7917594692), (4, 3.1780538303), (7, 8.5251613611), (9, 12.8018274801)]
)
def test_equal_rewards_cost_the_logarithm_of_the_orders(size: int, expected: float) -> None:
    loss = mean_loss(column(*[0.7] * size), [ranked(*range(size))], PlackettLuceObjective(reduction="sum"))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gap", [-100.0, -1.5, 0.0, 1.5, 100.0])
def test_two_completions_are_a_bradley_terry_pair(gap: float) -> None:
    one, other = column(gap, 0.0), column(gap, 0.0)
    pair = [ranked(0, 1)]
    assert mean_loss(one, pair, PlackettLuceObjective()).item() == pytest.approx(
        mean_loss(other, pair, BradleyTerryObjective()).item(), abs=1e-6
    )
    assert gradient(one, pair, PlackettLuceObjective()) == pytest.approx(gradient(other, pair, BradleyTerryObjective()), abs=5e-7)


def _reference(rewards: npt.NDArray[np.float64], ranks: npt.NDArray[np.float64], ties: str) -> float:
    # In float64 and by the definition: each completion against all that are not ranked before it.
    keep = np.array([ties == "breslow" or (ranks == rank).sum() == 1 for rank in ranks])
    rewards, ranks = rewards[keep], ranks[keep]
    terms = [np.logaddexp.reduce(rewards[ranks >= rank]) - reward for reward, rank in zip(rewards, ranks, strict=True)]
    return float(sum(terms)) / (len(rewards) - 1) if len(rewards) > 1 else 0.0


@pytest.mark.parametrize("ties", ["breslow", "drop"])
def test_rankings_with_ties_against_the_definition(ties: str) -> None:
    generator = np.random.default_rng(0)
    config = PlackettLuceObjective.model_validate({"ties": ties})
    labels, rewards, expected, weights = [], [], 0.0, 0.0
    for _ in range(40):
        size, weight = int(generator.integers(2, 9)), float(generator.uniform(0.5, 2))
        ranks, values = generator.integers(0, 4, size).astype(np.float64), generator.normal(0, 3, size)
        labels.append(ranked(*ranks.tolist(), weight=weight))
        rewards.append(values)
        usable = ties == "breslow" or sum((ranks == rank).sum() == 1 for rank in ranks) > 1
        expected += weight * _reference(values, ranks, ties) * usable
        weights += weight * usable
    flat = torch.tensor(np.concatenate(rewards), dtype=torch.float32)[:, None]
    assert mean_loss(flat, labels, config).item() == pytest.approx(expected / weights, rel=1e-5)


# ---- regression ---------------------------------------------------------------------------------------------------


def test_masked_squared_error_by_hand() -> None:
    predictions = torch.tensor([[3, 2.5, 3.9, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.float32, requires_grad=True)
    nan = math.nan
    labels = [Labels(attributes=np.array([row], dtype=np.float32)) for row in ([4, nan, 4, 1, 2], [2, 2, nan, 1, 0])]
    loss = mean_loss(predictions, labels, RegressionObjective(), ATTRIBUTES)
    assert loss.item() == pytest.approx(0.62625, rel=1e-6)  # 5.01 / 8
    loss.backward()
    assert predictions.grad is not None
    assert torch.isfinite(predictions.grad).all()
    assert predictions.grad[0, 1] == 0.0


@pytest.mark.parametrize(
    ("name", "chosen", "rejected"), [("helpsteer2_llama3_70b", 6.965, 5.340), ("helpsteer2_nemotron4_340b", 5.530, 4.350)]
)
def test_published_weights_make_the_published_rewards(name: str, chosen: float, rejected: float) -> None:
    weights = np.array(RegressionObjective(weights=name).reward_weights(ATTRIBUTES))
    assert weights @ [3.6, 3.5, 3.7, 1.6, 1.8] == pytest.approx(chosen, abs=5e-4)
    assert weights @ [2.4, 2.6, 3.2, 1.2, 1.0] == pytest.approx(rejected, abs=5e-4)


def test_the_reward_that_the_metrics_judge_is_the_weighted_sum() -> None:
    outputs = torch.tensor([[1.0, 5.0], [2.0, 0.0]])
    labels = [ranked(0, 1, attributes=[[0, 0], [0, 0]])]
    for weights, correct in (({"a": 1.0}, 0.0), ({"b": 1.0}, 1.0), (None, 1.0)):
        config = RegressionObjective.model_validate({"weights": weights})
        sums = dict(zip(METRIC_SUMS, Objective(config, ("a", "b")).loss(outputs, labels).metrics.tolist(), strict=True))
        assert (sums["pairs"], sums["correct"]) == (1.0, correct)


# ---- outcome --------------------------------------------------------------------------------------------------------


def test_the_cross_entropy_of_a_label_by_hand() -> None:
    config = OutcomeObjective()
    one = [Labels(attributes=np.array([[1.0]], dtype=np.float32))]
    assert mean_loss(column(0.5), one, config, ("label",)).item() == pytest.approx(0.4740769842, rel=1e-6)
    several = [Labels(attributes=np.array([[1.0], [0.0], [math.nan]], dtype=np.float32)), *one]
    outputs = column(0.5, -1.0, 7.0, 2.0)
    expected = (np.logaddexp(0, -0.5) + np.logaddexp(0, -1.0) + np.logaddexp(0, -2.0)) / 3
    assert mean_loss(outputs, several, config, ("label",)).item() == pytest.approx(expected, rel=1e-6)
    soft = [Labels(attributes=np.array([[0.25]], dtype=np.float32))]
    assert mean_loss(column(1.0), soft, config, ("label",)).item() == pytest.approx(
        0.25 * np.logaddexp(0, -1) + 0.75 * np.logaddexp(0, 1), rel=1e-6
    )


# ---- every method -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "bradley_terry": [
        {}, {"balance": "pair", "label_smoothing": 0.05, "center_coefficient": 0.01}, {"margin": "large", "scale": "strength"},
        {"safety_coefficient": 0.3, "safety_attribute": "b"},
    ],
    "plackett_luce": [{}, {"reduction": "sum", "ties": "drop"}, {"top_m": 2}],
    "regression": [{}, {"weights": {"a": 1.0, "c": -0.5}}],
    "outcome": [{"attribute": "b"}, {"attribute": "b", "read": "tokens", "aggregate": "mean"}, {"attribute": "b", "read": "mean_logit"}],
    "process": [{}, {"aggregate": "product"}],
    "language": [{}],
}  # fmt: skip
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]


def test_every_method_of_the_table_is_tested_here() -> None:
    assert set(SETTINGS) == set(OBJECTIVES)


def _sample(seed: int, place: Place = "end") -> tuple[npt.NDArray[np.float32], list[Labels]]:
    generator = np.random.default_rng(seed)
    labels = []
    for _ in range(24):
        size = int(generator.integers(2, 7))
        ratings = generator.integers(0, 2, (size, 3)).astype(np.float32)
        ratings[generator.random((size, 3)) < 0.3] = np.nan
        ratings[0, 0] = 1.0
        label = ranked(
            *generator.integers(0, 4, size).tolist(),
            strength=float(generator.integers(1, 4)),
            weight=float(generator.uniform(0.1, 3)),
            attributes=ratings,
        )
        num_reads = tuple(generator.integers(1, 5, size).tolist())
        steps = tuple(np.where(generator.random(n) < 0.2, np.nan, generator.integers(0, 2, n)).astype(np.float32) for n in num_reads)
        labels.append(replace(label, step_labels=steps, num_reads=None if place == "end" else num_reads))
    return generator.normal(0, 2, (sum(reads_of(labels)), 3)).astype(np.float32), labels


def _objective(name: str, settings: dict[str, Any]) -> tuple[Objective, int]:
    config = OBJECTIVES[name].settings.model_validate(settings)
    attributes = ("a", "b", "c")
    return Objective(config, attributes), len(config.outputs(attributes))


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("seed", range(2))
def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient_nor_metrics(name: str, settings: dict[str, Any], seed: int) -> None:
    objective, num_outputs = _objective(name, settings)
    values, labels = _sample(seed, objective.config.place)
    outputs = torch.from_numpy(values[:, :num_outputs])
    count = objective.count(labels)
    whole = outputs.clone().requires_grad_()
    out = objective.loss(whole, labels)
    assert out.loss_sum.dtype == torch.float32
    assert out.metrics.dtype == torch.float64
    (out.loss_sum / count).backward()
    assert whole.grad is not None
    assert (whole.grad.abs().max() > 0) == (name != "language")
    starts = np.cumsum([0, *(sum(reads_of([label])) for label in labels)])
    for trial in range(4):
        cuts = np.sort(np.random.default_rng([seed, trial]).integers(0, len(labels) + 1, 4)).tolist()
        parts = outputs.clone().requires_grad_()
        loss_sum, counted, metrics = 0.0, 0.0, torch.zeros(len(METRIC_SUMS), dtype=torch.float64)
        for first, last in pairwise([0, *cuts, len(labels)]):
            piece = objective.loss(parts[starts[first] : starts[last]], labels[first:last])
            (piece.loss_sum / count).backward()
            loss_sum, counted, metrics = (
                loss_sum + piece.loss_sum.item(),
                counted + objective.count(labels[first:last]),
                metrics + piece.metrics,
            )
        assert counted == pytest.approx(count, rel=1e-12)
        assert loss_sum == pytest.approx(out.loss_sum.item(), rel=1e-5)
        torch.testing.assert_close(metrics, out.metrics, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_order_of_the_completions_does_not_matter(name: str, settings: dict[str, Any]) -> None:
    objective, num_outputs = _objective(name, settings)
    values, labels = _sample(5, objective.config.place)
    outputs = torch.from_numpy(values[:, :num_outputs])
    generator, permuted, shuffled, start = np.random.default_rng(1), [], [], 0
    for label in labels:
        assert label.ranks is not None
        assert label.attributes is not None
        order = generator.permutation(label.num_completions)
        assert label.step_labels is not None
        steps, reads = tuple(label.step_labels[i] for i in order), reads_of([label])
        moved = replace(label, ranks=label.ranks[order], attributes=label.attributes[order], step_labels=steps)
        permuted.append(moved if label.num_reads is None else replace(moved, num_reads=tuple(reads[i] for i in order)))
        pieces = torch.split(outputs[start : start + sum(reads)], reads)
        shuffled.append(torch.cat([pieces[i] for i in order]))
        start += sum(reads)
    reference = objective.loss(outputs, labels)
    found = objective.loss(torch.cat(shuffled), permuted)
    assert found.loss_sum.item() == pytest.approx(reference.loss_sum.item(), rel=1e-5)
    torch.testing.assert_close(found.metrics, reference.metrics, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_an_empty_micro_batch_is_exactly_zero_and_reaches_the_parameters(name: str, settings: dict[str, Any]) -> None:
    objective, num_outputs = _objective(name, settings)
    head = torch.nn.Linear(4, num_outputs)
    out = objective.loss(head(torch.zeros(0, 4)), [])
    assert out.loss_sum.item() == 0.0
    assert out.metrics.tolist() == [0.0] * len(METRIC_SUMS)
    out.loss_sum.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() == 0
    assert objective.count([]) == 0.0


@pytest.mark.parametrize("name", ["bradley_terry", "plackett_luce"])
def test_a_constant_added_to_all_rewards_changes_nothing(name: str) -> None:
    objective, _ = _objective(name, {})
    values, labels = _sample(3)
    outputs = torch.from_numpy(values[:, :1])
    assert objective.loss(outputs + 4.0, labels).loss_sum.item() == pytest.approx(objective.loss(outputs, labels).loss_sum.item(), rel=1e-5)


# ---- settings and data that contradict each other -------------------------------------------------------------------

FACTS = LabelFacts(attributes=("helpfulness",), weakest=1.0, strongest=3.0)


@pytest.mark.parametrize(
    ("config", "facts", "message"),
    [
        (BradleyTerryObjective(), LabelFacts(num_unranked=3), "3 rows have none.*data.rank_by"),
        (PlackettLuceObjective(), LabelFacts(num_unranked=1), "plackett_luce learns from rankings"),
        (BradleyTerryObjective(margin="small"), LabelFacts(num_without_strength=2), "objective.margin=small needs the strength.*2 rows"),
        (BradleyTerryObjective(scale="strength"), LabelFacts(num_without_strength=2), "objective.scale=strength needs"),
        (BradleyTerryObjective(margin="large"), LabelFacts(weakest=1.0, strongest=9.5), "the data has 9.5"),
        (BradleyTerryObjective(scale="strength"), LabelFacts(weakest=0.0, strongest=3.0), "strength 0.*data.ties=quarantine"),
        (BradleyTerryObjective(safety_coefficient=1.0), FACTS, "no attribute 'is_safe'.*helpfulness"),
        (RegressionObjective(), LabelFacts(), "data.attributes is empty"),
        (RegressionObjective(), LabelFacts(attributes=("a",), num_unrated=4), "4 rows have none of a"),
        (RegressionObjective(weights="helpsteer2_goodness"), FACTS, "coherence, correctness.*data.attributes"),
        (OutcomeObjective(), FACTS, "learns the attribute 'label'.*helpfulness"),
        (OutcomeObjective(attribute="a"), LabelFacts(attributes=("a",), num_unrated=2), "2 rows have none"),
        (ProcessObjective(), LabelFacts(num_without_steps=2), "2 rows have none.*stepwise"),
        (PlackettLuceObjective(), LabelFacts(num_with_shares=3), "3 rows have shares of votes.*data.votes=majority"),
        (RegressionObjective(weights="best"), FACTS, "weight set 'best' is not known.*helpsteer2_goodness"),
    ],
)  # fmt: skip
def test_data_that_cannot_teach_the_objective_is_refused(config: ObjectiveSettings, facts: LabelFacts, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        config.check(facts)


def test_data_that_can_is_accepted() -> None:
    for config in (
        BradleyTerryObjective(margin="large", scale="strength"),
        PlackettLuceObjective(),
        RegressionObjective(weights={"helpfulness": 1.0}),
    ):
        config.check(FACTS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": {"type": "hinge"}}, "objective.type is 'hinge'.*bradley_terry, plackett_luce, regression, outcome"),
        ({"objective": {"type": "plackett_luce", "label_smoothing": 0.1}}, "objective.label_smoothing = 0.1: unknown key.*top_m"),
        ({"objective": {"type": "plackett_luce", "ties": "efron"}}, "objective.ties = 'efron'"),
        ({"objective": {"type": "regression"}}, "data.attributes is empty"),
        ({"objective": {"type": "regression", "weights": "best"}, "data": {"attributes": ["a"]}}, "weight set 'best' is not known"),
        ({"data": {"attributes": ["a", "a"]}}, "each name stands once"),
        ({"data": {"attributes": ["a"], "rank_by": "b"}}, "data.rank_by is 'b'"),
        ({"data": {"attributes": ["a"], "attribute_range": [4, 0]}}, "smallest < largest"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_config(values, Config)


def test_a_configuration_keeps_its_objective_through_json() -> None:
    values = {"objective": {"type": "plackett_luce", "top_m": 3}}
    config = parse_config(values, Config)
    again = Config.model_validate_json(config.model_dump_json())
    assert again.objective == PlackettLuceObjective(top_m=3)
    assert again == config


def test_published_sets_are_marked_where_they_are_tuned() -> None:
    assert set(WEIGHT_SETS) == {"helpsteer2_llama3_70b", "helpsteer2_nemotron4_340b", "helpsteer2_goodness"}
