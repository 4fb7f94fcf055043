"""Text to token ids by a contract: the only place where conversations are rendered and tokenized."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayward.contract.contract import Contract
from rayward.contract.control import ControlTokens
from rayward.contract.conversation import NO_INPUTS, Completion, Message, TakenAs, TemplateInputs
from rayward.contract.flat import FlatTexts
from rayward.contract.rendering import Conversation, Rendered, Renderer
from rayward.contract.template import ChatTemplate, num_kept, truncations
from rayward.contract.tokens import Head, TextTokenizer, Tokens
from rayward.errors import ContractError, ContractMismatchError, TooLongError, UnsupportedMessageError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase


_MARK = "rayward-critique-stands-here"
CHARS_PER_CALL = 4_000_000
"""Rendered texts that are in memory at once, for very long conversations."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """One conversation as token ids.

    Attributes:
        ids: the last one is the end token.
        text_start: index of the first id of what was written last: the completion, or the turn of the critique. A language-model loss
            teaches from here to the end.
        step_ends: index of the last id of every step of the completion, the end token for the last one; None where no separator was given.
        num_tokens: of the whole conversation, before its oldest turns went.
        prompt_key: hash of what the prompt becomes before any turn goes: equal for prompts that the template makes equal.
        prompt_text, rest_text: the rendered prompt before any turn goes, and what follows it, as the tokenizer reads them.
        trimmed: whether the template cut white space around the completion.
        changed: what else the template changed or left out, in words, where the contract accepts it.
        taken_as: what became of the texts.
    """

    ids: list[int]
    text_start: int
    step_ends: tuple[int, ...] | None = None
    num_tokens: int = 0
    prompt_key: str = ""
    prompt_text: str = ""
    rest_text: str = ""
    trimmed: bool = False
    changed: str | None = None
    taken_as: TakenAs = "templated"

    @property
    def truncated(self) -> bool:
        """Whether the oldest turns of the prompt went."""
        return len(self.ids) < self.num_tokens


class Encoder:
    """Text to token ids by a contract; the only place where conversations are rendered and tokenized.

    Args:
        contract: the rules.
        tokenizer: the fast tokenizer that belongs to it.
    """

    def __init__(self, contract: Contract, tokenizer: PreTrainedTokenizerBase) -> None:
        self.contract = contract
        self._tokenizer = tokenizer
        self._template = ChatTemplate(contract, tokenizer)
        if tokenizer.convert_tokens_to_ids(contract.end_token) != contract.end_token_id:
            raise ContractMismatchError(
                f"tokenizer: {contract.end_token!r} has id {tokenizer.convert_tokens_to_ids(contract.end_token)}, "
                f"the contract says {contract.end_token_id}",
                remedy="use the tokenizer that was exported with the contract",
            )
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self._control = self._control_tokens()
        self._prompt = ""
        self._tokens = TextTokenizer(self._backend, self._control, self._template, contract.end_token)
        self._renderer = Renderer(contract, self._template, self._control)
        self._flat = FlatTexts(contract, self._template, self._control, bos=tokenizer.bos_token)

    def _control_tokens(self) -> ControlTokens:
        around = self._template.around_turns
        control = {self.contract.end_token, self.contract.bos_token or "", self.contract.pad_token}
        normalised = False
        for token in self._backend.get_added_tokens_decoder().values():
            if token.special or token.content in around:
                control.add(token.content)
                normalised |= token.normalized and self._backend.normalizer is not None
        # A normaliser could make a control token of a text that holds none, where the tokenizer looks for them after it.
        return ControlTokens(self._backend, control, always=normalised)

    def encode(
        self, prompt: Sequence[Message], completion: Completion, critique: str | None = None, *, inputs: TemplateInputs = NO_INPUTS
    ) -> list[int]:
        """Token ids of one conversation; the last id is the end token, whose position is scored.

        Args:
            critique: what `Contract.critique_lead_in` is followed by; needed where the contract has one.

        Raises: as `encode_parts`.
        """
        return self.encode_parts(prompt, completion, critique, inputs=inputs).ids

    def encode_parts(
        self,
        prompt: Sequence[Message],
        completion: Completion,
        critique: str | None = None,
        *,
        separator: str | None = None,
        inputs: TemplateInputs = NO_INPUTS,
    ) -> Encoding:
        """As `encode`, with the places in the conversation that losses and heads refer to.

        Args:
            separator: text between two steps of the completion.

        Raises:
            TooLongError: the system turn, the last user turn, the completion and the critique do not fit `max_tokens`.
            UnsupportedMessageError: the template does not show a part of it, and the contract does not accept that.
            AlreadyTemplatedError: a text has gone through a chat template before.
            ChangedTextError: the template changes the completion, and the contract does not accept that.
            ContractError: the template rejects the conversation, or the critique is missing.
        """
        return self.encode_sure([Conversation(prompt, completion, critique, inputs)], separator=separator)[0]

    def encode_all(self, conversations: Sequence[Conversation], *, separator: str | None = None) -> list[Encoding | ContractError]:
        """Every conversation as `encode_parts`, many in one call of the tokenizer; what it raises is the value of that conversation.

        Args:
            separator: text between two steps of every completion.
        """
        found: list[Encoding | ContractError] = []
        waiting: list[tuple[Conversation, Rendered | ContractError]] = []
        num_chars = 0
        for conversation in conversations:
            try:
                rendered = self._renderer.render(conversation, conversation.prompt)
            except ContractError as exc:
                waiting.append((conversation, exc))
                continue
            waiting.append((conversation, rendered))
            num_chars += len(rendered.text)
            if num_chars > CHARS_PER_CALL:
                found += self._encoded(waiting, separator)
                waiting, num_chars = [], 0
        return found + self._encoded(waiting, separator)

    def _encoded(
        self, conversations: Sequence[tuple[Conversation, Rendered | ContractError]], separator: str | None
    ) -> list[Encoding | ContractError]:
        rendered_all = [each for _, each in conversations if isinstance(each, Rendered)]
        tokens = iter(self._tokens.tokenize(rendered_all, offsets=separator is not None))
        found: list[Encoding | ContractError] = []
        for conversation, rendered in conversations:
            try:
                found.append(
                    rendered if isinstance(rendered, ContractError) else self._encoding(conversation, rendered, next(tokens), separator)
                )
            except ContractError as exc:
                found.append(exc)
        return found

    def encode_sure(self, conversations: Sequence[Conversation], *, separator: str | None = None) -> list[Encoding]:
        """As `encode_all`.

        Raises: as `encode_parts`, for the first conversation that cannot be encoded.
        """
        found = []
        for encoding in self.encode_all(conversations, separator=separator):
            if isinstance(encoding, ContractError):
                raise encoding
            found.append(encoding)
        return found

    def encode_text(self, text: str, *, prompt_text: str | None = None, separator: str | None = None) -> Encoding:
        """A finished text without roles: where it went through the template before, the ids of the messages that it was rendered from;
        else as it stands. `Encoding.taken_as` says which.

        Args:
            prompt_text: the beginning that is the prompt, if somebody knows: a plain text is then put through the template as this prompt
                and its answer.

        Raises:
            TooLongError: it does not fit `max_tokens`; a text has no turns that could go.
            UnsupportedMessageError: the contract reads the reward after a critique.
        """
        rendered, taken_as = self._flat.read(text)
        parts = self._flat.parts(text, prompt_text) if prompt_text and taken_as == "as_given" else None
        if parts is not None:
            turn = Message(role="user", content=parts[0])
            return self.encode_sure([Conversation((turn,), parts[1], None, NO_INPUTS)], separator=separator)[0]
        (tokens,) = self._tokens.tokenize([rendered], offsets=separator is not None)
        if len(tokens) > self.contract.max_tokens:
            raise TooLongError(
                f"the text takes {len(tokens)} tokens; the contract allows {self.contract.max_tokens}",
                remedy="shorten it, or send prompt and completion as messages, whose oldest turns can go",
            )
        steps = None
        if separator is not None:
            body = rendered.text[rendered.start :].removesuffix(self.contract.end_token).strip()
            steps = self._steps(rendered, tokens, body, separator)
        return Encoding(tokens.ids, tokens.start, steps, len(tokens), taken_as=taken_as)

    def encode_ids(self, ids: Sequence[int]) -> Encoding:
        """A finished text as token ids: as they are, with the end token behind them where they do not end with it.

        Raises:
            TooLongError: they do not fit `max_tokens`.
            UnsupportedMessageError: the reward is read at a place that ids do not show.
        """
        contract = self.contract
        if contract.critique_lead_in is not None or contract.reading is not None or contract.gate == ():
            raise UnsupportedMessageError(
                "the reward is read after a critique, at the steps of a text or at the end of the prompt, which token ids do not show",
                remedy="send texts",
            )
        whole = [*ids] if ids and ids[-1] == contract.end_token_id else [*ids, contract.end_token_id]
        if len(whole) > contract.max_tokens:
            raise TooLongError(f"{len(whole)} token ids; the contract allows {contract.max_tokens}", remedy="shorten them")
        # A gate reads where its own ids stand last, wherever the prompt ends.
        return Encoding(whole, len(whole) if contract.gate else 0, None, len(whole), taken_as="as_given")

    def open_critique(self, prompt: Sequence[Message], completion: Completion, *, inputs: TemplateInputs = NO_INPUTS) -> list[int]:
        """Token ids of the conversation up to where the critique begins, for a language model to go on.

        Raises:
            TooLongError: not even an empty critique fits.
            ContractError: as `encode_parts`.
        """
        conversation = Conversation(prompt, completion, _MARK, inputs)
        rendered = self._renderer.render(conversation, prompt)
        (whole,) = self._tokens.tokenize([rendered])
        if len(whole) > self.contract.max_tokens:
            rendered, _ = self._truncated(conversation, len(whole))
        opened = rendered._replace(text=rendered.text[: rendered.text.rindex(_MARK)])
        ids: list[int] = self._tokens.tokenize([opened])[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens and without white space around it."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)  # type: ignore[assignment]
        return text.strip()

    def token_texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Texts of tokens, which joined are the text of all: a character of several tokens stands at the last of them."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        texts = [stream.step(self._backend, token) or "" for token in ids]
        whole = self._backend.decode(list(ids), skip_special_tokens=False)
        joined = "".join(texts)
        if texts and joined != whole:
            # The last token ends inside a character.
            texts[-1] += whole[len(joined) :] if whole.startswith(joined) else "\ufffd"
        return tuple(texts)

    def render(
        self, prompt: Sequence[Message], completion: Completion, critique: str | None = None, *, inputs: TemplateInputs = NO_INPUTS
    ) -> str:
        """The conversation as text, ending with the end token; control tokens in its own texts look like those of the template.

        Raises: as `encode_parts`, but for the length.
        """
        return self._control.restored(self._renderer.render(Conversation(prompt, completion, critique, inputs), prompt).text)

    def _encoding(self, conversation: Conversation, rendered: Rendered, tokens: Tokens, separator: str | None) -> Encoding:
        num_tokens, key = len(tokens), self._prompt_key(rendered, tokens)
        prompt, rest = self._as_read(rendered.text[: rendered.prompt_end]), self._as_read(rendered.text[rendered.prompt_end :])
        # One text for all completions of a prompt, which may be long.
        self._prompt = prompt = self._prompt if prompt == self._prompt else prompt
        if num_tokens > self.contract.max_tokens:
            rendered, tokens = self._truncated(conversation, num_tokens, offsets=separator is not None)
        steps = None if separator is None else self._step_ends(rendered, tokens, conversation.completion, separator)
        taken_as: TakenAs = "rendered" if rendered.as_given else "templated"
        return Encoding(tokens.ids, tokens.start, steps, num_tokens, key, prompt, rest, rendered.trimmed, rendered.changed, taken_as)

    def _truncated(self, conversation: Conversation, num_tokens: int, *, offsets: bool = False) -> tuple[Rendered, Tokens]:
        # From the shortest prompt on, twice as many more turns at each try: only what nearly fits is rendered, however long the whole is.
        prompt = conversation.prompt
        kept, starts = prompt[: num_kept(prompt)], list(truncations(prompt))
        best: tuple[Rendered, Tokens] | None = None

        def fits(index: int) -> bool:
            nonlocal best, num_tokens
            rendered = self._renderer.render(conversation, [*kept, *prompt[starts[index] :]])
            (tokens,) = self._tokens.tokenize([rendered], offsets=offsets)
            if len(tokens) > self.contract.max_tokens:
                num_tokens = len(tokens)
                return False
            best = rendered, tokens
            return True

        fitting, step = len(starts), 1
        too_long = -1
        while fitting > 0:
            index = max(fitting - step, 0)
            if not fits(index):
                too_long = index
                break
            fitting, step = index, 2 * step
        while best is not None and fitting - too_long > 1:
            middle = (fitting + too_long) // 2
            if fits(middle):
                fitting = middle
            else:
                too_long = middle
        if best is None:
            raise TooLongError(
                f"the last user turn and the completion take {num_tokens} tokens; the contract allows {self.contract.max_tokens}",
                remedy="shorten them, or train with a larger model.max_tokens",
            )
        return best

    def _place(self, rendered: Rendered, position: int) -> int:
        # Of a place in the rendered text, where it is in the text that was tokenized.
        return len(self._control.for_tokenizer(rendered.text[:position])) if rendered.literal else position

    def _prompt_key(self, rendered: Rendered, tokens: Tokens) -> str:
        # Ids up to the last control token, which no completion changes, and the text after it as the tokenizer reads it.
        prompt = rendered.text[: rendered.prompt_end]
        sure = self._control.last_end(prompt)
        head = tokens.head
        if not head.ids and sure:
            head = Head(self._tokens.beginning(rendered, sure), sure)
        state = hashlib.blake2b(head.key, digest_size=16)
        state.update(self._as_read(prompt[sure:] if head.ids else prompt).encode("utf-8", "surrogatepass"))
        return state.hexdigest()

    def _as_read(self, text: str) -> str:
        normaliser = self._backend.normalizer
        return normaliser.normalize_str(text) if normaliser is not None and text else text

    def _step_ends(self, rendered: Rendered, tokens: Tokens, completion: Completion, separator: str) -> tuple[int, ...]:
        if not isinstance(completion, str):
            raise ContractError("a completion of several turns has no steps", remedy="give the steps of one assistant turn as its text")
        return self._steps(rendered, tokens, self._control.stand_in(completion.strip()), separator)

    def _steps(self, rendered: Rendered, tokens: Tokens, body: str, separator: str) -> tuple[int, ...]:
        start = rendered.text.rfind(body)
        if start < 0:
            raise ContractError(
                "the chat template changes the completion, so its steps cannot be found in it",
                remedy="use a template that prints it as it is",
            )
        stops = [self._place(rendered, start + stop) for _, stop in split_steps(body, separator)[:-1]]
        return (*tokens.before(stops), len(tokens) - 1)


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
