"""What is scored and what became of it, past all rules of any wire: the one schema of replies, result lines and clients."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter

from rayward.contract.contract import Normalise
from rayward.contract.conversation import Completion, Message, TemplateInputs
from rayward.contract.conversation import TakenAs as TakenAs

FiniteFloat: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Form: TypeAlias = Literal["conversation", "text", "tokens"]
"""What an item is: a prompt and completions for the template, or one finished text of a flat dialect, or that as token ids."""

RETRYABLE_CODES = frozenset({"deadline_exceeded", "overloaded", "interrupted", "encoder_lost"})
"""Errors of items that another try may not meet: the time was up, the replica went away, a neighbour took the process down."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a model besides the texts; one value from the command line or the wire down to the forward.

    Attributes:
        weights: name of the weight set that makes the reward of several outputs; None: the model's own.
        normalise: raw, centred or standardised.
        n_critiques: of a model that writes critiques: the reward is the mean over so many.
        temperature: of their sampling; 0: the likeliest text.
    """

    weights: str | None = None
    normalise: Normalise = "raw"
    n_critiques: int = 1
    temperature: float = 0.0

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, under the names of the wire."""
        values = asdict(self)
        return {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One prompt and its completions, past all rules of the wire.

    Attributes:
        prompt: turns, ending with a user or tool turn, or with one that an assistant has begun.
        completions: K >= 1 texts of the assistant turn that follows, or turns that begin and end with an assistant's.
        tools, chat_template_kwargs: what the chat template is given besides turns.
        critiques: given critiques of each completion, which are then not written.
        seed: of the sampling of critiques. Neither is on the wire.
        form: `text`: there is no prompt, and one completion, a whole text of a flat dialect: templated before or plain.
        prompt_text: of a text, the beginning that its sender calls the prompt; where no template has been applied, the contract's is
            applied to it and to what follows. None: not said.
        token_ids: of `tokens`, whose one completion is empty.
        trace: the reward at every token of the completions is asked for.
    """

    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...]
    asked: Asked = Asked()
    critiques: tuple[tuple[str, ...], ...] | None = None
    seed: int = 0
    tools: tuple[dict[str, Any], ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    form: Form = "conversation"
    prompt_text: str | None = None
    token_ids: tuple[int, ...] | None = None
    trace: bool = False

    @property
    def inputs(self) -> TemplateInputs:
        """What the chat template is given besides turns."""
        return TemplateInputs.of(self.tools, self.chat_template_kwargs)


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one item has no rewards.

    Codes: `too_long`, `template`, `unsupported_message`, `already_templated`, `changed_by_template`, `token_out_of_range`, `non_finite`,
    `unknown_weights`, `no_normaliser`, `no_critiques`, `no_trace`; `encoding_timeout` (template or tokenizer did not end in time),
    `poisoned` (replicas died of it); `deadline_exceeded`, `overloaded`, `interrupted`, `encoder_lost`, which another try may not meet;
    `failed`: anything else.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    code: str
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, code: str, message: str) -> Self:
        """The error of a code, which says whether another try may help."""
        return cls(code, message, code in RETRYABLE_CODES)


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """What the head says at every token of one completion, as if the conversation ended there.

    Attributes:
        tokens: the texts of the tokens, which joined are the completion as it was scored.
        rewards: as many; the last one is the reward of the completion.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    tokens: tuple[str, ...]
    rewards: tuple[FiniteFloat, ...]


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What became of one item: K finite rewards, or an error; never both, never neither.

    Attributes:
        outputs: for a head with several outputs, their values for each completion.
        steps: of a process reward model, the probability that each step is right, for each completion.
        critiques: of a model that writes them, the critiques of each completion.
        reward_std: population standard deviation of the rewards over several critiques, for each completion.
        traces: of each completion, where they were asked for.
        taken_as: what became of the texts.
        num_tokens: of each completion's whole conversation.
        tokens: tokens of the K conversations; tokens_computed: of these, after sharing prefixes. Sums of them are in the usage of a reply.
    """

    # An instance is checked too before it is written: NaN would become null.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, revalidate_instances="always")

    rewards: tuple[FiniteFloat, ...] | None = None
    outputs: tuple[tuple[FiniteFloat, ...], ...] | None = None
    steps: tuple[tuple[FiniteFloat, ...], ...] | None = None
    critiques: tuple[tuple[str, ...], ...] | None = None
    reward_std: tuple[FiniteFloat, ...] | None = None
    traces: tuple[TokenTrace, ...] | None = None
    error: ItemError | None = None
    num_tokens: tuple[int, ...] | None = None
    taken_as: Annotated[TakenAs, Field(exclude=True)] = "templated"
    tokens: Annotated[int, Field(exclude=True)] = 0
    tokens_computed: Annotated[int, Field(exclude=True)] = 0

    def __post_init__(self) -> None:
        if (self.rewards is None) == (self.error is None):
            raise ValueError("a result holds either rewards or an error")

    def is_finite(self) -> bool:
        """Whether every number in it is finite."""
        traces = (trace.rewards for trace in self.traces or ())
        rows = (self.rewards or (), self.reward_std or (), *(self.outputs or ()), *(self.steps or ()), *traces)
        return all(math.isfinite(value) for row in rows for value in row)

    def as_json(self) -> dict[str, Any]:
        """What a reply and a result line hold: JSON values, without what is absent.

        Raises:
            ValueError: a number is not finite.
        """
        dumped: dict[str, Any] = _RESULT.dump_python(_RESULT.validate_python(self), mode="json", exclude_none=True)
        return dumped


_RESULT: TypeAdapter[ItemResult] = TypeAdapter(ItemResult)
