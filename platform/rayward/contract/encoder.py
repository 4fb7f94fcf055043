"""Text to token ids by a contract: the only place where conversations are rendered and tokenized."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.errors import ContractError, ContractMismatchError, TooLongError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARK = "rayward-critique-stands-here"


@dataclass(frozen=True, slots=True)
class Encoding:
    """One conversation as token ids.

    Attributes:
        ids: the last one is the end token.
        text_start: index of the first id of what was written last: the completion, or the turn of the critique. A language-model loss
            teaches from here to the end.
        step_ends: index of the last id of every step of the completion, the end token for the last one; None where no separator was given.
    """

    ids: list[int]
    text_start: int
    step_ends: tuple[int, ...] | None = None


class Encoder:
    """Text to token ids by a contract; the only place where conversations are rendered and tokenized.

    Args:
        contract: the rules.
        tokenizer: the fast tokenizer that belongs to it.
    """

    def __init__(self, contract: Contract, tokenizer: PreTrainedTokenizerBase) -> None:
        self.contract = contract
        self._tokenizer = tokenizer
        self._prompt: tuple[tuple[tuple[str, str], ...], list[int]] | None = None
        if tokenizer.convert_tokens_to_ids(contract.end_token) != contract.end_token_id:
            raise ContractMismatchError(
                f"tokenizer: {contract.end_token!r} has id {tokenizer.convert_tokens_to_ids(contract.end_token)}, "
                f"the contract says {contract.end_token_id}",
                remedy="use the tokenizer that was exported with the contract",
            )

    def encode(self, prompt: Sequence[Message], completion: str, critique: str | None = None) -> list[int]:
        """Token ids of one conversation; the last id is the end token, whose position is scored.

        Args:
            critique: what `Contract.critique_lead_in` is followed by; needed where the contract has one.

        Raises:
            TooLongError: the system turn, the last user turn, the completion and the critique do not fit `max_tokens`.
            ContractError: the template rejects the conversation, or the critique is missing.
        """
        return self._fitting(prompt, completion, critique)[1]

    def encode_parts(
        self, prompt: Sequence[Message], completion: str, critique: str | None = None, *, separator: str | None = None
    ) -> Encoding:
        """As `encode`, with the places in the conversation that losses and heads refer to.

        Args:
            separator: text between two steps of the completion.

        Raises:
            TooLongError, ContractError: as `encode`.
        """
        turns, ids, text = self._fitting(prompt, completion, critique)
        written = self._finished(self._conversation(turns, completion)) if critique is not None else None
        before = self._prompt_ids(turns) if written is None else self._ids(written)
        steps = None if separator is None else self._step_ends(text, completion, separator)
        return Encoding(ids, _common_length(ids, before), steps)

    def open_critique(self, prompt: Sequence[Message], completion: str) -> list[int]:
        """Token ids of the conversation up to where the critique begins, for a language model to go on.

        Raises:
            TooLongError: not even an empty critique fits.
            ContractError: the template rejects the conversation.
        """
        _, _, text = self._fitting(prompt, completion, _MARK)
        return self._ids(text[: text.rindex(_MARK)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens and without white space around it."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)  # type: ignore[assignment]
        return text.strip()

    def render(self, prompt: Sequence[Message], completion: str, critique: str | None = None) -> str:
        """The conversation as text, ending with the end token."""
        lead_in = self.contract.critique_lead_in
        if lead_in is None:
            return self._finished(self._conversation(prompt, completion))
        if critique is None:
            raise ContractError("the reward is read after a critique and none is given", remedy="give or generate a critique")
        return self._finished([*self._conversation(prompt, completion), {"role": "user", "content": f"{lead_in}\n{critique}"}])

    def _fitting(self, prompt: Sequence[Message], completion: str, critique: str | None) -> tuple[Sequence[Message], list[int], str]:
        length = 0
        for turns in _left_truncations(prompt):
            text = self.render(turns, completion, critique)
            ids = self._ids(text)
            length = len(ids)
            if length <= self.contract.max_tokens:
                return turns, ids, text
        raise TooLongError(
            f"the last user turn and the completion take {length} tokens; the contract allows {self.contract.max_tokens}",
            remedy="shorten them, or train with a larger model.max_tokens",
        )

    def _prompt_ids(self, turns: Sequence[Message]) -> list[int]:
        # The beginning that an empty completion has too; kept for the other completions of the prompt.
        key = tuple((turn["role"], turn["content"]) for turn in turns)
        if self._prompt is None or self._prompt[0] != key:
            self._prompt = key, self._ids(self._finished(self._conversation(turns, "")))
        return self._prompt[1]

    def _step_ends(self, text: str, completion: str, separator: str) -> tuple[int, ...]:
        body = completion.strip()
        start = text.rfind(body)
        if start < 0:
            raise ContractError(
                "the chat template changes the completion, so its steps cannot be found in it",
                remedy="use a template that prints it as it is",
            )
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins = [begin for begin, _ in encoded["offset_mapping"]]
        last = len(begins) - 1
        return (*(bisect_right(begins, start + stop - 1) - 1 for _, stop in split_steps(body, separator)[:-1]), last)

    @staticmethod
    def _conversation(prompt: Sequence[Message], completion: str) -> list[dict[str, str]]:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
        return [*turns, {"role": "assistant", "content": completion}]

    def _finished(self, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        contract = self.contract
        kwargs: dict[str, Any] = dict(contract.template_kwargs)
        if contract.template_source == "plain":
            kwargs |= {"end_token": contract.end_token, "bos_token": contract.bos_token}
        try:
            text = self._tokenizer.apply_chat_template(
                turns, chat_template=contract.template, tokenize=False, add_generation_prompt=False, **kwargs
            )
        except TemplateError as exc:
            raise ContractError(
                f"the chat template rejects the conversation: {exc}", remedy="use turns and roles that the model's template knows"
            ) from exc
        assert isinstance(text, str)
        stripped = text.rstrip()
        return stripped if stripped.endswith(contract.end_token) else text + contract.end_token

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def split_steps(text: str, separator: str) -> list[tuple[str, int]]:
    """The steps of a text and where each ends, its separator included; what is but white space is no step of its own."""
    steps: list[tuple[str, int]] = []
    begin = 0
    for stop in [*(found.end() for found in re.finditer(re.escape(separator), text)), len(text)]:
        step = text[begin:stop]
        if step.replace(separator, "").strip():
            steps.append((step.removesuffix(separator), stop))
            begin = stop
    return steps


def gate_position(contract: Contract, ids: Sequence[int], prompt_length: int) -> int:
    """Position in a conversation that a gated head reads: the prompt's last token, or where `contract.gate` occurs last in the prompt.

    Raises:
        ContractError: the prompt does not hold the token ids of `contract.gate`.
    """
    pattern = list(contract.gate or ())
    if not pattern:
        return max(prompt_length - 1, 0)
    for start in range(prompt_length - len(pattern), -1, -1):
        if list(ids[start : start + len(pattern)]) == pattern:
            return start
    raise ContractError(
        f"the prompt does not hold the token ids {pattern} where the gate reads",
        remedy="use the chat template that the model was made with",
    )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _left_truncations(prompt: Sequence[Message]) -> Iterator[Sequence[Message]]:
    # The whole prompt first, then without its oldest turns, always starting at a user turn.
    yield prompt
    num_system = 1 if prompt and prompt[0]["role"] == "system" else 0
    for start in range(num_system + 1, len(prompt)):
        if prompt[start]["role"] == "user":
            yield [*prompt[:num_system], *prompt[start:]]
