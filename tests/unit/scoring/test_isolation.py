"""One item cannot hurt another: poisoned items among good ones, each with an error of its own and nothing of its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.helpers.models import make_export

from rayward.contract.contract import Contract, Normaliser
from rayward.contract.encoder import Encoder
from rayward.contract.rendering import Rendered
from rayward.contract.tokenizer import load_tokenizer
from rayward.scoring.combining import EnsembleRule
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.isolation import together
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.wire.items import Asked, ItemError, ItemResult

CPU = torch.device("cpu")
POISON = "secret poison"


def item(prompt: str, *completions: str, **asked: Any) -> ScoreItem:
    return ScoreItem(({"role": "user", "content": prompt},), completions or ("Yes.", "No, never."), Asked(**asked))


GOOD = [item("Name a colour."), item("Count to three.", "1 2 3")]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


@pytest.fixture
def scorer(export: Path) -> Scorer:
    return Scorer.load(export, device="cpu")


def with_contract(export: Path, **changes: Any) -> Scorer:
    """The export's model under another contract, which it was not verified against."""
    contract = Contract.load(export)
    changed = Encoder(contract.model_copy(update=changes), load_tokenizer(str(export)))
    return Scorer(Scorer.load(export, device="cpu")._model, changed, model_id="m", version="v", tokens_per_batch=512)


def assert_only_the_poisoned_fails(scorer: Scorer, poisoned: ScoreItem, code: str, says: str = "") -> None:
    expected = [result.rewards for result in scorer.score(GOOD)]
    first, bad, second = scorer.score([GOOD[0], poisoned, GOOD[1]])
    for result, rewards in zip((first, second), expected, strict=True):
        assert result.rewards == pytest.approx(rewards, abs=1e-5)
    assert bad.error is not None
    assert bad.error.code == code
    assert says in bad.error.message
    assert POISON not in bad.error.message


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{{ 1 + messages[0]['content'] }}", "TypeError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ 1 / (messages | length - 2) }}", "ZeroDivisionError"),
        ("{{ messages[9]['content'] }}", "the chat template rejects"),
    ],
)
def test_a_template_that_raises_for_one_item(export: Path, broken: str, says: str) -> None:
    template = "{% if 'poison' in messages[0]['content'] %}" + broken + "{% endif %}" + Contract.load(export).template
    code = "template" if says.startswith("the") else "failed"
    assert_only_the_poisoned_fails(with_contract(export, template=template), item(POISON), code, says)


def test_a_prompt_without_the_place_that_the_gate_reads(export: Path) -> None:
    ids = load_tokenizer(str(export))("Name", add_special_tokens=False)["input_ids"]
    scorer = with_contract(export, gate=tuple(ids))
    # The head is a plain one; what a gate would read is not its business here.
    first, bad = scorer.score([GOOD[0], item("Who are you?")])
    assert first.rewards is not None
    assert bad.error is not None
    assert bad.error.code == "template"
    first_features, bad_features = scorer.features([GOOD[0], item("Who are you?")])
    assert isinstance(first_features, torch.Tensor)
    assert isinstance(bad_features, ItemError)


class PanicException(BaseException):
    """As a tokenizer's Rust code raises it: no Exception."""


@pytest.mark.parametrize(
    "raised", [UnicodeError(POISON), KeyError(POISON), MemoryError(), PanicException(POISON)], ids=lambda e: type(e).__name__
)
def test_a_tokenizer_that_raises_for_one_item(scorer: Scorer, raised: BaseException) -> None:
    tokenize = scorer._encoder._tokens.tokenize

    def tokenized(rendered: Sequence[Rendered], *, offsets: bool = False) -> list[Any]:
        if any(POISON in each.text for each in rendered):
            raise raised
        return tokenize(rendered, offsets=offsets)

    scorer._encoder._tokens.tokenize = tokenized  # type: ignore[method-assign]
    assert_only_the_poisoned_fails(scorer, item(POISON), "failed", type(raised).__name__)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_fault_of_an_item(scorer: Scorer, raised: type[BaseException]) -> None:
    def tokenized(rendered: Sequence[Rendered], *, offsets: bool = False) -> list[Any]:
        raise raised

    scorer._encoder._tokens.tokenize = tokenized  # type: ignore[method-assign]
    with pytest.raises(raised):
        scorer.score(GOOD)


def poison_the_forward(scorer: Scorer, raised: Callable[[], Exception]) -> list[int]:
    """Whatever batch holds a tilde raises; returns the sizes of the batches."""
    (tilde,) = cast(list[int], load_tokenizer(str(scorer.model_id))("~", add_special_tokens=False)["input_ids"])
    forward, sizes = scorer._outputs, []

    def outputs(batch: Any) -> torch.Tensor:
        sizes.append(int(batch.end_row.numel()))
        if bool((batch.input_ids == tilde).any()):
            raise raised()
        return forward(batch)

    scorer._outputs = outputs  # type: ignore[method-assign]
    return sizes


def test_a_forward_that_raises_for_one_item_is_repeated_item_by_item(export: Path, scorer: Scorer) -> None:
    scorer.model_id = str(export)
    sizes = poison_the_forward(scorer, lambda: IndexError(POISON))
    assert_only_the_poisoned_fails(scorer, item("~"), "failed", "IndexError in the forward")
    # The good ones alone; then all together, and each once more.
    assert (sizes[:2], sorted(sizes[2:])) == ([3, 5], [1, 2, 2])


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_device_that_fails_on_a_single_item_is_not_the_items_fault(export: Path, scorer: Scorer, raised: type[Exception]) -> None:
    scorer.model_id = str(export)
    poison_the_forward(scorer, lambda: raised.__new__(raised))
    with pytest.raises(raised):
        scorer.score([GOOD[0], item("~")])


def test_a_device_on_which_nothing_works_any_more_is_not_the_items_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(parts: Sequence[int]) -> list[int]:
        raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")

    def ones(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert [type(found) for found in together([1, 2], compute, device=CPU)] == [ItemError, ItemError]
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        together([1, 2], compute, device=CPU)


def test_out_of_memory_together_is_repaired_alone() -> None:
    def compute(parts: Sequence[int]) -> list[int]:
        if len(parts) > 1:
            raise torch.OutOfMemoryError("too many")
        return [10 * parts[0]]

    assert together([1, 2, 3], compute, device=CPU) == [10, 20, 30]


def test_nan_of_one_item_reaches_no_other_in_its_row(export: Path) -> None:
    # One row holds them all: masked attention multiplies NaN by 0, which is NaN.
    scorer = Scorer.load(export, device="cpu", verify=False)
    (tilde,) = cast(list[int], load_tokenizer(str(export))("~", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        scorer._model.model.get_input_embeddings().weight[tilde] = float("nan")  # type: ignore[operator]
    for poisoned in (item("~"), item("hm", "~", "ok")):
        assert_only_the_poisoned_fails(scorer, poisoned, "non_finite")


def test_rewards_that_leave_the_range_of_numbers_are_an_error_of_their_item(export: Path) -> None:
    scorer = with_contract(export, normaliser=Normaliser(mean=0.0, std=5e-324, num_rewards=2, reference="r"))
    assert_only_the_poisoned_fails(scorer, item("Hi", normalise="standardised"), "non_finite")


def test_a_rule_that_raises_for_one_item(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Scorer.load(export, device="cpu") for _ in range(2)]
    ensemble = Ensemble(EnsembleRule(rule="mean", members=("a", "b")), members, model_id="e")
    combine = EnsembleRule.combine

    def raising(rule: EnsembleRule, rewards: Sequence[float]) -> float:
        raising.calls += 1  # type: ignore[attr-defined]
        if raising.calls == 3:  # type: ignore[attr-defined]
            raise OverflowError(POISON)
        return combine(rule, rewards)

    raising.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(EnsembleRule, "combine", raising)
    first, bad, second = ensemble.score([GOOD[0], GOOD[1], GOOD[1]])
    assert first.rewards is not None
    assert second.rewards is not None
    assert bad == ItemResult(error=ItemError("failed", "OverflowError while its result was made"))


def test_a_value_that_is_not_good_is_computed_alone_before_it_is_believed() -> None:
    def compute(parts: Sequence[float]) -> list[float]:
        # NaN spreads over its whole row.
        return [sum(parts) if part == part and sum(parts) != sum(parts) else part for part in parts]

    nan = float("nan")
    found = together([1.0, nan, 2.0], compute, device=CPU, good=lambda value: value == value)
    assert found[::2] == [1.0, 2.0]
    assert found[1] != found[1]
