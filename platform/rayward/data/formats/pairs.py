"""Formats of pairs: chosen and rejected under various names, and transcripts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rayward.contract.conversation import Completion, Message
from rayward.data.formats.fields import (
    Row,
    SourceOptions,
    as_completion,
    as_messages,
    as_number,
    as_prompt,
    as_text,
    build_comparison,
    required,
    shared_turns,
)
from rayward.data.formats.scores import judged
from rayward.data.formats.values import parsed
from rayward.data.record import BadRow, Comparison, RowRejected

TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def pair(row: Row, options: SourceOptions) -> Comparison:
    """TRL and OpenRLHF: chosen and rejected, texts or messages, prompt in its own column or inside both.

    Critiques stand in `chosen_feedback` and `rejected_feedback` (arXiv 2408.11791).
    """
    chosen, rejected = parsed(required(row, options.chosen_key)), parsed(required(row, options.rejected_key))
    if options.prompt_key is not None:
        prompt = as_prompt(required(row, options.prompt_key), options.prompt_key)
        texts = [as_completion(chosen, options.chosen_key, prompt), as_completion(rejected, options.rejected_key, prompt)]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, texts = _split_common_text(chosen, rejected)
    else:
        keys = (options.chosen_key, options.rejected_key)
        prompt, texts = shared_turns([as_messages(chosen, keys[0]), as_messages(rejected, keys[1])], keys)
    return build_comparison(
        row,
        options,
        prompt,
        texts,
        critiques=[row.get("chosen_feedback"), row.get("rejected_feedback")],
        **judged(row, options, options.chosen_key, options.rejected_key),
    )


def _split_common_text(chosen: str, rejected: str) -> tuple[tuple[Message, ...], list[Completion]]:
    if chosen == rejected:
        raise RowRejected(BadRow.IDENTICAL_COMPLETIONS, "chosen and rejected are the same text")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    # Back to the last white space: otherwise `cat` and `car` would leave the completions `t` and `r`.
    while common and not chosen[common - 1].isspace():
        common -= 1
    prompt = chosen[:common].strip()
    if not prompt:
        raise RowRejected(BadRow.NO_SHARED_PROMPT, "chosen and rejected do not begin with the same words")
    return (Message(role="user", content=prompt),), [chosen[common:].strip(), rejected[common:].strip()]


def transcript(value: Any, key: str) -> tuple[Message, ...]:
    parts = TRANSCRIPT.split(as_text(value, key))
    if len(parts) < 3 or parts[0].strip():
        raise RowRejected(BadRow.UNPARSABLE, f"{key!r} does not begin with 'Human:' or 'Assistant:'")
    return tuple(
        Message(role=_TRANSCRIPT_ROLES[speaker], content=text.strip()) for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    )


def hh_rlhf(row: Row, options: SourceOptions) -> Comparison:
    """Anthropic hh-rlhf: two transcripts; all turns but the last answer are the prompt."""
    chosen, rejected = transcript(required(row, "chosen"), "chosen"), transcript(required(row, "rejected"), "rejected")
    prompt, texts = shared_turns([chosen, rejected], ("chosen", "rejected"))
    return build_comparison(row, options, prompt, texts, **judged(row, options))


def ultrafeedback_binarized(row: Row, options: SourceOptions) -> Comparison:
    """UltraFeedback binarized: the strength is the score gap; equal scores are a tie, a negative gap is an error of the row."""
    chosen, rejected = as_messages(required(row, "chosen"), "chosen"), as_messages(required(row, "rejected"), "rejected")
    told = as_text(required(row, "prompt"), "prompt").strip()
    prompt, texts = shared_turns([chosen, rejected], ("chosen", "rejected"))
    if told and all(turn["content"].strip() != told for turn in prompt):
        raise RowRejected(BadRow.NO_SHARED_PROMPT, "the column 'prompt' is none of the turns that chosen and rejected share")
    return build_comparison(row, options, prompt, texts, **judged(row, options))


def helpsteer_preference(prompt_key: str, first_key: str, second_key: str, strength_key: str) -> Callable[[Row, SourceOptions], Comparison]:
    """HelpSteer2 and 3 preference: a signed strength, below 0 the first is better, 0 a tie."""

    def adapt(row: Row, options: SourceOptions) -> Comparison:
        prompt = as_prompt(required(row, prompt_key), prompt_key)
        texts = [as_completion(required(row, key), key, prompt) for key in (first_key, second_key)]
        strength = as_number(required(row, strength_key), strength_key)
        ranks = (float(strength > 0), float(strength < 0))
        return build_comparison(row, options, prompt, texts, ranks=ranks, strength=abs(strength))

    return adapt
