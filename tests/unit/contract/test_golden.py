from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.tokenizer import make_tokenizer

from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.golden import GOLDEN_CONVERSATIONS, SHORT_CONVERSATIONS, golden_conversations
from rayward.contract.reading import RewardReadout
from rayward.errors import ContractError, TooLongError

# Every byte is a token: <|im_start|> user \n a <|im_end|> \n <|im_start|> assistant \n b <|im_end|>
SHORTEST = 1 + 5 + 1 + 1 + 1 + 1 + 10 + 1 + 1


def encoder(directory: Path, max_tokens: int, **changes: object) -> Encoder:
    tokenizer = make_tokenizer(directory)
    contract = Contract.from_tokenizer(tokenizer, max_tokens=max_tokens)
    return Encoder(contract.model_copy(update=changes), tokenizer)


@pytest.mark.parametrize("max_tokens", [256, 4096])
def test_a_contract_with_room_gets_the_usual_conversations_alone(tmp_path: Path, max_tokens: int) -> None:
    rules = encoder(tmp_path, max_tokens)
    found = golden_conversations(rules)
    assert len(found) >= 7
    assert all((golden.prompt, golden.completion) in GOLDEN_CONVERSATIONS for golden, _ in found)
    for golden, encoding in found:
        assert list(golden.token_ids) == encoding.ids == rules.encode(golden.prompt, golden.completion)


@pytest.mark.parametrize("max_tokens", [SHORTEST, SHORTEST + 3, 40, 64])
def test_a_small_contract_gets_shorter_ones(tmp_path: Path, max_tokens: int) -> None:
    found = golden_conversations(encoder(tmp_path, max_tokens))
    assert len({golden.token_ids for golden, _ in found}) == len(found) >= 2
    assert all(len(golden.token_ids) <= max_tokens for golden, _ in found)
    assert any((golden.prompt[0]["content"], golden.completion) in SHORT_CONVERSATIONS for golden, _ in found)


def test_a_contract_that_can_hold_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(TooLongError, match=f"however short.*take {SHORTEST} tokens") as caught:
        golden_conversations(encoder(tmp_path, SHORTEST - 1))
    assert "model.max_tokens" in caught.value.remedy
    with pytest.raises(ContractError, match=r"however short.*no users here"):
        golden_conversations(encoder(tmp_path, 100, template="{{ raise_exception('no users here') }}"))


def test_short_critiques_follow_short_conversations(tmp_path: Path) -> None:
    rules = encoder(tmp_path, 60, critique_lead_in="So?")
    for golden, _ in golden_conversations(rules):
        assert golden.critique is not None
        assert rules.encode(golden.prompt, golden.completion, golden.critique) == list(golden.token_ids)


def test_steps_are_found_in_the_short_ones_too(tmp_path: Path) -> None:
    reading = RewardReadout(at="steps", separator="|", aggregate="last")
    for _, encoding in golden_conversations(encoder(tmp_path, SHORTEST, reading=reading)):
        assert encoding.step_ends == (len(encoding.ids) - 1,)
