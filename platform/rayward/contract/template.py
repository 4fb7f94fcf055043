"""Turns to text by the contract's chat template, and what that template does to the parts of a conversation.

What a template shows is found out by trying: the same conversation with other words in every part is rendered once per shape, and a part
whose word is not in the text is not shown. No template is read or guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rayward.contract.contract import Contract
from rayward.contract.conversation import Message, TemplateInputs
from rayward.errors import ContractError, TemplateFailedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED_KWARGS = frozenset(
    {
        "messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
"""Variables that a row cannot set: they are the contract's, or have a place of their own."""

SHAPES_KEPT = 4096
_PROBE = "qzvkprobe"


class ChatTemplate:
    """The chat template of a contract.

    Args:
        contract: template and variables.
        tokenizer: whose special tokens the template may print.
    """

    def __init__(self, contract: Contract, tokenizer: PreTrainedTokenizerBase) -> None:
        self._contract = contract
        self._tokenizer = tokenizer
        self._knows_developer = "developer" in contract.template
        self._shown: dict[str, str | None] = {}

    def render(self, turns: Sequence[Message], inputs: TemplateInputs) -> str:
        """The turns as text: it ends with the end token.

        Raises:
            ContractError: the template rejects them.
        """
        contract = self._contract
        kwargs: dict[str, Any] = {**contract.template_kwargs, **inputs.chat_template_kwargs}
        if reserved := RESERVED_KWARGS & set(inputs.chat_template_kwargs):
            raise ContractError(
                f"chat_template_kwargs sets {', '.join(sorted(reserved))}, which is not a variable of a row",
                remedy="remove it; tools have a field of their own",
            )
        if contract.template_source == "plain":
            kwargs |= {"end_token": contract.end_token, "bos_token": contract.bos_token}
        from jinja2 import TemplateError

        given = [self._given(turn) for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                given,
                tools=list(inputs.tools) or None,
                chat_template=contract.template,
                tokenize=False,
                add_generation_prompt=False,
                **kwargs,
            )
        except TemplateError as exc:
            raise ContractError(
                f"the chat template rejects the conversation: {exc}", remedy="use turns and roles that the model's template knows"
            ) from exc
        # Broad on purpose: a template is a program of other people. Its exceptions may quote the text, so only their type is told.
        except Exception as exc:
            raise TemplateFailedError(
                f"{type(exc).__name__} in the chat template", remedy="use turns and roles that the model's template knows"
            ) from exc
        assert isinstance(text, str)
        stripped = text.rstrip()
        return stripped if stripped.endswith(contract.end_token) else text + contract.end_token

    def _given(self, turn: Message) -> dict[str, Any]:
        given = {key: value for key, value in turn.items() if key != "prefix"}
        if turn["role"] == "developer" and not self._knows_developer:
            given["role"] = "system"
        return given

    @cached_property
    def closing(self) -> str | None:
        """What the template writes after the text of the last turn, up to the end; None where that cannot be told."""
        turns = [Message(role="user", content="a"), Message(role="assistant", content=_PROBE)]
        try:
            _, found, after = self.render(turns, TemplateInputs()).rpartition(_PROBE)
        except ContractError:
            return None
        return after if found else None

    @cached_property
    def around_turns(self) -> str:
        """What the template writes around turns of the system, the user and the assistant, as one text."""
        found = ""
        for roles in (("system", "user"), ("user",), ("user", "assistant", "user")):
            turns = [Message(role=role, content=_PROBE) for role in roles]
            try:
                found += self.render(turns, TemplateInputs()).replace(_PROBE, " ")
            except ContractError:
                continue
        return found

    @cached_property
    def opening(self) -> str | None:
        """What the template writes before the text of an assistant's turn that follows a user's; None where that cannot be told."""
        turns = [Message(role="user", content=_PROBE), Message(role="assistant", content=_PROBE)]
        try:
            parts = self.render(turns, TemplateInputs()).split(_PROBE)
        except ContractError:
            return None
        return parts[1] if len(parts) == 3 else None

    def not_shown(self, turns: Sequence[Message], inputs: TemplateInputs) -> str | None:
        """The first part of a conversation that the template does not show, in words; None where it shows all."""
        unknown = [name for name in inputs.chat_template_kwargs if name not in self._contract.template]
        if unknown:
            return f"the variable {unknown[0]!r} of chat_template_kwargs"
        shape = json.dumps([_shape(turns), len(inputs.tools), _kinds(inputs.tools), dict(inputs.chat_template_kwargs)], sort_keys=True)
        if shape not in self._shown:
            if len(self._shown) >= SHAPES_KEPT:
                self._shown.clear()
            self._shown[shape] = self._find_not_shown(turns, inputs)
        return self._shown[shape]

    def _find_not_shown(self, turns: Sequence[Message], inputs: TemplateInputs) -> str | None:
        probes = _Probes()
        changed = [probes.turn(turn, f"turn {number}") for number, turn in enumerate(turns)]
        tools = tuple(probes.tool(tool, f"tools[{number}]") for number, tool in enumerate(inputs.tools))
        try:
            text = self.render(changed, TemplateInputs(tools, inputs.chat_template_kwargs))
        except ContractError:
            # The template looks into the words themselves; the real conversation decides whether it renders.
            return None
        folded = text.lower()
        return next((part for word, part in probes.parts.items() if word not in folded), None)


class _Probes:
    # Words that stand in no text, and of which part each is.

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}

    def word(self, part: str) -> str:
        word = f"{_PROBE}{len(self.parts):06d}x"
        self.parts[word] = part
        return word

    def turn(self, turn: Message, where: str) -> Message:
        named = f"{where} ({turn['role']})"
        changed = Message(role=turn["role"], content=self.word(f"the text of {named}") if turn["content"].strip() else turn["content"])
        for key in ("tool_call_id", "name"):
            if key in turn:
                changed[key] = turn[key]
        if "name" in turn and turn["role"] != "tool":
            changed["name"] = self.word(f"the name of {named}")
        if turn.get("reasoning_content", "").strip():
            changed["reasoning_content"] = self.word(f"the reasoning of {named}")
        if "tool_calls" in turn:
            changed["tool_calls"] = [self._call(call, f"call {index} of {named}") for index, call in enumerate(turn["tool_calls"])]
        return changed

    def _call(self, call: dict[str, Any], where: str) -> dict[str, Any]:
        function = call["function"]
        arguments = self._leaves(function["arguments"], f"the arguments of {where}")
        return {**call, "function": {"name": self.word(f"the function of {where}"), "arguments": arguments}}

    def tool(self, tool: dict[str, Any], where: str) -> dict[str, Any]:
        function = tool.get("function")
        if isinstance(function, dict):
            return {**tool, "function": self._described(function, where)}
        return self._described(tool, where)

    def _described(self, function: dict[str, Any], where: str) -> dict[str, Any]:
        changed = dict(function)
        for key, part in (("name", "the name"), ("description", "the description")):
            if isinstance(function.get(key), str) and function[key].strip():
                changed[key] = self.word(f"{part} of {where}")
        return changed

    def _leaves(self, value: Any, part: str) -> Any:
        if isinstance(value, Mapping):
            return {key: self._leaves(entry, part) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._leaves(entry, part) for entry in value]
        return self.word(part) if isinstance(value, str) and value.strip() else value


def _shape(turns: Sequence[Message]) -> list[Any]:
    return [
        [
            turn["role"],
            bool(turn["content"].strip()),
            bool(turn.get("reasoning_content", "").strip()),
            "name" in turn,
            [_kinds(call["function"]["arguments"]) for call in turn.get("tool_calls", ())],
        ]
        for turn in turns
    ]


def _kinds(value: object) -> Any:
    # What of a value decides which words stand in for it.
    if isinstance(value, Mapping):
        return {str(key): _kinds(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_kinds(entry) for entry in value]
    return bool(value.strip()) if isinstance(value, str) else None


def truncations(prompt: Sequence[Message]) -> Iterator[int]:
    """Where a prompt may begin when its oldest turns go: at its user turns after the first one, the latest last."""
    first = num_kept(prompt)
    return (start for start in range(first + 1, len(prompt)) if prompt[start]["role"] == "user")


def num_kept(prompt: Sequence[Message]) -> int:
    """How many turns at the beginning are never dropped: the system's."""
    return 1 if prompt and prompt[0]["role"] in ("system", "developer") else 0
