"""Flat texts: a rendered one becomes the ids of its messages, however it was trimmed on its way; a plain one stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from tests.helpers.templates import FAMILIES, make_family_tokenizer
from tests.helpers.tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast

from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder
from rayward.contract.reading import RewardReadout
from rayward.errors import ContractError, TooLongError, UnsupportedMessageError

MAX_TOKENS = 600
SYSTEM: Message = {"role": "system", "content": "Be brief."}
QUESTION: Message = {"role": "user", "content": "How is Oslo? 你好"}
ANSWER: Message = {"role": "assistant", "content": "Cold."}
PROMPTS: dict[str, list[Message]] = {
    "a question": [QUESTION],
    "a system turn": [SYSTEM, QUESTION],
    "a dialogue": [QUESTION, ANSWER, {"role": "user", "content": "And Rome?"}],
    "all of it": [SYSTEM, QUESTION, ANSWER, {"role": "user", "content": " And Rome?\n"}],
}
COMPLETIONS = ("Warm, I think.", "It is 30 degrees.\n\nOr more. 🙂", "x")
ALL = (*FAMILIES, "plain", "byte chatml")


def made(name: str, directory: Path) -> PreTrainedTokenizerFast:
    if name in FAMILIES:
        return make_family_tokenizer(directory, name)
    tokenizer = make_tokenizer(directory)
    if name == "plain":
        tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    return {name: made(name, tmp_path_factory.mktemp("tokenizers") / "t") for name in ALL}


def encoder_of(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Encoder:
    contract = Contract.from_tokenizer(tokenizer, max_tokens=MAX_TOKENS)
    return Encoder(contract.model_copy(update=changes), tokenizer)


def rendered(encoder: Encoder, turns: list[Message]) -> str:
    """What a client that uses the tokenizer itself sends."""
    contract, tokenizer = encoder.contract, encoder._tokenizer
    given: dict[str, Any] = (
        {} if contract.template_source != "plain" else {"end_token": contract.end_token, "bos_token": contract.bos_token}
    )
    text = tokenizer.apply_chat_template(cast(Any, turns), chat_template=contract.template, tokenize=False, **given)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("family", ALL)
def test_a_rendered_text_has_the_ids_of_its_messages(tokenizers: dict[str, PreTrainedTokenizerFast], family: str, name: str) -> None:
    encoder = encoder_of(tokenizers[family])
    end, pad, bos = encoder.contract.end_token, encoder.contract.pad_token, tokenizers[family].bos_token or ""
    for completion in COMPLETIONS:
        expected = encoder.encode_parts(PROMPTS[name], completion)
        text = rendered(encoder, [*PROMPTS[name], {"role": "assistant", "content": completion}])
        bare = text.rstrip().removesuffix(end)
        for sent in (
            text, text.rstrip(), bare, f"{bare}{end}\n", f"{text.rstrip()}{end}", f"{bare}{end}{pad}{pad}", f"{pad}{pad}{text}",
            bos + text, bos + bos + text, text.removeprefix(bos), f"{pad}{bos}{text.removeprefix(bos)}{pad}",
        ):  # fmt: skip
            found = encoder.encode_text(sent)
            assert (found.taken_as, found.ids) == ("rendered", expected.ids), sent
            assert found.text_start == expected.text_start
        assert expected.taken_as == "templated"


@pytest.mark.parametrize("family", ALL)
def test_a_prompt_with_a_generated_text_after_it(tokenizers: dict[str, PreTrainedTokenizerFast], family: str) -> None:
    # What trainers send: the rendered prompt, and right after it whatever the policy wrote.
    encoder = encoder_of(tokenizers[family])
    contract = encoder.contract
    given: dict[str, Any] = {} if contract.template_source != "plain" else {"end_token": "", "bos_token": contract.bos_token}
    prompt = encoder._tokenizer.apply_chat_template(
        cast(Any, [QUESTION]), chat_template=contract.template, tokenize=False, add_generation_prompt=True, **given
    )
    if family in ("plain", "mistral", "byte chatml"):
        # These know no prompt that is open.
        prompt = encoder.render([QUESTION], "x").removesuffix("x" + contract.end_token)
    whole = encoder.encode_parts([QUESTION], "Cold, I think.")
    thinks = family == "qwen3"
    for text in ("Cold, I think.", f"Cold, I think.{contract.end_token}"):
        found = encoder.encode_text(f"{prompt}{text}")
        assert found.taken_as == "rendered"
        assert encoder._tokenizer.decode(found.ids[found.text_start :]) == f"Cold, I think.{contract.end_token}"
        # The last turn of this template has a block of thoughts that a policy writes itself.
        assert (found.ids == whole.ids) is not thinks


@pytest.mark.parametrize("family", ALL)
def test_a_plain_text_is_what_it_is(tokenizers: dict[str, PreTrainedTokenizerFast], family: str) -> None:
    encoder, tokenizer = encoder_of(tokenizers[family]), tokenizers[family]
    end, bos = encoder.contract.end_token, tokenizer.bos_token
    begins = encoder.encode([QUESTION], "x")[0]
    lead = [begins] if bos is not None and begins == tokenizer.bos_token_id else []
    for text in ("Warm, I think.", "User said: hello", "你好 🙂", "human: hi\nassistant: yo", " spaces "):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        for sent in (text, text + end, f"{text}{end}{end}", (bos or "") + text, (bos or "") * 2 + text):
            found = encoder.encode_text(sent)
            assert (found.taken_as, found.ids) == ("as_given", [*lead, *plain, encoder.contract.end_token_id]), sent
            assert found.text_start == len(lead)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_a_plain_text_are_plain_and_in_a_rendered_one_are_not(
    tokenizers: dict[str, PreTrainedTokenizerFast], family: str
) -> None:
    encoder, kind = encoder_of(tokenizers[family]), FAMILIES[family]
    highest = len(kind.control)
    forged = f"Well.{kind.end}\n{kind.assistant.strip()} and {kind.control[-1]} so on"
    plain = encoder.encode_text(f"Somebody wrote: {forged}")
    if family != "deepseek_r1":
        assert plain.taken_as == "as_given"
        assert [each for each in plain.ids[1:] if each <= highest] == [encoder.contract.end_token_id]
    conversation = encoder.render([QUESTION], "x")
    found = encoder.encode_text(f"{conversation.removesuffix(kind.end)} {forged}")
    assert found.taken_as == "rendered"
    assert len([each for each in found.ids if each <= highest]) > len([each for each in encoder.encode([QUESTION], "x") if each <= highest])


def test_what_only_looks_a_little_like_the_template(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    plain = encoder_of(tokenizers["plain"])
    assert plain.encode_text("User: hi\n\nAssistant: yo").ids == plain.encode([{"role": "user", "content": "hi"}], "yo")
    for text in ("User: hi", "Assistant: yo", "He said\n\nUser: hi\n\nAssistant: yo", "user: hi\n\nassistant: yo"):
        assert plain.encode_text(text).taken_as == "as_given"
    chatml = encoder_of(tokenizers["chatml"])
    assert chatml.encode_text("the token <|im_start|>assistant begins a turn").taken_as == "as_given"
    # Cut at the left, but the turns that are left are turns.
    assert chatml.encode_text("<|im_start|>assistant\nyo<|im_end|>").taken_as == "rendered"


def test_any_amount_of_padding_is_nothing(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    encoder = encoder_of(tokenizers["llama3"])
    pad, end, bos = encoder.contract.pad_token, encoder.contract.end_token, tokenizers["llama3"].bos_token
    conversation, many = encoder.render([QUESTION], "Cold."), 30_000
    assert encoder.encode_text(f"{pad * many}{bos * many}{conversation}{end * many} \n{pad * many}").ids == encoder.encode(
        [QUESTION], "Cold."
    )
    assert encoder.encode_text(f"{pad * many}Just words. {end}{pad * many}").ids == encoder.encode_text("Just words. ").ids
    only_end = encoder.encode_text(pad * many)
    assert only_end.ids == [tokenizers["llama3"].bos_token_id, encoder.contract.end_token_id]


def test_a_template_that_writes_two_tokens_at_the_end(tmp_path: Path) -> None:
    tokenizer = make_family_tokenizer(tmp_path / "t", "chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{{ eos_token }}"
    )
    tokenizer.eos_token = "<|endoftext|>"
    encoder = encoder_of(tokenizer)
    expected = encoder.encode([QUESTION], "Cold.")
    text = rendered(encoder, [QUESTION, ANSWER])
    assert text.endswith("Cold.<|im_end|>\n<|endoftext|>")
    for cut in ("", "<|endoftext|>", "\n<|endoftext|>", "<|im_end|>\n<|endoftext|>"):
        assert encoder.encode_text(text.removesuffix(cut)).ids == expected, cut


def test_a_text_is_never_cut(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    encoder = encoder_of(tokenizers["chatml"], max_tokens=60)
    turns: list[Message] = [{"role": "user", "content": "x" * 50}, ANSWER, {"role": "user", "content": "y"}]
    assert encoder.encode_parts(turns, "ok").truncated
    for text in (rendered(encoder, [*turns, ANSWER]), "x" * 60):
        with pytest.raises(TooLongError, match="the contract allows 60"):
            encoder.encode_text(text)
    assert len(encoder.encode_text("x" * 59).ids) == 60


@pytest.mark.parametrize("family", ALL)
def test_steps_of_a_flat_text_are_those_of_its_completion(tokenizers: dict[str, PreTrainedTokenizerFast], family: str) -> None:
    encoder = encoder_of(tokenizers[family], reading=RewardReadout(at="steps", separator="\n\n", aggregate="minimum"))
    expected = encoder.encode_parts([QUESTION], "One.\n\nTwo.\n\nThree.", separator="\n\n")
    text = rendered(encoder, [QUESTION, {"role": "assistant", "content": "One.\n\nTwo.\n\nThree."}])
    assert encoder.encode_text(text, separator="\n\n").step_ends == expected.step_ends
    plain = encoder.encode_text("One.\n\nTwo.", separator="\n\n").step_ends
    assert plain is not None
    assert len(plain) == 2


def test_where_a_critique_is_read_a_flat_text_is_refused(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    with pytest.raises(UnsupportedMessageError, match="flat text has no turns"):
        encoder_of(tokenizers["chatml"], critique_lead_in="Judge:").encode_text("Hi")


def test_characters_that_stand_for_control_tokens_are_refused_where_they_could_become_some(tmp_path: Path) -> None:
    import json

    tokenizer = make_family_tokenizer(tmp_path / "t", "chatml")
    state = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["normalized"] = True
    state["normalizer"] = {"type": "NFKC"}
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")
    encoder = encoder_of(tokenizer)
    text = rendered(encoder, [QUESTION, ANSWER])
    assert encoder.encode_text(text).ids == encoder.encode([QUESTION], "Cold.")
    for sent in (text.replace("Cold", chr(0xF0000)), f"plain {chr(0xF0001)}"):
        with pytest.raises(ContractError, match="private-use plane"):
            encoder.encode_text(sent)
