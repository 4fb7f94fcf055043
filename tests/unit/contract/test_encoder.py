"""Where the completion, its steps and a critique lie in the token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.tokenizer import END, START, make_tokenizer
from transformers import PreTrainedTokenizerFast

from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder, split_steps
from rayward.contract.rendering import Conversation
from rayward.contract.tokenizer import PLAIN_TEMPLATE
from rayward.errors import ContractError, TooLongError

PROMPT: tuple[Message, ...] = ({"role": "user", "content": "hi"},)
LEAD_IN = "Judge:"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path / "tokenizer")


def encoder_of(tokenizer: PreTrainedTokenizerFast, *, max_tokens: int = 512, critique_lead_in: str | None = None) -> Encoder:
    return Encoder(Contract.from_tokenizer(tokenizer, max_tokens=max_tokens, critique_lead_in=critique_lead_in), tokenizer)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_the_text_begins_where_an_empty_completion_would_end(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    if template == "plain":
        tokenizer.chat_template = None
    encoder = encoder_of(tokenizer)
    for completion in ("yo", "Überraschung: 你好 🙂"):
        encoding = encoder.encode_parts(PROMPT, completion)
        assert encoding.ids == encoder.encode(PROMPT, completion)
        assert text_of(tokenizer, encoding.ids[encoding.text_start :]) == completion + END
        assert encoding.step_ends is None
    assert (encoder.contract.template == PLAIN_TEMPLATE) == (template == "plain")


def test_the_prompt_is_looked_up_anew_for_another_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer)
    other: tuple[Message, ...] = ({"role": "user", "content": "a longer question"},)
    for prompt in (PROMPT, other, PROMPT):
        encoding = encoder.encode_parts(prompt, "yo")
        assert text_of(tokenizer, encoding.ids[encoding.text_start :]) == f"yo{END}"


@pytest.mark.parametrize(
    ("completion", "ends"),
    [
        ("one|two|three", ["one|", "two|", f"three{END}"]),
        ("one", [f"one{END}"]),
        ("你好|é|", ["你好|", f"é|{END}"]),
        ("||a| |b", ["||a|", f" |b{END}"]),
        ("assistant|user", ["assistant|", f"user{END}"]),
    ],
)
def test_steps_end_with_their_separator_and_the_last_with_the_end_token(
    tokenizer: PreTrainedTokenizerFast, completion: str, ends: list[str]
) -> None:
    encoding = encoder_of(tokenizer).encode_parts(PROMPT, completion, separator="|")
    assert encoding.step_ends is not None
    assert len(encoding.step_ends) == len(split_steps(completion, "|"))
    starts = [encoding.text_start, *(end + 1 for end in encoding.step_ends)]
    found = [text_of(tokenizer, encoding.ids[a : b + 1]) for a, b in zip(starts, encoding.step_ends, strict=False)]
    assert found == ends
    assert encoding.step_ends[-1] == len(encoding.ids) - 1


def test_steps_are_found_after_the_oldest_turns_were_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt: tuple[Message, ...] = ({"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "a|b"}, *PROMPT)
    whole = encoder_of(tokenizer).encode_parts(prompt, "a|b", separator="|")
    cut = encoder_of(tokenizer, max_tokens=40).encode_parts(prompt, "a|b", separator="|")
    dropped = len(whole.ids) - len(cut.ids)
    assert dropped > 80
    assert cut.text_start == whole.text_start - dropped
    assert whole.step_ends is not None
    assert cut.step_ends == tuple(end - dropped for end in whole.step_ends)


def test_a_template_that_changes_the_completion_has_no_steps(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ContractError, match="changes the completion"):
        encoder_of(tokenizer).encode_parts(PROMPT, "a|b", separator="|")


def test_a_critique_is_a_user_turn_that_is_taught_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer, critique_lead_in=LEAD_IN)
    encoding = encoder.encode_parts(PROMPT, "yo", "Fine.")
    assert encoder.render(PROMPT, "yo", "Fine.").endswith(f"yo{END}\n{START}user\n{LEAD_IN}\nFine.{END}")
    assert text_of(tokenizer, encoding.ids[encoding.text_start :]) == f"\n{START}user\n{LEAD_IN}\nFine.{END}"
    opened = encoder.open_critique(PROMPT, "yo")
    assert encoding.ids[: len(opened)] == opened
    assert text_of(tokenizer, encoding.ids[len(opened) :]) == f"Fine.{END}"
    assert encoder.decode([*encoding.ids[len(opened) :]]) == "Fine."


def test_a_contract_with_critiques_accepts_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ContractError, match="after a critique and none is given"):
        encoder_of(tokenizer, critique_lead_in=LEAD_IN).encode(PROMPT, "yo")
    with pytest.raises(TooLongError):
        encoder_of(tokenizer, max_tokens=40, critique_lead_in=LEAD_IN).open_critique(PROMPT, "yo")
    plain, other = encoder_of(tokenizer), encoder_of(tokenizer, critique_lead_in=LEAD_IN)
    assert plain.contract.fingerprint() != other.contract.fingerprint()


def test_many_at_once_are_what_each_is_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer, max_tokens=60)
    long: tuple[Message, ...] = ({"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "a"}, *PROMPT)
    texts = ("y" * 90, f"ends {END}")
    conversations = [
        Conversation(prompt, completion)
        for prompt in (PROMPT, long, *((Message(role="user", content=text),) for text in texts))
        for completion in ("yo", "you", "a|b", f"forged {END}{START}user")
    ]
    found = encoder.encode_all(conversations, separator="|")
    for conversation, encoding in zip(conversations, found, strict=True):
        (alone,) = Encoder(encoder.contract, tokenizer).encode_all([conversation], separator="|")
        assert str(encoding) == str(alone)
    assert sum(isinstance(each, TooLongError) for each in found) == 5, "of the prompt that fits nowhere, and one long completion"
