"""Finished texts without roles, as flat dialects send them: recognised where they went through the template before, else as they stand.

A rendered text becomes the token ids of the messages that it was rendered from: what stands before its first turn and after its last one
(tokens that begin a text, padding, white space, an end token or none) becomes what the template writes there. Its
control tokens are control tokens, because whoever sent it put them there. A plain text has no turns that could be forged, so control tokens
inside it are plain text; it begins and ends as a conversation of the contract does.
"""

from __future__ import annotations

from functools import cached_property

from rayward.contract.contract import Contract
from rayward.contract.control import ControlTokens
from rayward.contract.conversation import Message, TakenAs, TemplateInputs
from rayward.contract.rendering import Rendered, common_length
from rayward.contract.template import ChatTemplate
from rayward.errors import ContractError, UnsupportedMessageError

_PROBE = "qzvkprobe"


class FlatTexts:
    """Flat texts to what the tokenizer is given, by a contract.

    Args:
        bos: token of the tokenizer that begins a text, whether or not the template writes it.
    """

    def __init__(self, contract: Contract, template: ChatTemplate, control: ControlTokens, *, bos: str | None) -> None:
        self._contract, self._template, self._control = contract, template, control
        self._after = tuple(token for token in (contract.end_token, contract.pad_token) if token)
        self._outside = tuple(sorted({*self._after, *([bos] if bos else [])}, key=len, reverse=True))

    def read(self, text: str) -> tuple[Rendered, TakenAs]:
        """The text as it is tokenized, and what it was taken as.

        Raises:
            UnsupportedMessageError: the contract reads the reward after a critique of a conversation.
            ContractError: it holds characters that stand for control tokens here.
        """
        if self._contract.critique_lead_in is not None:
            raise UnsupportedMessageError(
                "the reward is read after a critique of a conversation, and a flat text has no turns",
                remedy="send prompt and completions",
            )
        body = self._without_lead(text)
        if self.is_rendered(body):
            return self._of_rendered(body), "rendered"
        given = self._without_end(body)[0]
        hidden = self._control.stand_in(given)
        literal = self._control.always or hidden is not given
        return Rendered(self._lead + hidden + self._contract.end_token, len(self._lead), 0, literal, False, None), "as_given"

    def parts(self, text: str, prompt_text: str) -> tuple[str, str] | None:
        """Prompt and answer of a plain text that begins with its prompt, without what stands around a text; None where one is empty."""
        prompt = prompt_text[len(text) - len(self._without_lead(text)) :]
        answer = self._without_end(text[len(prompt_text) :])[0]
        return (prompt, answer) if prompt.strip() and answer.strip() else None

    def is_rendered(self, body: str) -> bool:
        """Whether a text, without what stands before its first turn, begins as the template begins a conversation."""
        mark = self._control.begins(body)
        if mark is not None and mark in self._template.around_turns:
            return True
        if self._header not in body or not self._header:
            return False
        # A template may write no control tokens at all, or nothing before the system's text.
        before = body[: body.index(self._header)]
        return any(before.startswith(opening) if opening else before and mark is None and self._marks(before) for opening in self._openings)

    def _marks(self, before: str) -> bool:
        first = self._control.first_in(before)
        return first is not None and first in self._template.around_turns

    def _of_rendered(self, body: str) -> Rendered:
        closing = self._template.closing or self._contract.end_token
        text, ended = self._without_end(body)
        if ended:
            end = self._contract.end_token
        else:
            # A generated text ends with a part of what the template writes after the last turn, or with nothing of it.
            stripped = text.rstrip()
            known = max((stop for stop in self._control.ends(closing) if stripped.endswith(closing[:stop])), default=0)
            text, end = (stripped, closing[known:]) if known else (text, closing)
        whole = self._lead + text + end
        if self._control.always:
            self._control.refuse_stand_ins(whole)
        start = self._start(whole[: len(whole) - len(end)])
        return Rendered(whole, start, self._prompt_end(whole, start), self._control.always, False, None)

    def _start(self, text: str) -> int:
        # Where the last assistant's turn begins.
        found = text.rfind(self._header) if self._header else -1
        if found < 0:
            return len(self._lead)
        opening = self._template.opening or ""
        longest = (opening[max(opening.find(self._header), 0) :], self._heading.lstrip(), self._header)
        return found + next(len(heading) for heading in longest if heading.startswith(self._header) and text.startswith(heading, found))

    def _prompt_end(self, text: str, start: int) -> int:
        # What is cut off for all texts of a prompt must end with a control token of theirs.
        return self._control.last_end(text[:start])

    def _without_lead(self, text: str) -> str:
        # By places, not by shorter and shorter copies: a text may be padded to any length.
        found = place = 0
        while True:
            while place < len(text) and text[place].isspace():
                place += 1
            token = next((token for token in self._outside if text.startswith(token, place)), None)
            if token is None:
                return text[found:]
            found = place = place + len(token)

    def _without_end(self, text: str) -> tuple[str, bool]:
        found = place = len(text)
        while True:
            while place and text[place - 1].isspace():
                place -= 1
            token = next((token for token in self._after if text.endswith(token, 0, place)), None)
            if token is None:
                return text[:found], found < len(text)
            found = place = place - len(token)

    @cached_property
    def _preludes(self) -> list[str]:
        # What the template writes before the first text.
        found = []
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            turns = [Message(role=role, content=_PROBE) for role in roles]
            try:
                before, probe, _ = self._template.render(turns, TemplateInputs()).partition(_PROBE)
            except ContractError:
                continue
            found += [before] if probe else []
        return found

    @cached_property
    def _lead(self) -> str:
        # What the template writes before the first turn of a conversation.
        leads = [prelude[: len(prelude) - len(self._without_lead(prelude))] for prelude in self._preludes]
        return leads[0] if leads else (self._contract.bos_token or "")

    @cached_property
    def _openings(self) -> list[str]:
        return [self._without_lead(prelude).strip() for prelude in self._preludes]

    @cached_property
    def _heading(self) -> str:
        # What every turn of an assistant begins with: without the end of the turn before, and without what only some turns have.
        turns = [Message(role=role, content=_PROBE) for role in ("user", "assistant", "user", "assistant")]
        try:
            parts = self._template.render(turns, TemplateInputs()).split(_PROBE)
        except ContractError:
            return ""
        opening = parts[1][: common_length(parts[1], parts[3])] if len(parts) == 5 else self._template.opening or ""
        first = self._control.first_in(opening)
        rest = opening[opening.index(first) + len(first) :] if first else ""
        return rest if rest.strip() else opening

    @property
    def _header(self) -> str:
        return self._heading.strip()
