"""Every number of tests/helpers/fixtures.json that belongs to a loss, and the identities that hold between the methods."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.fixtures import FIXTURES
from torch import Tensor

from rayward.batch.comparison import Labels
from rayward.contract.contract import Normaliser
from rayward.contract.weight_sets import WEIGHT_SETS
from rayward.evaluation.statistics import ELO_PER_REWARD, PairSums
from rayward.objectives.base import ObjectiveSettings
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.rankings import PlackettLuceObjective
from rayward.objectives.ratings import RegressionObjective
from rayward.objectives.table import Objective

UNIT = Path(__file__).parents[1]
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
GAPS = np.linspace(-12.0, 12.0, 97)

TESTED_BY = {
    "rb1_rows": "evaluation/test_benchmarks.py::test_published_rewardbench_rows",
    "rb1_sections": "evaluation/test_benchmarks.py::test_subsets_sections_and_counts_are_the_published_ones",
    "rb1_counts_fixed": "evaluation/test_benchmarks.py::test_subsets_sections_and_counts_are_the_published_ones",
    "rb1_counts_legacy": "evaluation/test_benchmarks.py::test_subsets_sections_and_counts_are_the_published_ones",
    "rb1_exact": "evaluation/test_benchmarks.py::test_the_exact_row_from_its_pairs",
    "rb1_weights": "evaluation/test_benchmarks.py::test_the_share_of_sections_and_prior_sets",
    "rb2_rows": "evaluation/test_benchmarks.py::test_published_rewardbench2_rows",
    "rb2_ties": "evaluation/test_benchmarks.py::test_the_ties_domain",
    "judgebench_rows": "evaluation/test_benchmarks.py::test_published_judgebench_rows",
    "judgebench_n": "evaluation/test_benchmarks.py::test_published_judgebench_rows",
    "helpsteer2pref_rows": "evaluation/test_benchmarks.py::test_later_papers_report_the_mean_of_the_four_sections",
    "bt": "objectives/test_identities.py::test_bradley_terry",
    "margin_at_1.5": "objectives/test_identities.py::test_margins",
    "scaled_at_1.5": "objectives/test_identities.py::test_scaled",
    "kwise": "objectives/test_identities.py::test_rankings",
    "centering": "objectives/test_identities.py::test_centering",
    "masked_mse": "objectives/test_identities.py::test_masked_squared_error",
    "armo": "workflows/test_mixture.py::test_the_score_by_hand",
    "nemotron": "config/test_recipes.py::test_the_340b_recipe_has_the_published_number_of_parameters",
    "rpo": "objectives/test_identities.py::test_the_distance_of_two_gaps_is_smoothed_bradley_terry_up_to_a_constant",
    "hs2": "objectives/test_identities.py::test_published_attribute_weights",
    "orm": "objectives/test_correctness.py::test_the_published_variants_of_the_outcome_loss",
}
"""Key of the fixtures to the test that reproduces it."""


def test_every_fixture_has_its_test() -> None:
    assert set(TESTED_BY) == set(FIXTURES)
    for place in TESTED_BY.values():
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}\(", (UNIT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), place


def column(*rewards: float) -> Tensor:
    return torch.tensor(rewards, dtype=torch.float32)[:, None].requires_grad_()


def ranked(*ranks: float, margin: float = math.nan, strength: float = math.nan) -> Labels:
    return Labels(ranks=np.array(ranks, dtype=np.float32), margin=margin, strength=strength)


def mean_loss(outputs: Tensor, labels: list[Labels], config: ObjectiveSettings, attributes: tuple[str, ...] = ()) -> Tensor:
    objective = Objective(config, attributes)
    return objective.loss(outputs, labels).loss_sum / objective.count(labels)


def pair_loss(gap: float, **settings: Any) -> float:
    label = ranked(0, 1, margin=settings.pop("margin_value", math.nan), strength=settings.pop("strength", math.nan))
    return mean_loss(column(gap, 0.0), [label], BradleyTerryObjective(**settings)).item()


def gradient(outputs: Tensor, labels: list[Labels], config: ObjectiveSettings) -> list[float]:
    mean_loss(outputs, labels, config).backward()
    assert outputs.grad is not None
    return outputs.grad.flatten().tolist()


# ---- the fixtures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "expected"), FIXTURES["bt"].items())
def test_bradley_terry(gap: str, expected: float) -> None:
    # At a gap of 100 the loss is below the smallest normal fp32 number.
    assert pair_loss(float(gap)) == pytest.approx(expected, rel=2e-6, abs=1e-38)


@pytest.mark.parametrize(("margin", "expected"), FIXTURES["margin_at_1.5"].items())
def test_margins(margin: str, expected: float) -> None:
    assert pair_loss(1.5, margin_value=float(Fraction(margin))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("strength", "expected"), FIXTURES["scaled_at_1.5"].items())
def test_scaled(strength: str, expected: float) -> None:
    assert pair_loss(1.5, scale="strength", strength=float(strength)) == pytest.approx(expected, rel=1e-6)


def test_rankings() -> None:
    known = FIXTURES["kwise"]
    label = [ranked(*range(len(known["r"])))]
    whole, pairs = PlackettLuceObjective(reduction="sum"), BradleyTerryObjective()
    assert mean_loss(column(*known["r"]), label, whole).item() == pytest.approx(known["pl"], rel=1e-6)
    assert gradient(column(*known["r"]), label, whole) == pytest.approx(known["pl_grad"], abs=2e-7)
    assert mean_loss(column(*known["r"]), label, pairs).item() == pytest.approx(known["allpairs_mean"], rel=1e-6)
    assert gradient(column(*known["r"]), label, pairs) == pytest.approx(known["allpairs_grad"], abs=2e-7)
    for size, expected in known["equal"].items():
        assert mean_loss(column(*[0.3] * int(size)), [ranked(*range(int(size)))], whole).item() == pytest.approx(expected, rel=1e-6)


def test_centering() -> None:
    known = FIXTURES["centering"]
    config = BradleyTerryObjective(center_coefficient=known["eta"])
    assert mean_loss(column(known["rc"], known["rr"]), [ranked(0, 1)], config).item() == pytest.approx(known["loss"], rel=1e-6)


def test_masked_squared_error() -> None:
    known = FIXTURES["masked_mse"]
    ratings = np.array(known["label"], dtype=np.float32)
    ratings[ratings == -100] = np.nan
    labels = [Labels(attributes=row[None]) for row in ratings]
    outputs = torch.tensor(known["pred"], dtype=torch.float32)
    assert Objective(RegressionObjective(), ATTRIBUTES).count(labels) == known["n"]
    assert mean_loss(outputs, labels, RegressionObjective(), ATTRIBUTES).item() == pytest.approx(known["loss"], rel=1e-6)


def test_published_attribute_weights() -> None:
    known = FIXTURES["hs2"]
    for name, size in (("helpsteer2_llama3_70b", "70"), ("helpsteer2_nemotron4_340b", "340")):
        assert [WEIGHT_SETS[name][attribute] for attribute in ATTRIBUTES] == known[f"w{size}"]
        weights = np.array(RegressionObjective(weights=name).reward_weights(ATTRIBUTES))
        assert np.array([known["chosen"], known["rejected"]]) @ weights == pytest.approx(known[f"s{size}"], abs=1e-9)


def test_the_distance_of_two_gaps_is_smoothed_bradley_terry_up_to_a_constant() -> None:
    # Reward-aware preference optimisation (arXiv 2406.11704) trains policies with the divergence of sigma(b) from sigma(a): cross-entropy
    # with target sigma(b), less the entropy of sigma(b), in which no gradient is.
    known = FIXTURES["rpo"]
    target = 1.0 / (1.0 + math.exp(-known["b"]))
    entropy = -target * math.log(target) - (1.0 - target) * math.log(1.0 - target)
    assert pair_loss(known["a"], label_smoothing=1.0 - target) - entropy == pytest.approx(known["loss"], abs=2e-7)
    assert pair_loss(known["b"], label_smoothing=1.0 - target) - entropy == pytest.approx(0.0, abs=2e-7)
    assert gradient(column(known["b"], 0.0), [ranked(0, 1)], BradleyTerryObjective(label_smoothing=1.0 - target)) == pytest.approx(
        [0.0, 0.0], abs=1e-7
    )


# ---- identities -----------------------------------------------------------------------------------------------------


def test_the_loss_of_a_pair_is_positive_falls_and_is_convex() -> None:
    losses = np.array([pair_loss(float(gap)) for gap in GAPS], dtype=np.float64)
    assert (losses > 0).all()
    assert (np.diff(losses) < 0).all()
    assert (np.diff(losses, 2) > -1e-6).all()
    # Turning a pair round costs what its gap says: L(d) - L(-d) = -d.
    assert losses - losses[::-1] == pytest.approx(-GAPS, abs=2e-6)


@pytest.mark.parametrize("gap", [-3.0, 0.0, 1.5])
def test_a_margin_shifts_the_gap_and_a_scale_multiplies_loss_and_gradient(gap: float) -> None:
    for amount in (1.0, 2.0, 3.0):
        assert pair_loss(gap, margin_value=amount) == pytest.approx(pair_loss(gap - amount), rel=1e-6)
        assert pair_loss(gap, scale="strength", strength=amount) == pytest.approx(amount * pair_loss(gap), rel=1e-6)
        scaled = gradient(column(gap, 0.0), [ranked(0, 1, strength=amount)], BradleyTerryObjective(scale="strength"))
        regular = gradient(column(gap, 0.0), [ranked(0, 1)], BradleyTerryObjective())
        assert scaled == pytest.approx([amount * slope for slope in regular], rel=1e-6)


def test_the_gradient_of_a_ranking_is_the_mean_of_its_pairs() -> None:
    rewards = [2.0, 1.0, 0.5, -1.0, 0.25]
    mean, pairs = np.zeros(len(rewards)), [(i, j) for i in range(5) for j in range(i + 1, 5)]
    for better, worse in pairs:
        slopes = gradient(column(rewards[better], rewards[worse]), [ranked(0, 1)], BradleyTerryObjective())
        mean[[better, worse]] += np.array(slopes) / len(pairs)
    assert gradient(column(*rewards), [ranked(*range(5))], BradleyTerryObjective()) == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize("difference", [-2.0, 0.0, 1.0, 3.0])
def test_a_unit_of_reward_in_elo_points(difference: float) -> None:
    # Both scales say the same probability of a win; a difference of 1 is .7310585786.
    by_elo = 1.0 / (1.0 + 10.0 ** (-ELO_PER_REWARD * difference / 400.0))
    assert by_elo == pytest.approx(math.exp(-pair_loss(difference)), abs=1e-6)
    assert pytest.approx(173.71779, abs=5e-6) == ELO_PER_REWARD
    assert 1.0 / (1.0 + math.exp(-1.0)) == pytest.approx(0.7310585786, abs=1e-10)


def test_rewards_centred_on_their_reference_have_mean_zero_and_the_same_gaps() -> None:
    rewards = np.random.default_rng(0).normal(3.0, 2.0, 500)
    normaliser = Normaliser(mean=float(rewards.mean()), std=float(rewards.std()), num_rewards=500, reference="test")
    centred, standardised = (np.array([normaliser.apply(float(r), scale) for r in rewards]) for scale in ("centred", "standardised"))
    assert centred.mean() == pytest.approx(0.0, abs=1e-12)
    assert np.diff(centred) == pytest.approx(np.diff(rewards), abs=1e-12)
    assert (standardised.mean(), standardised.std()) == pytest.approx((0.0, 1.0), abs=1e-12)


def test_judgements_turned_round_mirror_the_accuracy() -> None:
    differences = np.array([1.0, -2.0, 0.0, 0.5, 3.0])
    right, turned = PairSums.of(differences), PairSums.of(-differences)
    assert turned.accuracy == pytest.approx(1.0 - right.accuracy - right.num_ties / right.num_pairs)
    assert turned.accuracy_ties_half == pytest.approx(1.0 - right.accuracy_ties_half)
