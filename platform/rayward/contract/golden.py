"""The fixed conversations whose rewards travel with every model."""

from __future__ import annotations

from rayward.contract.contract import GoldenScore
from rayward.contract.conversation import Message

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


def unscored() -> tuple[GoldenScore, ...]:
    """The conversations, for a model that was not trained here: ids and rewards are still to be computed."""
    return tuple(GoldenScore(prompt=prompt, completion=text, token_ids=(), reward=()) for prompt, text in GOLDEN_CONVERSATIONS)
