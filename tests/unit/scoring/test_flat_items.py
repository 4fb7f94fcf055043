"""Flat texts as items: the reward of the messages they were rendered from, and what became of the text in the result."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.models import make_export
from tests.helpers.templates import FAMILIES, make_family_tokenizer

from rayward.contract.conversation import Message
from rayward.scoring.scorer import Scorer
from rayward.wire.items import ScoreItem

PROMPT: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief, but say all that matters."},
    {"role": "user", "content": "How is Oslo?"},
)
TEXTS = ("Cold.", "It is warm, I think.", "I do not know.\n\nSorry!")


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: Scorer.load(make_export(root / name, make=partial(make_family_tokenizer, name=name), max_tokens=400), device="cpu")
        for name in FAMILIES
    }


def flat(text: str, **given: Any) -> ScoreItem:
    return ScoreItem((), (text,), form="text", **given)


def rendered(scorer: Scorer, completion: str) -> str:
    return scorer._encoder.render(PROMPT, completion)


@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_texts_have_the_rewards_of_their_messages_and_pay_for_the_prompt_once(scorers: dict[str, Scorer], family: str) -> None:
    scorer = scorers[family]
    (expected,) = scorer.score([ScoreItem(PROMPT, TEXTS)])
    results = scorer.score([flat(rendered(scorer, text)) for text in TEXTS])
    assert [result.taken_as for result in results] == ["rendered"] * len(TEXTS)
    assert expected.taken_as == "templated"
    assert [result.rewards for result in results] == [pytest.approx((reward,), abs=1e-6) for reward in expected.rewards or ()]
    assert [result.num_tokens for result in results] == [(number,) for number in expected.num_tokens or ()]
    assert sum(result.tokens_computed for result in results) == expected.tokens_computed < expected.tokens


def test_a_plain_text_is_scored_as_it_is_and_its_result_says_so(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["llama3"]
    plain, broken, templated = scorer.score([flat("Just words."), flat("y" * 1000), flat(rendered(scorer, "Cold."))])
    assert (plain.taken_as, plain.num_tokens) == ("as_given", (len("Just words.") + 2,))
    assert plain.rewards is not None
    assert broken.error is not None
    assert (broken.error.code, broken.error.retryable) == ("too_long", False)
    assert templated.taken_as == "rendered"


def test_a_trace_of_a_flat_text_is_that_of_its_last_turn(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["mistral"]
    (expected,) = scorer.score([ScoreItem(PROMPT, TEXTS[:1], trace=True)])
    (found,) = scorer.score([flat(rendered(scorer, TEXTS[0]), trace=True)])
    assert found.traces is not None
    assert expected.traces is not None
    assert found.traces[0].tokens == expected.traces[0].tokens
    assert found.traces[0].rewards == pytest.approx(expected.traces[0].rewards, abs=1e-6)


def test_a_text_whose_ids_the_model_does_not_know(scorers: dict[str, Scorer], tmp_path: Path) -> None:
    directory = make_export(tmp_path / "model", make=partial(make_family_tokenizer, name="chatml"))
    (directory / "contract.json").unlink()
    tokenizer = scorers["chatml"]._encoder._tokenizer.from_pretrained(str(directory))
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(directory)
    good, bad = Scorer.load(directory, device="cpu").score([flat("known"), flat("an unheard word")])
    assert good.rewards is not None
    assert bad.error is not None
    assert bad.error.code == "token_out_of_range"
