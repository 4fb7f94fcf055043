from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.models import make_export
from tests.helpers.tokenizer import CHATML, END, PAD, START, make_tokenizer
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from rayward.contract.contract import Contract, verify_files
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import FROZEN_DATE, PAD_TOKEN, load_tokenizer, tokenizer_fingerprint
from rayward.errors import ContractError, ContractMismatchError, TooLongError

END_ID = 2


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


PROMPT = (turn("user", "hi"),)
DIALOGUE = (
    turn("system", "s"),
    turn("user", "first question"),
    turn("assistant", "first answer"),
    turn("user", "second question"),
    turn("assistant", "second answer"),
    turn("user", "last question"),
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path / "tokenizer")


def encoder_of(tokenizer: PreTrainedTokenizerFast, *, max_tokens: int = 512, **kwargs: Any) -> Encoder:
    return Encoder(Contract.from_tokenizer(tokenizer, max_tokens=max_tokens, **kwargs), tokenizer)


def test_a_template_that_prints_a_newline_after_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer)
    assert encoder.render(PROMPT, "yo") == f"{START}user\nhi{END}\n{START}assistant\nyo{END}"
    ids = encoder.encode(PROMPT, "yo")
    assert ids[-1] == END_ID
    # Markup, "user", newline, "hi", end, newline, markup, "assistant", newline, "yo", end.
    assert len(ids) == 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1 + 2 + 1
    assert encoder.contract.template_source == "tokenizer"
    assert encoder.contract.template == CHATML


def test_a_template_without_end_token_gets_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    encoder = encoder_of(tokenizer)
    assert encoder.render(PROMPT, "yo") == f"[user] hi\n[assistant] yo\n{END}"
    assert encoder.encode(PROMPT, "yo")[-1] == END_ID


def test_a_tokenizer_without_template_gets_the_plain_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    encoder = encoder_of(tokenizer)
    assert encoder.contract.template_source == "plain"
    assert encoder.contract.bos_token is None
    assert encoder.render((turn("system", "s"), *PROMPT), "yo ") == f"System: s\n\nUser: hi\n\nAssistant: yo {END}"
    assert encoder.encode(PROMPT, "yo")[-1] == END_ID


def test_several_named_templates_the_default_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = {"default": CHATML, "tool_use": "nothing"}
    assert encoder_of(tokenizer).contract.template == CHATML


def with_bos(tokenizer: PreTrainedTokenizerFast, path: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer, putting START before every text by itself, as Llama's does."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD, bos_token=START)
    made.chat_template = tokenizer.chat_template
    made.save_pretrained(str(path))
    return made


def test_a_beginning_token_is_never_doubled(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own_bos = with_bos(tokenizer, tmp_path / "bos")
    assert own_bos("a")["input_ids"][0] == 1
    own_bos.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert encoder_of(own_bos).encode(PROMPT, "yo").count(1) == 1
    own_bos.chat_template = None
    ids = encoder_of(own_bos).encode(PROMPT, "yo")
    assert ids[0] == 1, "a model that was pre-trained with a beginning token gets it in the plain template too"
    assert ids.count(1) == 1


def test_padding_equal_to_the_end_token_is_replaced_by_a_spare_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = END
    contract = Contract.from_tokenizer(tokenizer, max_tokens=64)
    assert (contract.pad_token, contract.pad_token_id) == (PAD, 0)
    assert tokenizer.pad_token_id == 0


def test_no_pad_token_and_no_spare_one_adds_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "bare" / name
        path.write_text(path.read_text().replace("<|pad|>", "<|zero|>"))
    bare = load_tokenizer(str(tmp_path / "bare"))
    bare.pad_token = None
    size = len(bare)
    contract = Contract.from_tokenizer(bare, max_tokens=64)
    assert (contract.pad_token, contract.pad_token_id) == (PAD_TOKEN, size)
    assert len(bare) == size + 1
    assert contract.pad_token_id != contract.end_token_id


def test_no_end_token_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ContractError, match="no end-of-sequence token"):
        Contract.from_tokenizer(tokenizer, max_tokens=64)


def test_a_template_that_prints_the_date_is_frozen_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    tokenizer.chat_template = today + CHATML
    encoder = encoder_of(tokenizer)
    assert encoder.contract.template_kwargs == {"date_string": FROZEN_DATE}
    assert encoder.render(PROMPT, "yo").startswith(FROZEN_DATE)
    mine = encoder_of(tokenizer, template_kwargs={"date_string": "1 Jan 2020"})
    assert mine.render(PROMPT, "yo").startswith("1 Jan 2020")
    tokenizer.chat_template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }} {{ strftime_now(\"%B\") }}|{% endif %}" + CHATML
    assert encoder_of(tokenizer).render(PROMPT, "yo").startswith("2024 July|")
    assert "2024" in encoder_of(tokenizer).contract.template
    tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML
    with pytest.raises(ContractError, match="current date"):
        Contract.from_tokenizer(tokenizer, max_tokens=64)


def test_a_conversation_that_the_template_rejects(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(ContractError, match="no system turn, please"):
        encoder_of(tokenizer).encode(PROMPT, "yo")


def kept(encoder: Encoder, tokenizer: PreTrainedTokenizerFast, completion: str = "yes") -> list[str]:
    """Contents of the turns that are left."""
    text = tokenizer.decode(encoder.encode(DIALOGUE, completion))
    return [part.split("\n", 1)[1] for part in text.replace(f"{END}\n", END).removesuffix(END).replace(START, "").split(END)]


def test_truncation_drops_whole_oldest_turns_and_starts_with_the_user(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = ["s", "first question", "first answer", "second question", "second answer", "last question", "yes"]
    lengths: set[int] = set()
    for limit in range(60, 260):
        encoder = encoder_of(tokenizer, max_tokens=limit)
        try:
            turns = kept(encoder, tokenizer)
        except TooLongError:
            assert not lengths, "a longer limit can only help"
            continue
        ids = encoder.encode(DIALOGUE, "yes")
        assert len(ids) <= limit
        assert ids[-1] == END_ID
        assert turns in (whole, ["s", *whole[3:]], ["s", *whole[5:]])
        lengths.add(len(turns))
    assert lengths == {7, 5, 3}


def test_the_longest_history_that_fits_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(encoder_of(tokenizer).encode(DIALOGUE, "yes"))
    assert len(kept(encoder_of(tokenizer, max_tokens=length), tokenizer)) == 7
    assert len(kept(encoder_of(tokenizer, max_tokens=length - 1), tokenizer)) == 5


def test_the_completion_is_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer, max_tokens=100)
    with pytest.raises(TooLongError, match=r"the last user turn and the completion take \d+ tokens; the contract allows 100"):
        encoder.encode(DIALOGUE, "x" * 90)
    assert kept(encoder_of(tokenizer, max_tokens=150), tokenizer, "x" * 50)[-1] == "x" * 50


def test_a_conversation_is_encoded_on_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer, max_tokens=120)
    alone = encoder.encode(DIALOGUE, "short")
    encoder.encode(DIALOGUE, "a much longer completion that takes the room")
    with pytest.raises(TooLongError):
        encoder.encode(DIALOGUE, "x" * 200)
    assert encoder.encode(DIALOGUE, "short") == alone


@pytest.mark.parametrize("completion", ["yo", "yo ", "", " \n", "Grüße 🙂", f"a {END} b", "0" * 100, "\t"])
def test_the_last_id_is_always_the_end_token(tokenizer: PreTrainedTokenizerFast, completion: str) -> None:
    for template in (CHATML, None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        tokenizer.chat_template = template
        assert encoder_of(tokenizer).encode(PROMPT, completion)[-1] == END_ID


def test_the_fingerprint_covers_the_rules_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    contract = Contract.from_tokenizer(tokenizer, max_tokens=64)
    same = contract.model_copy(update={"files": {"a": "b"}, "head_sha256": "c", "golden_tolerance": 1.0})
    assert same.fingerprint() == contract.fingerprint()
    changes: list[dict[str, Any]] = [
        {"template": contract.template + " "},
        {"template_kwargs": {"a": "b"}},
        {"bos_token": START},
        {"end_token": START},
        {"end_token_id": 1},
        {"max_tokens": 65},
    ]
    prints = {contract.model_copy(update=change).fingerprint() for change in changes}
    assert len(prints | {contract.fingerprint()}) == len(changes) + 1


def test_the_fingerprint_of_a_tokenizer_does_not_depend_on_its_use(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_the_contract_survives_its_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    contract = Contract.from_tokenizer(tokenizer, max_tokens=64)
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "not a valid contract"),
        ("{}", "not a valid contract"),
        ('{"version": 1, "surprise": 2}', "surprise"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_contract(tmp_path: Path, text: str | None, rule: str) -> None:
    if text is not None:
        (tmp_path / "contract.json").write_text(text)
    with pytest.raises(ContractError, match=rule):
        Contract.load(tmp_path)


def test_a_contract_of_another_version(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    Contract.from_tokenizer(tokenizer, max_tokens=64).model_copy(update={"version": 99}).save(tmp_path)
    with pytest.raises(ContractError, match="version 99"):
        Contract.load(tmp_path)


def test_a_contract_and_a_tokenizer_that_disagree_about_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    contract = Contract.from_tokenizer(tokenizer, max_tokens=64).model_copy(update={"end_token_id": 7})
    with pytest.raises(ContractMismatchError, match="has id 2, the contract says 7"):
        Encoder(contract, tokenizer)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("chat_template.jinja", "template"),
        ("model.safetensors", "weights"),
        ("config.json", "model config"),
    ],
)
def test_a_changed_or_missing_file_is_named(tmp_path: Path, file: str, part: str) -> None:
    directory = make_export(tmp_path / "export")
    contract = Contract.load(directory)
    verify_files(contract, directory)
    path = directory / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ContractMismatchError, match=f"^{part}: .*{file} is not the file"):
        verify_files(contract, directory)
    path.unlink()
    with pytest.raises(ContractMismatchError, match=f"^{part}: .*{file} is missing"):
        verify_files(contract, directory)


def test_the_saved_contract_is_plain_json(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    Contract.from_tokenizer(tokenizer, max_tokens=64).save(tmp_path)
    saved = json.loads((tmp_path / "contract.json").read_text())
    assert (saved["end_token"], saved["end_token_id"], saved["pad_token_id"], saved["max_tokens"]) == (END, 2, 0, 64)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
