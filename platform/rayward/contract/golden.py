"""The fixed conversations whose rewards travel with every model."""

from __future__ import annotations

from collections.abc import Iterator

from rayward.contract.contract import GoldenScore
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder, Encoding
from rayward.errors import ContractError, TooLongError

GOLDEN_CONVERSATIONS: tuple[tuple[tuple[Message, ...], str], ...] = (
    (({"role": "user", "content": "What is the capital of France?"},), "Paris."),
    (({"role": "user", "content": "What is the capital of France?"},), "I think it might be Lyon, but I am not sure."),
    (({"role": "user", "content": "Add 17 and 25."},), "17 + 25 = 42"),
    (
        ({"role": "user", "content": "Write a haiku about rain."},),
        "Soft rain on the roof,\nthe garden drinks in silence;\nmorning smells of earth.",
    ),
    (
        (
            {"role": "user", "content": "My code prints nothing."},
            {"role": "assistant", "content": "Can you show it to me?"},
            {"role": "user", "content": "print = lambda *a: None\nprint('hello')"},
        ),
        "You replaced `print` by a function that does nothing. Remove the first line.",
    ),
    (({"role": "user", "content": "Übersetze: Guten Morgen, wie geht es dir?"},), "Good morning, how are you?"),
    (({"role": "user", "content": "用一句话解释重力。"},), "重力是物体之间相互吸引的力。"),
    (({"role": "user", "content": "Repeat the word yes."},), "yes " * 40 + "yes"),
)
"""Fixed texts whose rewards travel with every checkpoint and export: short, long, multi-turn, several scripts, code."""

GOLDEN_CRITIQUE = "The answer addresses the question. It is clear, but a reader cannot check every part of it."
"""What follows the completion where the contract reads the reward after a critique."""


SHORT_CONVERSATIONS: tuple[tuple[str, str], ...] = (("Say hello.", "Hello!"), ("2+2?", "4"), ("2+2?", "5"), ("a", "b"), ("a", "c"))
"""Prompt and completion for contracts whose token limit holds hardly any of the texts above."""
SHORT_CRITIQUE = "Good."

FEWEST = 3
"""With fewer of the usual conversations than this, the short ones are added."""


def golden_conversations(encoder: Encoder) -> list[tuple[GoldenScore, Encoding]]:
    """The golden conversations that the contract can hold, with their ids, still to be scored: never none.

    Raises:
        ContractError: not even the shortest conversation can be encoded.
    """
    lead_in, reading = encoder.contract.critique_lead_in, encoder.contract.reading
    separator = None if reading is None else reading.separator
    refused: ContractError | None = None
    found: list[tuple[GoldenScore, Encoding]] = []
    for number, (prompt, completion, critique) in enumerate(_candidates()):
        if number >= len(GOLDEN_CONVERSATIONS) and len(found) >= FEWEST:
            break
        critique_given = None if lead_in is None else critique
        try:
            encoding = encoder.encode_parts(prompt, completion, critique_given, separator=separator)
        except ContractError as exc:
            refused = exc
            continue
        golden = GoldenScore(prompt=prompt, completion=completion, critique=critique_given, token_ids=tuple(encoding.ids), reward=())
        found.append((golden, encoding))
    if not found:
        assert refused is not None
        raise type(refused)(
            f"no conversation, however short, can be scored under this contract: {refused.problem}",
            remedy="raise model.max_tokens" if isinstance(refused, TooLongError) else refused.remedy,
        )
    return found


def _candidates() -> Iterator[tuple[tuple[Message, ...], str, str]]:
    for prompt, completion in GOLDEN_CONVERSATIONS:
        yield prompt, completion, GOLDEN_CRITIQUE
    for text, completion in SHORT_CONVERSATIONS:
        yield ({"role": "user", "content": text},), completion, SHORT_CRITIQUE
