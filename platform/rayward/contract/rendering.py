"""A conversation as text: refused where something of it would be lost or forged, and with the place where its completion begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rayward.contract.contract import Contract
from rayward.contract.control import ControlTokens
from rayward.contract.conversation import NO_INPUTS, Completion, Message, TemplateInputs, turns_of
from rayward.contract.template import ChatTemplate
from rayward.errors import AlreadyTemplatedError, ChangedTextError, ContractError, UnsupportedMessageError


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is encoded: a prompt, a completion of it, and what else the contract asks for.

    Attributes:
        critique: what `Contract.critique_lead_in` is followed by; needed where the contract has one.
    """

    prompt: Sequence[Message]
    completion: Completion
    critique: str | None = None
    inputs: TemplateInputs = NO_INPUTS


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: ends with the end token; control tokens in its own texts are replaced by characters that stand for them.
        start: where what was written last begins: the completion, or the turn of the critique.
        prompt_end: where what belongs to the prompt alone ends.
        literal: whether the text must be tokenized under the names of `ControlTokens`.
        trimmed, changed: see `encoder.Encoding`.
        as_given: whether its prompt went through a template before, and is taken as it is.
    """

    text: str
    start: int
    prompt_end: int
    literal: bool
    trimmed: bool
    changed: str | None
    as_given: bool = False


class Renderer:
    """Conversations to text by a contract."""

    def __init__(self, contract: Contract, template: ChatTemplate, control: ControlTokens) -> None:
        self._contract = contract
        self._template = template
        self._control = control

    def render(self, conversation: Conversation, prompt: Sequence[Message]) -> Rendered:
        """The conversation with another prompt in the place of its own.

        Raises: as `encoder.Encoder.encode_parts`, but for the length.
        """
        lead_in, critique = self._contract.critique_lead_in, conversation.critique
        if lead_in is not None and critique is None:
            raise ContractError("the reward is read after a critique and none is given", remedy="give or generate a critique")
        templated = self._templated(conversation, prompt)
        if templated is not None:
            return templated
        branch = turns_of(conversation.completion)
        turns = [*prompt, *branch]
        if prompt and prompt[-1].get("prefix"):
            begun = prompt[-1]["content"] + branch[0]["content"]
            turns = [*prompt[:-1], {**prompt[-1], **branch[0], "content": begun}, *branch[1:]]
        return self._of_turns(turns, branch, len(prompt), conversation)

    def _of_turns(self, turns: list[Message], branch: Sequence[Message], num_prompt: int, conversation: Conversation) -> Rendered:
        contract, inputs = self._contract, conversation.inputs
        accepts = contract.unshown_text == "accept"
        missing = self._template.not_shown(turns, inputs)
        if missing is not None and not accepts:
            raise UnsupportedMessageError(
                f"the chat template does not show {missing}",
                remedy="use a model whose template shows it, remove it, or accept the loss: model.unshown_text=accept",
            )
        hidden: list[Message] = self._control.stand_in(turns)
        variables = {"tools": list(inputs.tools), "kwargs": dict(inputs.chat_template_kwargs)}
        given: dict[str, Any] = variables if inputs is NO_INPUTS else self._control.stand_in(variables)
        literal = self._control.always or hidden is not turns or given is not variables
        if given is not variables:
            inputs = TemplateInputs(tuple(given["tools"]), given["kwargs"])
        text = self._template.render(hidden, inputs)
        self._refuse_joined(text, hidden, inputs)
        start, trimmed, changed = self._written(text, hidden, num_prompt, inputs, branch)
        if changed is not None and not accepts:
            raise ChangedTextError(
                self._control.restored(changed),
                remedy="use a template that prints completions as they are, or accept what it does: model.unshown_text=accept",
            )
        prompt_end = self._prompt_end(text, start, begun=bool(num_prompt) and turns[num_prompt - 1]["role"] == "assistant")
        lead_in = contract.critique_lead_in
        if lead_in is not None:
            question: Message = {"role": "user", "content": f"{lead_in}\n{conversation.critique}"}
            asked = self._control.stand_in(question)
            whole = self._template.render([*hidden, asked], inputs)
            text, start, literal = whole, common_length(whole, text), literal or asked is not question
        return Rendered(text, start, prompt_end, literal, trimmed, missing or changed)

    def _refuse_joined(self, text: str, turns: list[Message], inputs: TemplateInputs) -> None:
        # Some templates write one text right after another: two pieces may make a control token that stands in neither.
        given = [turns, list(inputs.tools), dict(inputs.chat_template_kwargs)]
        apart = self._control.apart(given)
        if apart is given:
            return
        separate = self._template.render(apart[0], TemplateInputs(tuple(apart[1]), apart[2]))
        if self._control.count(separate) != self._control.count(text):
            raise ContractError(
                "two texts that the chat template writes side by side make a control token of the model",
                remedy="remove the pieces of control tokens at the ends of the texts",
            )

    def _prompt_end(self, text: str, start: int, *, begun: bool) -> int:
        # Up to where an assistant's turn opens, because what follows (an empty block of thoughts) may be the completion's.
        opening = self._template.opening
        if begun or not opening:
            return start
        opening = opening[: self._control.last_end(opening)] or opening.rstrip()
        found = text.rfind(opening, 0, start)
        return start if found < 0 else found + len(opening)

    def _templated(self, conversation: Conversation, prompt: Sequence[Message]) -> Rendered | None:
        # A text that was rendered before: refused, or taken as it is; None where it was not.
        end, completion = self._contract.end_token, conversation.completion
        ends = turns_of(completion)[-1]["content"].rstrip().endswith(end)
        openings = (self._control.begins(turn["content"]) for turn in prompt if turn["role"] in ("system", "developer", "user"))
        mark = next((mark for mark in openings if mark is not None and mark in self._template.around_turns), None)
        if mark is None and not ends:
            return None
        if self._contract.templated_text == "as_rendered" and isinstance(completion, str):
            taken = self._as_rendered(conversation, prompt, completion, mark)
            if taken is not None:
                return taken
        what = f"a text of the prompt begins with {mark!r}" if mark else f"the completion ends with {end!r}"
        raise AlreadyTemplatedError(
            f"{what}, which the chat template writes: it has gone through a template before",
            remedy="give the messages or texts without it, or model.templated_text=as_rendered for a prompt that ends where the assistant "
            "begins",
        )

    def _as_rendered(self, conversation: Conversation, prompt: Sequence[Message], completion: str, mark: str | None) -> Rendered | None:
        end, opening = self._contract.end_token, (self._template.opening or "").strip()
        body = completion.rstrip()
        while body.endswith(end):
            body = body.removesuffix(end).rstrip()
        if mark is None:
            return self.render(Conversation(prompt, body, conversation.critique, conversation.inputs), prompt)
        begun = prompt[0]["content"]
        header = opening[self._header_start(opening) :] or opening
        if len(prompt) > 1 or not opening or not begun.rstrip().endswith(header):
            return None
        if self._contract.critique_lead_in is not None or conversation.inputs != NO_INPUTS:
            return None
        hidden = self._control.stand_in(body)
        text = begun + hidden + (self._template.closing or end)
        literal = self._control.always or hidden is not body
        return Rendered(text, len(begun), self._prompt_end(text, len(begun), begun=False), literal, False, None, as_given=True)

    def _header_start(self, opening: str) -> int:
        # Of what stands between a user's text and the assistant's, the turn of the user ends with the first control token.
        first = self._control.first_in(opening)
        return opening.index(first) + len(first) if first else 0

    def _written(
        self, text: str, turns: Sequence[Message], num_prompt: int, inputs: TemplateInputs, branch: Sequence[Message]
    ) -> tuple[int, bool, str | None]:
        # Where the completion begins in the text, whether white space around it is gone, and what else of it is not there as it was given.
        last, closing = self._control.stand_in(branch[-1]["content"]), self._template.closing
        plain = len(branch) == 1 and set(branch[0]) == {"role", "content"}
        if plain and closing is not None:
            if text.endswith(last + closing):
                return len(text) - len(closing) - len(last), False, None
            stripped = last.strip()
            if stripped and text.endswith(stripped + closing):
                return len(text) - len(closing) - len(stripped), True, None
        start = self._branch_start(text, turns, num_prompt, inputs)
        gone = None
        for number, turn in enumerate(branch):
            for name, part in (("text", turn["content"]), ("reasoning", turn.get("reasoning_content", ""))):
                given = self._control.stand_in(part).strip()
                if gone is None and turn["role"] == "assistant" and given not in text[start:]:
                    where = "the completion" if len(branch) == 1 and name == "text" else f"the {name} of turn {number} of the completion"
                    shown = given if len(given) <= 80 else f"{given[:40]} … {given[-40:]}"
                    gone = f"the chat template changes {where}, which does not stand in what it writes: {shown!r}"
        return start, False, gone

    def _branch_start(self, text: str, turns: Sequence[Message], num_prompt: int, inputs: TemplateInputs) -> int:
        # Up to here the text is that of any completion.
        begun = turns[num_prompt - 1] if num_prompt and turns[num_prompt - 1]["role"] == "assistant" else None
        kept = turns[: num_prompt - 1] if begun is not None else turns[:num_prompt]
        content = "" if begun is None else begun["content"]
        try:
            empty = self._template.render([*kept, Message(role="assistant", content=content)], inputs)
        except ContractError:
            return 0
        return common_length(text, empty.removesuffix(self._template.closing or self._contract.end_token))


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences of one type begin with in common."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    # By halves: slices are compared far quicker than items, and texts may be long.
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
