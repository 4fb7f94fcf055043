"""Flat texts whose sender says which part is the prompt, and finished texts as token ids."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from tests.helpers.models import change_contract, make_export
from tests.helpers.templates import FAMILIES, make_family_tokenizer

from rayward.contract.conversation import Message
from rayward.contract.reading import RewardReadout
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.scorer import Scorer
from rayward.wire.items import ItemResult, ScoreItem

QUESTION = "How is Oslo? "
PROMPT: tuple[Message, ...] = ({"role": "user", "content": QUESTION},)
ANSWERS = ("Cold.", " It is warm, I think.", "I do not know.\n\nSorry!")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def scorers(root: Path) -> dict[str, Scorer]:
    return {
        name: Scorer.load(make_export(root / name, make=partial(make_family_tokenizer, name=name), max_tokens=400), device="cpu")
        for name in FAMILIES
    }


def flat(text: str, prompt_text: str | None = None) -> ScoreItem:
    return ScoreItem((), (text,), form="text", prompt_text=prompt_text)


def of_ids(*ids: int, trace: bool = False) -> ScoreItem:
    return ScoreItem((), ("",), form="tokens", token_ids=ids, trace=trace)


def score(scorer: Scorer | Ensemble, item: ScoreItem) -> ItemResult:
    (result,) = scorer.score([item])
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_with_its_prompt_is_scored_as_prompt_and_answer(scorers: dict[str, Scorer], family: str) -> None:
    scorer = scorers[family]
    end, bos = scorer._encoder.contract.end_token, scorer._encoder._tokenizer.bos_token or ""
    (expected,) = scorer.score([ScoreItem(PROMPT, ANSWERS)])
    for answer, reward in zip(ANSWERS, expected.rewards or (), strict=True):
        for text, prompt in (
            (QUESTION + answer, QUESTION),
            (f"{QUESTION}{answer}{end}", QUESTION),
            (f"{bos}{QUESTION}{answer}{end}\n", f"{bos}{QUESTION}"),
        ):
            found = score(scorer, flat(text, prompt))
            assert found.taken_as == "templated"
            assert found.rewards == pytest.approx((reward,), abs=1e-5), text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_text_is_never_templated_again_whatever_is_said_of_its_prompt(scorers: dict[str, Scorer], family: str) -> None:
    scorer = scorers[family]
    text = scorer._encoder.render(PROMPT, ANSWERS[0])
    for cut in (4, text.index(ANSWERS[0]), len(text) - 1):
        found = score(scorer, flat(text, text[:cut]))
        assert (found.taken_as, found.rewards) == ("rendered", score(scorer, flat(text)).rewards)


def test_a_prompt_without_an_answer_is_taken_as_it_stands(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["llama3"]
    end = scorer._encoder.contract.end_token
    for text, prompt in ((QUESTION + end, QUESTION), (QUESTION + "  ", QUESTION), (" " + QUESTION, " ")):
        found = score(scorer, flat(text, prompt))
        assert (found.taken_as, found.rewards) == ("as_given", score(scorer, flat(text)).rewards)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_of_a_conversation_have_its_reward(scorers: dict[str, Scorer], family: str) -> None:
    scorer = scorers[family]
    for answer in ANSWERS:
        ids = scorer._encoder.encode(PROMPT, answer)
        expected = score(scorer, ScoreItem(PROMPT, (answer,)))
        for given in (ids, ids[:-1]):
            found = score(scorer, of_ids(*given))
            assert (found.taken_as, found.num_tokens) == ("as_given", expected.num_tokens)
            assert found.rewards == pytest.approx(expected.rewards, abs=1e-5)


def test_token_ids_share_what_they_begin_with(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["chatml"]
    ids = [scorer._encoder.encode(PROMPT, answer) for answer in ANSWERS]
    results = scorer.score([of_ids(*each) for each in ids])
    assert sum(result.tokens for result in results) == sum(map(len, ids))
    assert sum(result.tokens_computed for result in results) < sum(map(len, ids))


def test_a_trace_of_token_ids_covers_all_of_them(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["chatml"]
    ids = scorer._encoder.encode(PROMPT, ANSWERS[0])
    found = score(scorer, of_ids(*ids, trace=True))
    assert found.traces is not None
    assert found.rewards is not None
    assert len(found.traces[0].rewards) == len(found.traces[0].tokens) == len(ids)
    assert found.traces[0].rewards[-1] == pytest.approx(found.rewards[0], abs=1e-5)


def test_ids_that_cannot_be_scored_fail_alone(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["chatml"]
    good = of_ids(*scorer._encoder.encode(PROMPT, ANSWERS[0]))
    results = scorer.score([of_ids(5, 10**6), good, of_ids(*[5] * 400), of_ids(*[5] * 399)])
    assert [result.error.code if result.error else None for result in results] == ["token_out_of_range", None, "too_long", None]


def test_models_that_read_elsewhere_or_tokenize_differently_take_no_ids(root: Path, scorers: dict[str, Scorer]) -> None:
    assert scorers
    change_contract(make_export(root / "steps"), reading=RewardReadout(at="steps", separator="\n\n", aggregate="minimum"))
    steps = score(Scorer.load(root / "steps", device="cpu", verify=False), of_ids(5, 6))
    (root / "ensemble").mkdir()
    (root / "ensemble" / "ensemble.json").write_text(json.dumps({"rule": "mean", "members": ["../chatml", "../chatml"]}))
    members = score(Ensemble.load(root / "ensemble", device="cpu"), of_ids(5, 6))
    for found in (steps, members):
        assert found.error is not None
        assert found.error.code == "unsupported_message"
